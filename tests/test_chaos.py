"""A few kills of `make chaos`: one rank, both and torchrun, in a step and in saves."""

import pytest

from tests.chaos import WHAT, chaos


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_if_left_alone(tmp_path):
    table = chaos(tmp_path, kills=4, seed=216)
    assert "bitwise those of the run that was left alone" in table
    kills = {row.split("|")[1].strip(): sum(map(int, row.split("|")[2:-1])) for row in table.splitlines()[2:5]}
    assert set(kills) == set(WHAT) and sum(kills.values()) == 4 and min(kills.values()) >= 1
