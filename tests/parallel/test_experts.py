"""Expert parallelism: placement, the exchange on real processes, the order of its events, and its bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.experts import ExpertPlacement
from tests.support import parallel_cases as cases

CASES = "tests.support.parallel_cases:"


@given(st.integers(1, 200), st.integers(1, 64))
def test_experts_are_placed_as_torch_chunk_does(n_experts, ranks):
    placement = ExpertPlacement(n_experts, ranks)
    owned = [placement.owned(r) for r in range(ranks)]
    chunks = [len(c) for c in torch.arange(n_experts).chunk(ranks)]
    assert owned == chunks + [0] * (ranks - len(chunks))
    loads = torch.arange(1, n_experts + 1)
    by_rank = placement.by_rank(loads)
    assert by_rank.shape == (ranks, placement.slots) and torch.equal(by_rank.flatten()[:n_experts], loads)
    assert int(by_rank.sum()) == int(loads.sum())
    assert placement.padding_ratio == pytest.approx(placement.slots * ranks / n_experts)


@st.composite
def traffic(draw):
    """The rows (ranks, E) of each rank for each expert, many of them 0, and the padding rows of each rank."""
    ranks, n_experts = draw(st.integers(2, 4)), draw(st.integers(1, 9))
    rows = st.sampled_from([0, 0, 0, 1, 2, 7])
    counts = draw(st.lists(st.lists(rows, min_size=n_experts, max_size=n_experts), min_size=ranks, max_size=ranks))
    return counts, draw(st.lists(st.integers(0, 3), min_size=ranks, max_size=ranks))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(traffic(), st.sampled_from(["float64", "float32"]), st.booleans())
def test_exchange_equals_all_experts_on_one_rank(pool, traffic, dtype, overlap):
    """Results and all gradients are the same, and no transfer is left in flight."""
    counts, padding = traffic
    keys = dict(counts=counts, padding=padding, dtype=dtype, overlap=overlap)
    for differences, all_finished in pool.run(len(counts), CASES + "exchange", **keys):
        assert max(differences) < (1e-11 if dtype == "float64" else 1e-3) and all_finished


FORWARD = ["dispatch start", "up", "dispatch finish", "combine start", "down", "combine finish"]
BACKWARD = ["combine start", "down", "combine finish", "experts", "dispatch start", "up", "dispatch finish"]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("overlap", [True, False])
def test_shared_expert_runs_while_rows_are_in_flight(pool, mode, overlap):
    """In the backward, too. Without overlap each transfer is done when its start returns."""
    for seen, done in pool.run(2, CASES + "moe_events", mode=mode, overlap=overlap):
        assert seen == [*FORWARD, "backward", *BACKWARD] and len(done) == 4
        assert overlap or all(done)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_recomputation_repeats_no_message(pool, mode):
    """A layer has five all-to-alls in each micro-batch: counts, and two each of dispatch and combine."""
    keys = dict(expert=2, recompute=mode, moe_every=1)
    for messages, _, _ in pool.run(2, CASES + "count_messages", **keys):
        assert messages["alltoall_base_"] == 2 * 3 * 5


@pytest.mark.parametrize("mode", ["none", "full"])
def test_host_waits_only_for_the_splits_of_the_exchange(pool, mode):
    """With grouped products, as on CUDA in bf16. Operations that wait on CUDA are recognized by their names here."""
    assert pool.run(2, CASES + "operations_that_wait", mode=mode) == [([], 1)] * 2


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_keeps_the_choice_of_experts(pool, mode):
    for equal, used in pool.run(2, CASES + "recomputation_keeps_choice", mode=mode):
        assert equal and used == 1


@pytest.mark.slow
@pytest.mark.parametrize("world, expert", [(2, 2), (4, 2), (4, 4)])
def test_bytes_sent_are_those_of_the_documented_formula(pool, world, expert):
    """The formula of docs/parallel.md, for two micro-batches, one reduction, and blocks that are FSDP units.

    The routers' weights, which every rank holds in full, are not gathered.
    """
    micro_batches, dim, ranks = 2, cases.SMALL["dim"], world
    expert_shard = world // expert
    placement = ExpertPlacement(cases.SMALL["n_experts"], expert)
    results = pool.run(world, CASES + "count_messages", expert=expert)
    loads = torch.tensor([r[2] for r in results])  # (ranks, layers, E)
    blocks = others = experts = 0  # numbers in the FSDP units of blocks, of the others, and in experts
    for name, p in cases.build()[0].named_parameters():
        if ".router." in name:
            continue
        if ".experts." in name:
            experts += placement.slots * p[0].numel()
            continue
        padded = -(-p.shape[0] // ranks) * ranks * p[0].numel()  # dim 0 is cut into equal parts
        if name.startswith("blocks"):
            blocks += padded
        else:
            others += padded
    gathered = micro_batches * (2 * blocks + others) * (ranks - 1) // ranks
    reduced = (blocks + others) * (ranks - 1) // ranks
    gathered += micro_batches * 2 * experts * (expert_shard - 1) // expert_shard
    reduced += experts * (expert_shard - 1) // expert_shard
    for rank, (_, seen, _) in enumerate(results):
        rank_in_group = rank % expert
        first = rank - rank_in_group
        rows = placement.by_rank(loads[first : first + expert]).sum((1, 3))  # (source rank, rank of the expert)
        to_others = int(rows[rank_in_group].sum() - rows[rank_in_group, rank_in_group])
        from_others = int(rows[:, rank_in_group].sum() - rows[rank_in_group, rank_in_group])
        counts = loads.shape[1] * micro_batches * (expert - 1) * placement.slots * 8
        assert seen["alltoall_base_"] == 2 * (to_others + from_others) * dim * 4 + counts
        assert seen["_allgather_base_"] == 4 * gathered and seen["_reduce_scatter_base_"] == 4 * reduced


@pytest.mark.slow
@pytest.mark.parametrize("to", [0, 4])
@pytest.mark.parametrize("world, keys", [(2, {"expert": 2}), (4, {"expert": 4}), (4, {"expert": 2, "top_k": 1})])
def test_one_expert_can_receive_all_tokens(pool, world, keys, to):
    """The other experts receive none, and neither do the ranks that hold only those."""
    for rank, (loads, finite) in enumerate(pool.run(world, CASES + "send_all_tokens_to_one_expert", to=to, **keys)):
        expected = [0] * cases.SMALL["n_experts"]
        expected[to] = 32 if rank < world - 1 else 0
        assert loads == [expected] and finite


def test_each_rank_holds_its_slots_of_the_whole_weight(pool):
    name = "blocks.1.feed_forward.experts.gate_up"
    for found in pool.run(4, CASES + "expert_shapes", expert=4, n_experts=31):
        assert found[name] == ((8, 16, 40), (31, 16, 40))
    for found in pool.run(4, CASES + "expert_shapes", expert=2, n_experts=31):
        assert found[name] == ((16, 8, 40), (31, 16, 40))
