"""Attention within documents and chunks: what a token sees, by every implementation, without S x S numbers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from model import segments
from model.attention import Attention
from model.config import ModelConfig
from model.context import ForwardContext
from model.segments import FlexSegments, SegmentGroups
from model.transformer import Transformer
from tests.support.configs import SMALL_MODEL, SMALL_VOCAB, fp64_model


def row(lengths):
    """(documents, positions) of a row that holds stories of these lengths, (1, S) each."""
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    return documents[None], torch.cat([torch.arange(n) for n in lengths])[None]


def pack(rows):
    documents, positions = zip(*map(row, rows), strict=True)
    return torch.cat(documents), torch.cat(positions)


def stories(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(4, SMALL_VOCAB, (1, n), generator=g) for n in lengths]


def masked(q, k, v, numbers):
    """Attention with a boolean mask: q, k, v (B, S, heads, head_dim), numbers (B, S) of the segments."""
    causal = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    mask = (numbers[:, :, None] == numbers[:, None, :]) & causal
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True).transpose(1, 2)


def fused(q, k, v, causal):
    assert causal
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def heads(batch, length, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, h, 4, generator=g, dtype=dtype).requires_grad_() for h in (4, 2, 2)]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), length=st.integers(1, 90), batch=st.integers(1, 3), slack=st.sampled_from([1, 16]))
def test_segment_groups_equal_a_boolean_mask(data, length, batch, slack):
    """For any lengths, with all gradients. Each token has one place, and padding is limited."""
    begins = st.lists(st.booleans(), min_size=length, max_size=length)
    starts = torch.tensor(data.draw(st.lists(begins, min_size=batch, max_size=batch)))
    starts[:, 0] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "MAX_PADDING_TOKENS", slack)
        groups = SegmentGroups(starts, torch.device("cpu"))
    places = sum(n * size for n, size in groups.shapes)
    assert sum(n for n, _ in groups.shapes) == starts.sum()
    assert places <= starts.numel() / segments.MIN_LENGTH_RATIO + slack * starts.sum()
    if groups.token_at is None:
        assert places == starts.numel() and len(groups.shapes) == 1
    else:
        assert torch.equal(groups.token_at[groups.padded_index], torch.arange(starts.numel()))
    qkv = heads(batch, length)
    direction = torch.randn(batch, length, 4, 4, dtype=torch.float64)
    out, expected = groups.attend(*qkv, fused), masked(*qkv, starts.cumsum(1))
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad((out * direction).sum(), qkv)
    torch.testing.assert_close(grads, torch.autograd.grad((expected * direction).sum(), qkv))


@pytest.mark.parametrize("length, view", [(7, True), (8, True), (9, False), (16, True), (30, False)])
def test_chunks_that_divide_the_row_need_no_copy(length, view):
    model, tokens = fp64_model(), torch.cat(stories([length, length])).view(2, length)
    context = ForwardContext.create(model.config, model.embedding(tokens))
    assert context.full_mask is None
    if length <= 8:
        assert context.chunked_mask is None
    else:
        assert (context.chunked_mask.token_at is None) == view
    documents, positions = pack([[length], [length]])
    torch.testing.assert_close(model(tokens).logits, model(tokens, None, positions, documents).logits)


LENGTHS = [[19, 12, 3, 1, 20], [1, 40, 8, 6], [55]]


def test_stories_of_a_row_are_independent():
    """Their logits and gradients, with chunks, temperature tuning, and experts."""
    model, (documents, positions) = fp64_model(), pack(LENGTHS)
    parts = [stories(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    tokens = torch.cat([torch.cat(p, 1) for p in parts])
    logits = model(tokens, None, positions, documents).logits
    expected = torch.cat([model(story).logits[0] for p in parts for story in p])
    torch.testing.assert_close(logits.flatten(0, 1), expected, rtol=0, atol=1e-9)
    loss = model(tokens, tokens, positions, documents).loss
    grads = torch.autograd.grad(loss, list(model.parameters()))
    sum_of_losses = sum(model(story, story).loss for p in parts for story in p)
    torch.testing.assert_close(grads, torch.autograd.grad(sum_of_losses, list(model.parameters())))


def test_stories_of_a_row_are_independent_in_fp32():
    model, (documents, positions) = fp64_model().float(), pack(LENGTHS)
    model.compute_dtype = torch.float32
    parts = [stories(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    logits = model(torch.cat([torch.cat(p, 1) for p in parts]), None, positions, documents).logits
    expected = torch.cat([model(story).logits[0] for p in parts for story in p])
    torch.testing.assert_close(logits.flatten(0, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_story_does_not_affect_the_others(dropout, dtype):
    """Bitwise, in forward and backward, on RoPE layers (with chunks) and on NoPE layers."""
    config = ModelConfig(**{**SMALL_MODEL, "attention_dropout": dropout})
    documents, positions = row(LENGTHS[0])
    changed, others = slice(19, 31), [*range(19), *range(31, 55)]
    for number in (0, 3):
        layer, results = Attention(config, number).to(dtype), []
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(1))
        for seed in (1, 2):
            x = torch.randn(1, 55, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
            x[:, changed] = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
            x.requires_grad_()
            torch.manual_seed(0)  # of attention dropout
            places = dict(positions=positions, documents=documents, attention_dropout=dropout > 0)
            out = layer(x, ForwardContext.create(config, x, **places))
            (grad,) = torch.autograd.grad(out.square().sum(), x)
            results.append((out[:, others], grad[:, others], out[:, changed]))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
        assert not torch.equal(results[0][2], results[1][2])


def test_dropout_with_documents_drops_weights():
    model, (documents, positions) = fp64_model(attention_dropout=0.5), pack([[30, 25]])
    tokens = torch.cat(stories([30, 25]), 1)
    first, second = (model(tokens, None, positions, documents).logits for _ in range(2))
    assert not torch.equal(first, second)
    plain = fp64_model().eval()(tokens, None, positions, documents).logits
    torch.testing.assert_close(model.eval()(tokens, None, positions, documents).logits, plain)


class Sizes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_tensor_has_the_square_of_the_row_length(dropout):
    """In forward and backward of 512 tokens of stories. The largest tensor is that of the logits."""
    config = ModelConfig(**{**SMALL_MODEL, "max_seq_len": 512, "attention_chunk": 50, "attention_dropout": dropout})
    model = Transformer(config, SMALL_VOCAB)
    model.init_weights(0)
    documents, positions = pack([[100, 90, 120, 1, 80, 121]])
    tokens = torch.zeros_like(documents)
    with Sizes() as seen:
        model(tokens, tokens, positions, documents).loss.backward()
    assert seen.largest <= max(512 * SMALL_VOCAB, 4 * 4 * 121**2) < 512**2


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
def test_flex_segments_equal_a_boolean_mask(monkeypatch):
    """The mask and the call, uncompiled. The compiled version for CUDA has never run."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    monkeypatch.setattr(segments, "_flex_functions", lambda: (create_block_mask, flex_attention))
    numbers = torch.stack([torch.arange(150) // n for n in (37, 150)])
    starts = torch.cat([torch.ones(2, 1, dtype=torch.bool), numbers.diff() > 0], 1)
    qkv = [t.detach() for t in heads(2, 150, dtype=torch.float32)]
    torch.testing.assert_close(FlexSegments(starts).attend(*qkv, fused), masked(*qkv, numbers))


def test_a_cpu_uses_segment_groups_for_any_dtype():
    starts = torch.ones(1, 3, dtype=torch.bool)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert isinstance(segments.segment_mask(starts, torch.zeros(1, dtype=dtype), False), SegmentGroups)
