"""A few kills of `make chaos`: one rank, both ranks and torchrun."""

import pytest

from tests.chaos import VICTIMS, chaos


@pytest.mark.slow
def test_a_killed_run_ends_like_an_undisturbed_run(tmp_path):
    table = chaos(tmp_path, kills=4, seed=216)
    assert "are bitwise equal to those of the undisturbed run" in table
    kills = {row.split("|")[1].strip(): sum(map(int, row.split("|")[2:-1])) for row in table.splitlines()[2:5]}
    assert set(kills) == set(VICTIMS) and sum(kills.values()) == 4 and min(kills.values()) >= 1
