import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ModelConfig
from model.moe import MoE, Router, Stay, can_group, grouped_product, router_statistics
from model.random import site_keys


def make(dtype=torch.float64, **keys):
    config = ModelConfig(**{"dim": 8, "n_heads": 2, "expert_dim": 12, "n_experts": 5, "n_layers": 1, **keys})
    moe = MoE(config).to(dtype)
    for p in moe.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    return moe


def by_token(moe, x, real):
    """The definition, one token at a time."""
    out = []
    for token, counts in zip(x.flatten(0, 1), real.flatten(), strict=True):
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
def test_equals_the_definition_token_by_token(n_experts, top_k, shared, seed, masked):
    moe = make(n_experts=n_experts, top_k=min(top_k, n_experts), shared_expert=shared)
    g = torch.Generator().manual_seed(seed)
    moe.router.bias.normal_(0, 0.2, generator=g)
    x = torch.randn(2, 7, 8, generator=g, dtype=torch.float64, requires_grad=True)
    real = torch.rand(2, 7, generator=g) >= masked
    weights = [x, *moe.parameters()]
    out, loads, _ = moe(x, real)
    want = by_token(moe, x, real)
    torch.testing.assert_close(out, want)
    direction = torch.randn(out.shape, generator=g, dtype=torch.float64)
    got = torch.autograd.grad((out * direction).sum(), weights, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad((want * direction).sum() + 0 * sum(w.sum() for w in weights), weights)
    torch.testing.assert_close(got, expected)
    assert loads.dtype == torch.int64 and int(loads.sum()) == int(real.sum()) * moe.router.top_k


@torch.no_grad()
@pytest.mark.parametrize("keys", [{}, {"top_k": 3}, {"shared_expert": False}])
def test_few_tokens_of_a_step_of_generation_get_what_the_definition_says(keys):
    moe = make(n_experts=31, **keys).eval()
    moe.router.bias.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    x = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for masked in (8, 3, 0):
        real = (torch.arange(8) >= masked).view(4, 2)
        out, loads, _ = moe(x, real)
        torch.testing.assert_close(out, by_token(moe, x, real))
        assert torch.equal(loads, moe.router(x.flatten(0, 1), real.flatten(), None).loads)


class Work(TorchDispatchMode):
    """Counts operations, and the numbers that they make."""

    calls = made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func._schema.returns[0].alias_info:  # no view
            self.calls, self.made = self.calls + 1, self.made + out.numel()
        return out


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_generation_does_the_same_work_with_more_experts(dtype):
    """All but the router's scores; no weight is cast but those of chosen experts."""
    done = []
    for n_experts in (7, 127):
        moe = make(torch.float32, n_experts=n_experts).eval()
        with Work() as work:
            moe(torch.ones(3, 1, 8, dtype=dtype), torch.ones(3, 1, dtype=torch.bool))
        done.append(work)
    few, many = done
    assert few.calls == many.calls > 10
    per_score = 3 * 3 + 2  # of three tokens, product, sigmoid and the like; loads
    assert few.made < many.made <= few.made + (127 - 7) * (per_score + 8)


def test_every_weight_gets_a_gradient_without_any_token():
    """An idle process must take part in the reduction of every weight."""
    moe = make(torch.float32)
    out, loads, _ = moe(torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool))
    out.sum().backward()
    assert int(loads.sum()) == 0
    assert all(p.grad is not None for p in moe.parameters())


def test_router_gets_a_gradient_with_top_1():
    moe = make()
    out, _, _ = moe(torch.randn(2, 3, 8, dtype=torch.float64), torch.ones(2, 3, dtype=torch.bool))
    out.square().sum().backward()
    assert moe.router.weight.grad.abs().max() > 0


def test_bias_changes_the_choice_and_not_the_score():
    router = Router(ModelConfig(dim=8, n_heads=2, n_experts=4))
    torch.nn.init.normal_(router.weight)
    x, real = torch.randn(20, 8), torch.ones(20, dtype=torch.bool)
    router.bias[2] = 100.0
    scores, experts, loads, _ = router(x, real, None)
    assert (experts == 2).all() and loads.tolist() == [0, 0, 20, 0]
    torch.testing.assert_close(scores[:, 0], (x @ router.weight[2]).sigmoid())


def test_router_decides_in_fp32_whatever_the_activations():
    router = Router(ModelConfig(dim=8, n_heads=2, n_experts=4))
    torch.nn.init.normal_(router.weight)
    with torch.no_grad():
        router.weight[1] = router.weight[0] * (1 + 1e-4)  # bf16 cannot tell the two apart
    x = torch.randn(50, 8).bfloat16()
    scores, experts, _, _ = router(x, torch.ones(50, dtype=torch.bool), None)
    assert scores.dtype == torch.float32
    exact = (x.double() @ router.weight.double().t()).argmax(-1)
    assert (experts[:, 0] == exact).all()


def test_padding_counts_in_no_load():
    moe = make(torch.float32)
    x, real = torch.randn(1, 10, 8), torch.zeros(1, 10, dtype=torch.bool)
    real[0, :3] = True
    _, padded, _ = moe(x, real)
    _, alone, _ = moe(x[:, :3], real[:, :3])
    assert torch.equal(padded, alone) and int(padded.sum()) == 3


@pytest.mark.parametrize("counts", [[0, 3, 2], [5, 0, 0], [0, 0, 5], [1, 0, 4], [0, 0, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_grouped_product_with_empty_groups(counts, dtype):
    rows, weight = torch.randn(sum(counts), 8, dtype=dtype), torch.randn(3, 8, 16, dtype=dtype)
    rows.requires_grad_(), weight.requires_grad_()
    out = grouped_product(rows, weight, torch.tensor(counts))
    out.sum().backward()  # an expanded gradient, which grouped_mm itself refuses
    want = torch.cat([r.detach().float() @ w.float() for r, w in zip(rows.split(counts), weight.detach(), strict=True)])
    torch.testing.assert_close(out.float(), want, rtol=2e-2, atol=2e-2)
    assert weight.grad.shape == weight.shape and rows.grad.shape == rows.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_are_nobodys_reach_no_weight(dtype):
    rows, weight = torch.randn(6, 8, dtype=dtype, requires_grad=True), torch.randn(2, 8, 16, dtype=dtype)
    weight.requires_grad_()
    out = grouped_product(rows, weight, torch.tensor([1, 3]))
    out.backward(torch.full_like(out, float("nan")).index_fill(0, torch.arange(4), 1.0))
    assert weight.grad.isfinite().all() and rows.grad[:4].isfinite().all()
    torch.testing.assert_close(out[:4], torch.cat([rows[:1] @ weight[0], rows[1:4] @ weight[1]]))


def test_odd_widths_take_the_loop():
    assert can_group(torch.float32, torch.device("cpu"), torch.Size((3, 8, 16)))
    assert not can_group(torch.float32, torch.device("cpu"), torch.Size((3, 5, 16)))
    assert not can_group(torch.float64, torch.device("cpu"), torch.Size((3, 8, 16)))
    rows, weight = torch.randn(4, 5), torch.randn(2, 5, 3)
    torch.testing.assert_close(grouped_product(rows, weight, torch.tensor([1, 3]))[1:], rows[1:] @ weight[1])


def test_the_seam_takes_the_rows_and_the_shared_expert_works_meanwhile():
    moe = make()
    x, real = torch.randn(2, 3, 8, dtype=torch.float64), torch.ones(2, 3, dtype=torch.bool)
    alone, _, _ = moe(x, real)
    events = []

    class Watched(Stay):
        def __init__(self, rows, loads):
            super().__init__(rows, loads)
            events.append(("out", len(rows), loads.tolist()))

        def arrive(self):
            events.append("arrive")
            return super().arrive()

        def send_back(self, rows):
            super().send_back(rows)
            events.append("back")

        def home(self):
            events.append("home")
            return super().home()

    def note(name, method):
        return lambda x: (events.append(name), method(x))[1]

    moe.exchange = Watched
    moe.shared.widen, moe.shared.narrow = note("widen", moe.shared.widen), note("narrow", moe.shared.narrow)
    through, loads, _ = moe(x, real)
    assert torch.equal(alone, through)
    assert events == [("out", 6, loads.tolist()), "widen", "arrive", "back", "narrow", "home"]


def test_statistics_are_those_of_the_definitions_and_leave_padding_out():
    """Entropy, (logsumexp)^2 and E sum_e f_e p_e, summed over real tokens, with the last two's gradient."""
    moe = make(aux_loss_weight=1.0)
    x, real = torch.randn(2, 9, 8, dtype=torch.float64), torch.rand(2, 9) < 0.6
    shares = torch.tensor([0.5, 0.2, 0.1, 0.2, 0.0], dtype=torch.float64)
    statistics = statistics_of(moe, x, real, shares)
    logits = x[real] @ moe.router.weight.t()
    p = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    want = [-(p * p.log()).sum(), logits.logsumexp(-1).square().sum(), 5 * (p @ shares).sum()]
    torch.testing.assert_close(statistics, torch.stack(want))
    got = torch.autograd.grad(statistics[1] + statistics[2], moe.router.weight)
    torch.testing.assert_close(got, torch.autograd.grad(want[1] + want[2], moe.router.weight))


def statistics_of(moe, x, real, shares):
    return router_statistics(moe(x, real)[2][None], real.flatten(), shares[None])[0]


def test_equal_experts_have_an_auxiliary_loss_of_one_and_very_low_scores_stay_finite():
    """No epsilon that scores could hide below."""
    moe = make(aux_loss_weight=1.0)
    torch.nn.init.zeros_(moe.router.weight)
    x, real = torch.randn(1, 6, 8, dtype=torch.float64), torch.ones(1, 6, dtype=torch.bool)
    uniform = torch.full((5,), 0.2, dtype=torch.float64)
    assert statistics_of(moe, x, real, uniform)[2].item() == pytest.approx(6)
    torch.nn.init.constant_(moe.router.weight, -1e4)
    statistics = statistics_of(moe, x.abs(), real, torch.eye(5, dtype=torch.float64)[0])
    assert statistics.isfinite().all()


def test_noise_belongs_to_training_and_to_its_place():
    """arXiv:1701.06538, equation 4: logits plus standard normal times softplus(x W_noise), and a gradient for it."""
    moe = make(noisy_top_k=True)
    x, real = torch.randn(3, 4, 8, dtype=torch.float64), torch.ones(3, 4, dtype=torch.bool)
    keys = site_keys(torch.arange(3), 1)[1]
    noisy, loads, _ = moe(x, real, keys)
    part, _, _ = moe(x[1:2], real[1:2], keys[:, 1:2])
    torch.testing.assert_close(part, noisy[1:2])
    noisy.sum().backward()
    assert moe.router.noise.grad.abs().max() > 0
    other, _, _ = moe(x, real, keys + 7)
    assert not torch.equal(other, noisy)
    moe.eval()
    quiet, _, _ = moe(x, real, keys)
    assert torch.equal(quiet, moe(x, real)[0]) and not torch.equal(quiet, noisy)
