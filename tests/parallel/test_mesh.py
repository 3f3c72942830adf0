"""Degrees of parallelism: what is chosen, what is refused and how, before there are any processes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from parallel.experts import ExpertPlacement
from parallel.mesh import Degrees, MeshError, World, advice, degrees

SCOUT = ModelConfig()  # dim 768, 31 experts of 2048


def of(world, replicate=1, shard="auto", expert="auto", local=None, model=SCOUT):
    return degrees(World(0, world, 0, local or min(world, 8)), model, replicate, shard, expert)


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
def test_auto_takes_the_most_that_fit_a_node_well(world, local, expert):
    assert of(world, local=local) == Degrees(1, world, expert)


def test_auto_with_replicas_few_experts_or_none():
    assert of(8, replicate=2) == Degrees(2, 4, 4) and of(8, replicate=8) == Degrees(8, 1, 1)
    assert of(4, model=ModelConfig(n_experts=5)) == Degrees(1, 4, 1)
    assert of(4, model=ModelConfig(n_experts=16)) == Degrees(1, 4, 4)
    assert of(4, model=ModelConfig(moe_every=0)) == Degrees(1, 4, 1)


@given(st.integers(1, 64), st.integers(1, 40), st.sampled_from([8, 24, 768]))
def test_auto_always_fits(world, n_experts, dim):
    model = ModelConfig(n_experts=n_experts, dim=dim, n_heads=1, expert_dim=dim)
    d = degrees(World(0, world, 0, world), model, 1, "auto", "auto")
    assert d.expert_shard * d.expert == world and ExpertPlacement(n_experts, d.expert).padding_ratio <= 1.1
    assert degrees(World(0, world, 0, world), model, 1, world, d.expert) == d


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(world=8, replicate=3), "parallel.replicate=3: does not divide the 8 processes"),
        (dict(world=8, replicate=2, shard=3), "parallel.shard=3: .* leave 4"),
        (dict(world=8, expert=3), "parallel.expert=3: does not divide parallel.shard=8; 1, 2, 4 or 8 would"),
        (dict(world=8, replicate=2, expert=8), "parallel.expert=8: does not divide parallel.shard=4; 1, 2 or 4 would"),
        (
            dict(world=10, expert=2, model=ModelConfig(dim=6, n_heads=1, expert_dim=9)),
            "parallel.expert=2: model.dim=6 and model.expert_dim=9 do not .* 5 ranks .*; 1, 5 or 10 would do",
        ),
        (dict(world=2, expert=2, model=ModelConfig(moe_every=0)), "parallel.expert=2: the model has no experts"),
    ],
)
def test_degrees_that_do_not_fit_are_refused_with_those_that_would(keys, message):
    with pytest.raises(MeshError, match=message) as error:
        of(**keys)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "expert, better, percent",
    [(1, None, 0), (8, None, 3), (6, 8, 16), (24, 8, 55), (48, 8, 55)],
)
def test_a_waste_above_a_tenth_is_told_with_the_better_degree(expert, better, percent):
    line = advice(World(0, 48, 0, 8), SCOUT, Degrees(1, 48, expert))
    if better is None:
        assert line is None
    else:
        assert f"{percent}% more than needed" in line and f"parallel.expert={better} would" in line


def test_some_rank_may_own_no_expert():
    assert of(8, expert=8, model=ModelConfig(n_experts=3)) == Degrees(1, 8, 8)
    assert [ExpertPlacement(5, 4).owned(r) for r in range(4)] == [2, 2, 1, 0]
