"""The loss in chunks equals torch's cross-entropy, and never holds the logits of all tokens."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model import loss
from model.loss import IGNORE, linear_cross_entropy


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 40),
    vocab=st.integers(2, 30),
    dim=st.integers(1, 9),
    rows=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_loss_equals_the_cross_entropy_of_torch(tokens, vocab, dim, rows, seed):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, dim, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    targets[torch.rand(tokens, generator=g) < 0.3] = IGNORE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_TOKENS", rows)
        patch.setattr(loss, "CHUNK_LOGITS", {"cpu": 0})
        ours = linear_cross_entropy(hidden, weight, targets)
        got = torch.autograd.grad(ours * 0.7, (hidden, weight))
    plain = F.cross_entropy(hidden @ weight.t(), targets, ignore_index=IGNORE, reduction="sum")
    expected = torch.autograd.grad(plain * 0.7, (hidden, weight))
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(got, expected)


def test_a_second_backward_through_a_graph_raises_an_error():
    """The first backward has scaled the gradients in place."""
    hidden, weight = (torch.randn(n, 4, requires_grad=True) for n in (9, 5))
    total = linear_cross_entropy(hidden, weight, torch.arange(9) % 5) * 0.7
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    before = [g.clone() for g in first]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, (hidden, weight))
    assert all(torch.equal(*pair) for pair in zip(first, before, strict=True))


def test_gradient_of_the_head_is_scaled_without_a_copy():
    tokens, vocab, dim = 16, 4096, 64
    hidden, weight = torch.randn(tokens, dim, requires_grad=True), torch.randn(vocab, dim, requires_grad=True)
    total = linear_cross_entropy(hidden, weight, torch.zeros(tokens, dtype=torch.int64))
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        total.backward()
    assert max(e.cpu_memory_usage for e in profile.events()) < vocab * dim * 4


def test_loss_never_holds_the_logits_of_all_tokens():
    tokens, vocab, dim = 8192, 32000, 8
    hidden, weight = torch.randn(tokens, dim, requires_grad=True), torch.randn(vocab, dim, requires_grad=True)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    # torch 2.11 warns without acc_events.
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        linear_cross_entropy(hidden[:1024], weight, torch.zeros(1024, dtype=torch.int64)).backward()
    largest = max(e.cpu_memory_usage for e in profile.events())
    assert largest < 1024 * vocab * 4 / 2


def test_loss_is_the_same_without_gradients():
    hidden, weight, targets = torch.randn(9, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 4, 0, IGNORE, 2, 1])
    plain = F.cross_entropy(hidden @ weight.t(), targets, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), plain)


def test_gradients_in_bf16_are_close_to_fp32():
    hidden, weight = torch.randn(64, 16), torch.randn(50, 16)
    targets = torch.randint(0, 50, (64,))
    low = [t.bfloat16().requires_grad_() for t in (hidden, weight)]
    high = [t.detach().float().requires_grad_() for t in low]
    linear_cross_entropy(*low, targets).backward()
    linear_cross_entropy(*high, targets).backward()
    for a, b in zip(low, high, strict=True):
        assert a.grad.dtype == torch.bfloat16
        assert (a.grad.float() - b.grad).norm() < 0.02 * b.grad.norm()
