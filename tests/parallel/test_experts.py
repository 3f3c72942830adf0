"""Experts over ranks: who owns whom, the exchange on real processes, its order of events, and its bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.experts import ExpertPlacement
from tests.support import parallel_cases as cases

CASES = "tests.support.parallel_cases:"


@given(st.integers(1, 200), st.integers(1, 64))
def test_owners_are_those_of_torch_chunk(n_experts, ranks):
    owners = ExpertPlacement(n_experts, ranks)
    owned = [owners.owned(r) for r in range(ranks)]
    chunks = [len(c) for c in torch.arange(n_experts).chunk(ranks)]
    assert owned == chunks + [0] * (ranks - len(chunks))
    loads = torch.arange(1, n_experts + 1)
    by_rank = owners.by_rank(loads)
    assert by_rank.shape == (ranks, owners.slots) and torch.equal(by_rank.flatten()[:n_experts], loads)
    assert int(by_rank.sum()) == int(loads.sum()) and owners.padding_ratio == pytest.approx(
        owners.slots * ranks / n_experts
    )


@st.composite
def traffic(draw):
    """Ranks, the rows that each has for each expert, and those for nobody: from none at all to all for one."""
    ranks, n_experts = draw(st.integers(2, 4)), draw(st.integers(1, 9))
    few = st.sampled_from([0, 0, 0, 1, 2, 7])
    counts = draw(st.lists(st.lists(few, min_size=n_experts, max_size=n_experts), min_size=ranks, max_size=ranks))
    return counts, draw(st.lists(st.integers(0, 3), min_size=ranks, max_size=ranks))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(traffic(), st.sampled_from(["float64", "float32"]), st.booleans())
def test_rows_meet_their_experts_and_come_home(pool, traffic, dtype, overlap):
    """Results and all gradients as if every expert lived at home."""
    counts, nobodys = traffic
    keys = dict(counts=counts, nobodys=nobodys, dtype=dtype, overlap=overlap)
    for differences, landed in pool.run(len(counts), CASES + "exchange", **keys):
        assert max(differences) < (1e-11 if dtype == "float64" else 1e-3) and landed


ORDER = ["out start", "widen", "out finish", "home start", "narrow", "home finish", "backward"]
ORDER += ["home start", "narrow", "home finish", "experts", "out start", "widen", "out finish"]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("overlap", [True, False])
def test_the_shared_expert_works_while_rows_travel(pool, mode, overlap):
    for told, done in pool.run(2, CASES + "events", mode=mode, overlap=overlap):
        assert told == ORDER and len(done) == 4
        assert overlap or all(done)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_recomputation_repeats_no_message(pool, mode):
    """A layer has five exchanges: counts, two ways out and two home, in each micro-batch."""
    keys = dict(expert=2, recompute=mode, moe_every=1)
    for messages, _, _ in pool.run(2, CASES + "wire", **keys):
        assert messages["alltoall_base_"] == 2 * 3 * 5


@pytest.mark.parametrize("mode", ["none", "full"])
def test_the_host_waits_for_the_sizes_alone(pool, mode):
    """Where products are grouped, as on CUDA in bf16; what waits there shows here too, by its name."""
    assert pool.run(2, CASES + "host_reads", mode=mode) == [([], 1)] * 2


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_keeps_the_choice(pool, mode):
    for equal, used in pool.run(2, CASES + "choice_is_kept", mode=mode):
        assert equal and used == 1


@pytest.mark.slow
@pytest.mark.parametrize("world, expert", [(2, 2), (4, 2), (4, 4)])
def test_bytes_on_the_wire_are_those_of_the_formula(pool, world, expert):
    """docs/parallel.md, for two micro-batches, reduced once, and blocks that are units of their own.

    The routers' weights, which every rank has, are not gathered.
    """
    micro_batches, dim, ranks, rest = 2, cases.SMALL["dim"], world, world // expert
    owners = ExpertPlacement(cases.SMALL["n_experts"], expert)
    results = pool.run(world, CASES + "wire", expert=expert)
    loads = torch.tensor([r[2] for r in results])  # (ranks, layers, E)
    blocks = others = experts = 0  # numbers in units
    for name, p in cases.build()[0].named_parameters():
        if ".router." in name:
            continue
        if ".experts." in name:
            experts += owners.slots * p[0].numel()
            continue
        padded = -(-p.shape[0] // ranks) * ranks * p[0].numel()  # dim 0 is cut into equal parts
        blocks, others = (blocks + padded, others) if name.startswith("blocks") else (blocks, others + padded)
    gathered = micro_batches * (2 * blocks + others) * (ranks - 1) // ranks
    reduced = (blocks + others) * (ranks - 1) // ranks
    gathered += micro_batches * 2 * experts * (rest - 1) // rest
    reduced += experts * (rest - 1) // rest
    for rank, (_, seen, _) in enumerate(results):
        place, group = rank % expert, slice(rank - rank % expert, rank - rank % expert + expert)
        by_owner = owners.by_rank(loads[group]).sum((1, 3))  # (source, owner)
        away = int(by_owner[place].sum() + by_owner[:, place].sum() - 2 * by_owner[place, place])
        counts = loads.shape[1] * micro_batches * (expert - 1) * owners.slots * 8
        assert seen["alltoall_base_"] == 2 * away * dim * 4 + counts
        assert seen["_allgather_base_"] == 4 * gathered and seen["_reduce_scatter_base_"] == 4 * reduced


@pytest.mark.slow
@pytest.mark.parametrize("to", [0, 4])
@pytest.mark.parametrize("world, keys", [(2, {"expert": 2}), (4, {"expert": 4}), (4, {"expert": 2, "top_k": 1})])
def test_one_expert_gets_all_tokens_and_some_ranks_none(pool, world, keys, to):
    for rank, (loads, finite) in enumerate(pool.run(world, CASES + "forced", to=to, **keys)):
        want = [0] * cases.SMALL["n_experts"]
        want[to] = 32 if rank < world - 1 else 0
        assert loads == [want] and finite


def test_each_rank_holds_its_slots_and_the_whole_is_known(pool):
    name = "blocks.1.feed_forward.experts.gate_up"
    for found in pool.run(4, CASES + "whole_experts", expert=4, n_experts=31):
        assert found[name] == ((8, 16, 40), (31, 16, 40))
    for found in pool.run(4, CASES + "whole_experts", expert=2, n_experts=31):
        assert found[name] == ((16, 8, 40), (31, 16, 40))
