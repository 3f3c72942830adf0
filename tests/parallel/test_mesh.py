"""Degrees of parallelism, without processes: the degrees that `auto` chooses, and the errors of impossible ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from parallel.experts import ExpertPlacement
from parallel.mesh import Degrees, MeshError, World, padding_warning, resolve_degrees

SCOUT = ModelConfig()  # dim 768, 31 experts of 2048


def degrees_of(world, replicate=1, shard="auto", expert="auto", local=None, model=SCOUT):
    return resolve_degrees(World(0, world, 0, local or min(world, 8)), model, replicate, shard, expert)


@pytest.mark.parametrize(
    "world, local, expert",
    [
        (1, 1, 1),
        (2, 2, 2),
        (3, 3, 3),
        (4, 4, 4),
        (8, 8, 8),
        (5, 5, 1),
        (6, 6, 3),
        (7, 7, 1),
        (16, 8, 8),
        (24, 8, 8),
        (64, 4, 4),
        (12, 6, 3),
    ],
)
def test_auto_is_the_largest_degree_with_little_padding(world, local, expert):
    assert degrees_of(world, local=local) == Degrees(1, world, expert)


def test_auto_with_replicas_with_few_experts_and_without_any():
    assert degrees_of(8, replicate=2) == Degrees(2, 4, 4) and degrees_of(8, replicate=8) == Degrees(8, 1, 1)
    assert degrees_of(4, model=ModelConfig(n_experts=5)) == Degrees(1, 4, 1)
    assert degrees_of(4, model=ModelConfig(n_experts=16)) == Degrees(1, 4, 4)
    assert degrees_of(4, model=ModelConfig(moe_every=0)) == Degrees(1, 4, 1)


@given(st.integers(1, 64), st.integers(1, 40), st.sampled_from([8, 24, 768]))
def test_auto_fits_any_world_and_number_of_experts(world, n_experts, dim):
    model = ModelConfig(n_experts=n_experts, dim=dim, n_heads=1, expert_dim=dim)
    d = resolve_degrees(World(0, world, 0, world), model, 1, "auto", "auto")
    assert d.expert_shard * d.expert == world and ExpertPlacement(n_experts, d.expert).padding_ratio <= 1.1
    assert resolve_degrees(World(0, world, 0, world), model, 1, world, d.expert) == d


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            dict(world=8, replicate=3),
            "parallel.replicate=3: does not divide the 8 processes .*; set it to 1, 2, 4 or 8",
        ),
        (dict(world=8, replicate=2, shard=3), "parallel.shard=3: must be 4, .*; set it to 4 or auto"),
        (dict(world=8, expert=3), "parallel.expert=3: does not divide parallel.shard=8; set it to 1, 2, 4 or 8"),
        (
            dict(world=8, replicate=2, expert=8),
            "parallel.expert=8: does not divide parallel.shard=4; set it to 1, 2 or 4",
        ),
        (
            dict(world=10, expert=2, model=ModelConfig(dim=6, n_heads=1, expert_dim=9)),
            "parallel.expert=2: .* 5 ranks, .* model.dim=6 nor model.expert_dim=9 .*; set it to 1, 5 or 10",
        ),
        (dict(world=2, expert=2, model=ModelConfig(moe_every=0)), "parallel.expert=2: the model has no experts"),
    ],
)
def test_impossible_degrees_raise_an_error_that_names_a_fix(keys, message):
    with pytest.raises(MeshError, match=message) as error:
        degrees_of(**keys)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "expert, better, percent",
    [(1, None, 0), (8, None, 3), (6, 8, 16), (24, 8, 55), (48, 8, 55)],
)
def test_much_padding_gives_a_warning_with_a_better_degree(expert, better, percent):
    line = padding_warning(World(0, 48, 0, 8), SCOUT, Degrees(1, 48, expert))
    if better is None:
        assert line is None
    else:
        assert f"{percent}% more than needed; set parallel.expert={better}" in line


def test_a_rank_may_own_no_expert():
    assert degrees_of(8, expert=8, model=ModelConfig(n_experts=3)) == Degrees(1, 8, 8)
    assert [ExpertPlacement(5, 4).owned(r) for r in range(4)] == [2, 2, 1, 0]
