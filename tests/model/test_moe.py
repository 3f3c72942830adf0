"""The mixture of experts equals its definition, token by token; routing, grouped products and the exchange."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ModelConfig
from model.context import ForwardContext
from model.exchange import LocalExchange, ReceivedRows
from model.grouped import can_group, grouped_matmul
from model.moe import MoE, Router, router_statistics
from model.random import site_keys

SMALL = {"dim": 8, "n_heads": 2, "expert_dim": 12, "n_experts": 5, "n_layers": 1}


def make(dtype=torch.float64, **keys):
    moe = MoE(ModelConfig(**{**SMALL, **keys}), 0).to(dtype)
    for p in moe.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    return moe


def run(moe, x, is_real=None, rng_keys=None):
    """The MoE's outputs, loads and logits; without is_real all tokens are real."""
    return moe(x, ForwardContext.create(ModelConfig(**SMALL), x, is_real=is_real, rng_keys=rng_keys))


def by_token(moe, x, is_real):
    """The definition, one token at a time."""
    out = []
    for token, counts in zip(x.flatten(0, 1), is_real.flatten(), strict=True):
        y = torch.zeros_like(token)
        if moe.shared is not None:
            gate, up = (moe.shared.gate_up @ token).chunk(2)
            y = y + moe.shared.down @ (F.silu(gate) * up)
        logits = moe.router.weight @ token
        for e in (logits.sigmoid() + moe.router.bias).topk(moe.router.top_k).indices if counts else []:
            sent = token * logits[e].sigmoid()
            gate, up = (sent @ moe.experts.gate_up[e]).chunk(2)
            y = y + (F.silu(gate) * up) @ moe.experts.down[e]
        out.append(y)
    return torch.stack(out).view_as(x)


@settings(max_examples=40, deadline=None)
@given(
    n_experts=st.integers(1, 6),
    top_k=st.integers(1, 3),
    shared=st.booleans(),
    seed=st.integers(0, 50),
    masked=st.sampled_from([0.0, 0.4, 1.0]),
)
def test_moe_equals_the_definition_token_by_token(n_experts, top_k, shared, seed, masked):
    moe = make(n_experts=n_experts, top_k=min(top_k, n_experts), shared_expert=shared)
    g = torch.Generator().manual_seed(seed)
    moe.router.bias.normal_(0, 0.2, generator=g)
    x = torch.randn(2, 7, 8, generator=g, dtype=torch.float64, requires_grad=True)
    is_real = torch.rand(2, 7, generator=g) >= masked
    weights = [x, *moe.parameters()]
    out, loads, _ = run(moe, x, is_real)
    definition = by_token(moe, x, is_real)
    torch.testing.assert_close(out, definition)
    direction = torch.randn(out.shape, generator=g, dtype=torch.float64)
    got = torch.autograd.grad((out * direction).sum(), weights, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad((definition * direction).sum() + 0 * sum(w.sum() for w in weights), weights)
    torch.testing.assert_close(got, expected)
    assert loads.dtype == torch.int64 and int(loads.sum()) == int(is_real.sum()) * moe.router.top_k


@torch.no_grad()
@pytest.mark.parametrize("keys", [{}, {"top_k": 3}, {"shared_expert": False}])
def test_a_step_of_generation_equals_the_definition(keys):
    moe = make(n_experts=31, **keys).eval()
    moe.router.bias.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    x = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for masked in (8, 3, 0):
        is_real = (torch.arange(8) >= masked).view(4, 2)
        out, loads, _ = run(moe, x, is_real)
        torch.testing.assert_close(out, by_token(moe, x, is_real))
        assert torch.equal(loads, moe.router(x.flatten(0, 1), is_real.flatten(), None).loads)


class Work(TorchDispatchMode):
    """Counts operations, and the numbers that they compute."""

    calls = numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func._schema.returns[0].alias_info:  # no view
            self.calls += 1
            self.numbers += out.numel()
        return out


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_does_no_more_work_with_more_experts(dtype):
    """Except for the router's scores. Only the weights of chosen experts are cast."""
    done = []
    for n_experts in (7, 127):
        moe = make(torch.float32, n_experts=n_experts).eval()
        with Work() as work:
            run(moe, torch.ones(3, 1, 8, dtype=dtype))
        done.append(work)
    small, large = done
    assert small.calls == large.calls > 10
    per_score = 3 * 3 + 2  # product, sigmoid and similar operations of three tokens; loads
    assert small.numbers < large.numbers <= small.numbers + (127 - 7) * (per_score + 8)


def test_every_weight_gets_a_gradient_without_any_token():
    """A process without tokens must take part in the reduction of every gradient."""
    moe = make(torch.float32)
    out, loads, _ = run(moe, torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool))
    out.sum().backward()
    assert int(loads.sum()) == 0
    assert all(p.grad is not None for p in moe.parameters())


def test_router_gets_a_gradient_with_top_1():
    moe = make()
    out, _, _ = run(moe, torch.randn(2, 3, 8, dtype=torch.float64))
    out.square().sum().backward()
    assert moe.router.weight.grad.abs().max() > 0


def test_bias_changes_the_choice_but_not_the_score():
    router = Router(ModelConfig(dim=8, n_heads=2, n_experts=4))
    torch.nn.init.normal_(router.weight)
    x, is_real = torch.randn(20, 8), torch.ones(20, dtype=torch.bool)
    router.bias[2] = 100.0
    scores, experts, loads, _ = router(x, is_real, None)
    assert (experts == 2).all() and loads.tolist() == [0, 0, 20, 0]
    torch.testing.assert_close(scores[:, 0], (x @ router.weight[2]).sigmoid())


def test_router_decides_in_fp32_if_activations_are_bf16():
    router = Router(ModelConfig(dim=8, n_heads=2, n_experts=4))
    torch.nn.init.normal_(router.weight)
    with torch.no_grad():
        router.weight[1] = router.weight[0] * (1 + 1e-4)  # in bf16 both are equal
    x = torch.randn(50, 8).bfloat16()
    scores, experts, _, _ = router(x, torch.ones(50, dtype=torch.bool), None)
    assert scores.dtype == torch.float32
    exact = (x.double() @ router.weight.double().t()).argmax(-1)
    assert (experts[:, 0] == exact).all()


def test_padding_is_not_counted_in_loads():
    moe = make(torch.float32)
    x, is_real = torch.randn(1, 10, 8), torch.zeros(1, 10, dtype=torch.bool)
    is_real[0, :3] = True
    _, with_padding, _ = run(moe, x, is_real)
    _, without_padding, _ = run(moe, x[:, :3])
    assert torch.equal(with_padding, without_padding) and int(with_padding.sum()) == 3


@pytest.mark.parametrize("counts", [[0, 3, 2], [5, 0, 0], [0, 0, 5], [1, 0, 4], [0, 0, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_grouped_matmul_accepts_empty_groups(counts, dtype):
    rows, weight = torch.randn(sum(counts), 8, dtype=dtype), torch.randn(3, 8, 16, dtype=dtype)
    rows.requires_grad_(), weight.requires_grad_()
    out = grouped_matmul(rows, weight, torch.tensor(counts))
    out.sum().backward()  # an expanded gradient, which grouped_mm itself refuses
    groups = zip(rows.detach().split(counts), weight.detach(), strict=True)
    expected = torch.cat([group.float() @ matrix.float() for group, matrix in groups])
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
    assert weight.grad.shape == weight.shape and rows.grad.shape == rows.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_rows_have_no_effect_on_gradients(dtype):
    rows, weight = torch.randn(6, 8, dtype=dtype, requires_grad=True), torch.randn(2, 8, 16, dtype=dtype)
    weight.requires_grad_()
    out = grouped_matmul(rows, weight, torch.tensor([1, 3]))
    out.backward(torch.full_like(out, float("nan")).index_fill(0, torch.arange(4), 1.0))
    assert weight.grad.isfinite().all() and rows.grad[:4].isfinite().all()
    torch.testing.assert_close(out[:4], torch.cat([rows[:1] @ weight[0], rows[1:4] @ weight[1]]))


def test_widths_that_no_kernel_supports_use_a_loop():
    assert can_group(torch.float32, torch.device("cpu"), torch.Size((3, 8, 16)))
    assert not can_group(torch.float32, torch.device("cpu"), torch.Size((3, 5, 16)))
    assert not can_group(torch.float64, torch.device("cpu"), torch.Size((3, 8, 16)))
    rows, weight = torch.randn(4, 5), torch.randn(2, 5, 3)
    torch.testing.assert_close(grouped_matmul(rows, weight, torch.tensor([1, 3]))[1:], rows[1:] @ weight[1])


def test_shared_expert_runs_between_start_and_wait():
    """The exchange receives the rows and loads; a half of the shared expert runs beside each of its transfers."""
    moe = make()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    expected, loads, _ = run(moe, x)
    events = []

    class Watched:
        """The handle of a transfer that records when it is waited for."""

        def __init__(self, name, handle):
            self.name, self.handle = name, handle

        def wait(self):
            events.append(f"{self.name} wait")
            return self.handle.wait()

    class WatchedExchange(LocalExchange):
        def dispatch(self, rows, loads):
            events.append(("dispatch", len(rows), loads.tolist()))
            return Watched("dispatch", super().dispatch(rows, loads))

        def combine(self, outputs, dispatched):
            events.append("combine")
            assert isinstance(dispatched.handle.result, ReceivedRows)
            return Watched("combine", super().combine(outputs, dispatched))

    def watched(name, method):
        def call(x):
            events.append(name)
            return method(x)

        return call

    moe.exchange = WatchedExchange()
    moe.shared.project_up = watched("up", moe.shared.project_up)
    moe.shared.project_down = watched("down", moe.shared.project_down)
    out, _, _ = run(moe, x)
    assert torch.equal(out, expected)
    start = ("dispatch", 6, loads.tolist())
    assert events == [start, "up", "dispatch wait", "combine", "down", "combine wait"]


def test_router_statistics_equal_their_definitions():
    """Entropy, (logsumexp)^2 and E sum_e f_e p_e, summed over real tokens, and the gradients of the last two."""
    moe = make(aux_loss_weight=1.0)
    x, is_real = torch.randn(2, 9, 8, dtype=torch.float64), torch.rand(2, 9) < 0.6
    load_shares = torch.tensor([0.5, 0.2, 0.1, 0.2, 0.0], dtype=torch.float64)
    statistics = statistics_of(moe, x, is_real, load_shares)
    logits = x[is_real] @ moe.router.weight.t()
    p = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    entropy = -(p * p.log()).sum()
    z_loss = logits.logsumexp(-1).square().sum()
    aux_loss = 5 * (p @ load_shares).sum()
    torch.testing.assert_close(statistics, torch.stack([entropy, z_loss, aux_loss]))
    got = torch.autograd.grad(statistics[1] + statistics[2], moe.router.weight)
    torch.testing.assert_close(got, torch.autograd.grad(z_loss + aux_loss, moe.router.weight))


def statistics_of(moe, x, is_real, load_shares):
    _, _, logits = run(moe, x, is_real)
    return router_statistics(logits[None], is_real.flatten(), load_shares[None])[0]


def test_equal_experts_have_an_auxiliary_loss_of_one():
    moe = make(aux_loss_weight=1.0)
    torch.nn.init.zeros_(moe.router.weight)
    x, is_real = torch.randn(1, 6, 8, dtype=torch.float64), torch.ones(1, 6, dtype=torch.bool)
    uniform = torch.full((5,), 0.2, dtype=torch.float64)
    assert statistics_of(moe, x, is_real, uniform)[2].item() == pytest.approx(6)  # 1 for each of 6 tokens


def test_router_statistics_of_very_low_scores_are_finite():
    """They contain no epsilon that such scores could be below."""
    moe = make(aux_loss_weight=1.0)
    torch.nn.init.constant_(moe.router.weight, -1e4)
    x, is_real = torch.rand(1, 6, 8, dtype=torch.float64), torch.ones(1, 6, dtype=torch.bool)
    statistics = statistics_of(moe, x, is_real, torch.eye(5, dtype=torch.float64)[0])
    assert statistics.isfinite().all()


def test_router_noise_depends_on_its_key_and_only_in_training():
    """arXiv:1701.06538, equation 4: logits plus standard normal times softplus(x W_noise), and a gradient for it."""
    moe = make(noisy_top_k=True)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    rng_keys = site_keys(torch.arange(3), 1)
    noisy, _, _ = run(moe, x, rng_keys=rng_keys)
    second_row, _, _ = run(moe, x[1:2], rng_keys=rng_keys[..., 1:2])
    torch.testing.assert_close(second_row, noisy[1:2])
    noisy.sum().backward()
    assert moe.router.noise.grad.abs().max() > 0
    other, _, _ = run(moe, x, rng_keys=rng_keys + 7)
    assert not torch.equal(other, noisy)
    moe.eval()
    in_evaluation, _, _ = run(moe, x, rng_keys=rng_keys)
    without_keys, _, _ = run(moe, x)
    assert torch.equal(in_evaluation, without_keys) and not torch.equal(in_evaluation, noisy)
