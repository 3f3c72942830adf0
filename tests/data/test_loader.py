import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import IGNORE, BatchLayout, Loader, Order, Rows
from data.settings import UserError
from data.shards import Corpus


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 5))
def test_an_epoch_visits_each_row_once(n, seed, epoch):
    rows = Order(seed, n)(np.arange(epoch * n, (epoch + 1) * n))
    assert sorted(rows.tolist()) == list(range(n))


def test_order_does_not_change_between_versions():
    epochs = [8, 6, 5, 3, 1, 0, 4, 2, 7, 9, 9, 7, 2, 5, 3, 0, 6, 1, 8, 4]
    assert Order(7, 10)(np.arange(20)).tolist() == epochs
    large = [203464818549, 170663037966, 996274769694, 172573442232]  # beyond 32 bits
    assert Order(2**40, 10**12)(np.array([0, 1, 10**12, 5 * 10**13])).tolist() == large


def test_orders_differ_by_seed_and_epoch():
    first, second = Order(0, 1000)(np.arange(2000)).reshape(2, -1)
    assert (first != second).mean() > 0.9
    assert (Order(1, 1000)(np.arange(1000)) != first).mean() > 0.9
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.1


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 70), micro=st.integers(1, 20), world=st.integers(1, 9))
def test_any_global_batch_is_split_over_any_world(size, micro, world):
    layout = BatchLayout(size, micro, world)
    ranks = [layout.indices(rank) for rank in range(world)]
    batches = [batch for rank in ranks for batch in rank]
    indices = [index for batch in batches for index in batch]
    assert [index for index in indices if index is not None] == list(range(size))
    assert {len(rank) for rank in ranks} == {layout.micro_batches}
    assert {len(batch) for batch in batches} == {layout.rows} and layout.rows <= micro
    assert indices.count(None) == layout.padding_rows
    assert layout.padding_rows < world * layout.micro_batches + world  # no more than rounding needs


@pytest.fixture(scope="module")
def split(corpus_dir):
    return Corpus.open(corpus_dir).split("train")


@pytest.fixture(scope="module")
def stories(split):
    """All stories of the split as lists of ids, bos and eos included."""
    shards = [split.shard(i) for i in range(len(split.shards))]
    assert len(shards) > 1
    return [s.tokens[a:b].tolist() for s in shards for a, b in zip(s.starts, s.starts[1:], strict=False)]


BOS, EOS, PAD = 1, 2, 0


def loader(split, size=12, micro=5, rank=0, world=1, seq_len=32, pack=True, **keys):
    rows = Rows(split, seq_len, pack, BOS, PAD, keys.pop("mask_documents", False))
    return Loader(rows, BatchLayout(size, micro, world), seed=3, rank=rank, **keys)


def global_batch(split, step, world, micro, **keys):
    """Tokens and targets of all ranks in the order of the global batch, without padding rows."""
    steps = [loader(split, rank=rank, world=world, micro=micro, **keys).step(step) for rank in range(world)]
    batches = [batch for rank_step in steps for batch in rank_step.micro_batches]
    index = torch.cat([batch.index for batch in batches])
    is_real = index < 12
    assert index[is_real].tolist() == list(range(12))
    assert all((batch.targets[batch.index == 12] == IGNORE).all() for batch in batches)
    tokens = torch.cat([batch.tokens for batch in batches])[is_real]
    targets = torch.cat([batch.targets for batch in batches])[is_real]
    assert {rank_step.real_tokens for rank_step in steps} == {int((targets != IGNORE).sum())}
    return tokens, targets


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("world, micro", [(1, 5), (2, 1), (3, 2), (5, 12), (12, 3)])
def test_the_global_batch_is_the_same_at_any_world(split, pack, world, micro):
    for step in (0, 7, 1000):
        expected = global_batch(split, step, 1, 12, pack=pack)
        found = global_batch(split, step, world, micro, pack=pack)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_packed_rows_are_the_concatenated_stories(split):
    rows = Rows(split, 32, True, BOS, PAD)
    shard = split.shard(0)
    for row in (0, 1, 5):
        assert rows.read(row).tolist() == shard.tokens[row * 32 : row * 32 + 33].tolist()
    first_of_second = (len(shard.tokens) - 1) // 32
    assert rows.read(first_of_second).tolist() == split.shard(1).tokens[:33].tolist()
    batch = rows.batch(list(range(12)), list(range(12)))
    shifted = torch.from_numpy(np.stack([rows.read(i) for i in range(12)]).astype(np.int64))[:, 1:]
    assert torch.equal(batch.targets, shifted.masked_fill(shifted == BOS, IGNORE))
    assert (batch.targets == IGNORE).any() and (batch.targets == EOS).any()


def test_an_epoch_trains_on_each_target_once(split, stories):
    """Over an epoch of packed rows every token after bos is a target once, except at the ends of shards."""
    rows = Rows(split, 32, True, BOS, PAD)
    real_tokens = rows.real_tokens(np.arange(len(rows)))
    targets = sum(len(story) - 1 for story in stories)
    assert targets - 32 * len(split.shards) <= real_tokens <= targets


def test_without_packing_each_row_is_one_story(split, stories):
    seq_len = sorted(len(s) for s in stories)[len(stories) // 2]  # half of them are truncated, half padded
    rows = Rows(split, seq_len, False, BOS, PAD)
    assert len(rows) == len(stories)
    batch = rows.batch([0, 1, None, len(stories) - 1], [0, 1, 9, 2])
    for i, story in ((0, stories[0]), (1, stories[1]), (3, stories[-1])):
        row = story[: seq_len + 1]
        assert batch.tokens[i, : len(row) - 1].tolist() == row[:-1]
        assert batch.targets[i, : len(row) - 1].tolist() == row[1:]
        assert (batch.targets[i, len(row) - 1 :] == IGNORE).all()
    assert (batch.targets[2] == IGNORE).all()
    assert rows.batch([0], [0], trim=True).tokens.shape[1] == min(seq_len, len(stories[0]) - 1)


def test_documents_and_positions_restart_at_each_story(split):
    batch = loader(split, size=64, micro=64, mask_documents=True).step(0).micro_batches[0]
    assert batch.documents.max() >= 1
    for tokens, documents, positions in zip(batch.tokens, batch.documents, batch.positions, strict=True):
        start = 0
        for i, token in enumerate(tokens.tolist()):
            start = i if token == BOS else start
            assert positions[i] == i - start
            assert documents[i] == (tokens[: i + 1] == BOS).sum()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_threads_do_not_change_the_steps(split, workers):
    threaded = loader(split, workers=workers)
    steps = list(threaded.steps(4, 11))
    assert len(steps) == 7
    for number, step in enumerate(steps, start=4):
        expected = threaded.step(number)
        assert step.real_tokens == expected.real_tokens
        for a, b in zip(step.micro_batches, expected.micro_batches, strict=True):
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)


def test_a_corpus_too_small_for_a_step_is_refused(split):
    rows = len(Rows(split, 32, True, BOS, PAD))
    with pytest.raises(UserError, match=f"train.global_batch_size={rows + 1}: the corpus holds {rows} rows"):
        loader(split, size=rows + 1)


def test_rows_beyond_4_gib_are_read(tmp_path):
    """Rows of a sparse shard of 2^31 tokens and more; nothing in the arithmetic is 32-bit."""

    class Shard:
        tokens = np.memmap(tmp_path / "sparse", np.uint16, "w+", shape=(2**31 + 1000,))
        starts = np.array([0, 2**31 + 1000])

    class Info:
        tokens, documents = 2**31 + 1000, 1

    class Split:
        shards = [Info()]

        def shard(self, number):
            return Shard

    Shard.tokens[2**31 + 10] = 77
    rows = Rows(Split(), 100, True, BOS, PAD)
    assert 77 in rows.read((2**31 + 10) // 100).tolist()
    assert len(rows) == (2**31 + 999) // 100
