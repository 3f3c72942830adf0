"""Random numbers are functions of their keys alone, and look random."""

from unittest import mock

import pytest
import torch

from model import random
from model.random import SITES, dropout, fold, initial_normal, normal, random_bytes, sequence_keys, site_keys


def test_initial_values_are_the_same_in_any_window():
    whole = initial_normal(3, "blocks.0.x", (6, 8, 4), 0.5, [(0, 6), (0, 8), (0, 4)])
    for window in ([(2, 5), (0, 8), (0, 4)], [(0, 6), (4, 8), (1, 3)], [(6, 6), (0, 8), (0, 4)]):
        cut = tuple(slice(a, b) for a, b in window)
        assert torch.equal(initial_normal(3, "blocks.0.x", (6, 8, 4), 0.5, window), whole[cut])
    assert abs(whole.std() - 0.5) < 0.1
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, initial_normal(4, "blocks.0.x", (6, 8, 4), 0.5, [(0, 6), (0, 8), (0, 4)]))
    assert not torch.equal(whole, initial_normal(3, "blocks.1.x", (6, 8, 4), 0.5, [(0, 6), (0, 8), (0, 4)]))


def test_keys_differ_by_everything_they_depend_on():
    index = torch.arange(1000)
    keys = [sequence_keys(s, t, index) for s in (0, 1) for t in (0, 1)]
    keys += [fold(keys[0], site) for site in (0, 1, 2)]
    assert len(torch.cat(keys).unique()) == 7 * 1000


def test_dropout_of_a_sequence_does_not_depend_on_its_batch():
    x = torch.randn(8, 16, 12)
    keys = sequence_keys(0, 5, torch.arange(8))
    whole = dropout(x, 0.1, keys)
    for i in range(8):
        assert torch.equal(dropout(x[i : i + 1], 0.1, keys[i : i + 1])[0], whole[i])
    assert torch.equal(dropout(x, 0.1, keys), whole)
    assert not torch.equal(dropout(x, 0.1, fold(keys, 4)), whole)
    assert dropout(x, 0.1, None) is x


def test_dropout_has_its_probability_and_keeps_the_mean():
    keys = sequence_keys(1, 2, torch.arange(64))
    out = dropout(torch.ones(64, 4096), 0.1, keys)
    share = (out == 0).double().mean()
    assert abs(share - 26 / 256) < 0.002  # in steps of 1/256
    assert abs(out.double().mean() - 1) < 0.003


def test_random_bytes_look_random():
    b = random_bytes(sequence_keys(0, 0, torch.arange(256)), 4096).double()
    counts = torch.bincount(b.flatten().long(), minlength=256).double()
    expected = b.numel() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 400  # chi-square, 255 degrees of freedom
    x = (b - b.mean()) / b.std()
    rows = (x @ x.t() / 4096 - torch.eye(256)).abs().max()  # sequences against each other
    shifted = (x[:, 1:] * x[:, :-1]).mean().abs()
    assert rows < 0.1 and shifted < 0.01


def test_normal_numbers_are_normal_and_depend_on_their_key():
    x = normal(torch.arange(40), 5000)
    assert x.isfinite().all() and abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert abs((x.abs() < 1).float().mean() - 0.6827) < 0.01 and 4 < x.abs().max() < 6
    assert torch.equal(normal(torch.tensor([7]), 5000)[0], x[7])
    assert abs(torch.corrcoef(x).fill_diagonal_(0)).max() < 0.08


def test_large_weights_are_drawn_in_blocks_of_rows(monkeypatch):
    """At most a block is drawn at a time, each window has the values of the whole, and rows differ."""
    monkeypatch.setattr(random, "BLOCK_NUMBERS", 12)  # three rows of four numbers
    shape = (10, 4)
    drawn, draw = [], random._normal
    monkeypatch.setattr(random, "_normal", lambda place, shape, std: (drawn.append(shape), draw(place, shape, std))[1])
    whole = initial_normal(3, "x", shape, 0.5, [(0, 10), (0, 4)])
    assert whole.shape == shape and len(whole.unique()) == 40 and max(rows for rows, _ in drawn) == 3
    for window in ([(2, 7), (0, 4)], [(9, 10), (1, 3)], [(3, 3), (0, 4)], [(0, 10), (2, 2)]):
        cut = tuple(slice(a, b) for a, b in window)
        assert torch.equal(initial_normal(3, "x", shape, 0.5, window), whole[cut])
    drawn.clear()
    initial_normal(3, "x", shape, 0.5, [(3, 6), (0, 4)])
    assert drawn == [(3, 4)]


def test_keys_of_all_sites_are_those_folded_one_by_one():
    keys = sequence_keys(5, 9, torch.tensor([0, 3, 1 << 40]))
    table = site_keys(keys, 2)
    assert table.shape == (3, SITES, 3)
    for site in range(SITES):
        assert torch.equal(table[0, site], fold(keys, site))
        for layer in (1, 2):
            assert torch.equal(table[layer, site], fold(fold(keys, layer), site))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from modules that torch.compile imports
def test_compiled_dropout_draws_the_same_numbers():
    """It computes them byte by byte, because a kernel cannot view words as bytes."""
    keys, x = sequence_keys(1, 2, torch.arange(3)), torch.randn(3, 37, 5)
    with mock.patch.object(torch._inductor.config, "compile_threads", 1):
        assert torch.equal(torch.compile(dropout)(x, 0.1, keys), dropout(x, 0.1, keys))
