"""The operations of a step: on a GPU each is a kernel launch, and each number that the host reads is a wait."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import loss
from model.attention import has_flash
from model.config import ModelConfig
from model.grouped import clear_idle, has_grouped_kernel, leaves_idle_gradients
from model.random import SITES, sequence_keys, site_keys
from model.transformer import Transformer

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
A100, L4, T4, H100, B200, RTX = (8, 0), (8, 9), (7, 5), (9, 0), (10, 0), (12, 0)
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "is_nonzero", "equal")


class Operations(TorchDispatchMode):
    """Counts operations that are not views, and records those for whose result the host would wait."""

    def __init__(self):
        super().__init__()
        self.count, self.waits = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        first = func._schema.returns[0] if func._schema.returns else None
        if first is None or first.alias_info is None or first.alias_info.is_write:
            self.count += 1
        if name.removeprefix("aten::") in WAITS:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def step(n_layers, **keys):
    """The operations of the forward and of the backward of a micro-batch with dropout."""
    shape = dict(dim=32, n_heads=2, expert_dim=32, n_experts=8, max_seq_len=32, dropout=0.1, nope_every=0)
    config = ModelConfig(n_layers=n_layers, **{**shape, **keys})
    model = Transformer(config, 50)
    model.init_weights(0)
    model.train()
    tokens = torch.randint(0, 50, (4, 32), generator=torch.Generator().manual_seed(0))
    rng_keys = site_keys(sequence_keys(0, 0, torch.arange(4)), n_layers)
    with Operations() as forward:
        out = model(tokens, tokens, rng_keys=rng_keys)
    with Operations() as backward:
        (out.loss + out.penalty).backward()
    return forward, backward


def test_number_of_operations_of_a_layer():
    """At most 135 in the forward and 75 in the backward, uncompiled; about 60 of them draw the masks of dropout."""
    (two, two_back), (four, four_back) = step(2), step(4)
    assert (four.count - two.count) / 2 <= 135
    assert (four_back.count - two_back.count) / 2 <= 75


@pytest.mark.parametrize("keys", [{}, {"top_k": 2, "aux_loss_weight": 0.01, "z_loss_weight": 0.01}])
def test_host_does_not_wait_for_the_device(keys):
    forward, backward = step(2, **keys)
    assert forward.waits == backward.waits == []


def test_keys_of_all_layers_need_as_many_operations_as_of_one():
    counts = []
    for n_layers in (1, 48):
        with Operations() as operations:
            assert site_keys(torch.arange(4), n_layers).shape == (n_layers + 1, SITES, 4)
        counts.append(operations.count)
    assert counts[0] == counts[1] < 40


def test_chunks_of_logits_fill_a_gpu_and_are_even():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert loss.tokens_per_chunk(16384, 32000, cpu) == 256
    assert loss.tokens_per_chunk(16384, 32000, gpu) == 4096  # four chunks; 2^27 logits would be 4,194 rows
    assert loss.tokens_per_chunk(100, 32000, gpu) == 100
    for tokens in (1, 4195, 16384, 16385, 99999):
        rows = loss.tokens_per_chunk(tokens, 32000, gpu)
        chunks = -(-tokens // rows)
        assert rows * 32000 <= 1 << 27 and rows * chunks - tokens < chunks


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_another_function_can_compute_the_chunk_gradient(dtype):
    """As a compiled one does. The gradient of rows that do not count may have any value."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(600, 16, generator=g).to(dtype), torch.randn(50, 16, generator=g).to(dtype)
    targets = torch.randint(0, 50, (600,), generator=g)
    targets[::5] = loss.IGNORE
    calls, results = [], []

    def other(logits, targets):
        calls.append(len(logits))
        part, gradient = loss.chunk_gradient(logits, targets)
        return part, gradient.masked_fill((targets == loss.IGNORE)[:, None], 7.0)

    for gradient in (None, other):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = loss.linear_cross_entropy(h, w, targets, gradient)
        (out * 0.37).backward()
        results.append((out, h.grad, w.grad))
    assert sum(calls) == 600
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("scale", [1.0, 1.003, 1 / 3])
def test_scale_of_the_loss_is_not_rounded_to_bf16(scale):
    """1.003 is 1 in bf16. The gradient is rounded once, after the product."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 16, generator=g).bfloat16(), torch.randn(50, 16, generator=g).bfloat16()
    targets, grads = torch.randint(0, 50, (64,), generator=g), []
    for factor in (1.0, torch.tensor(scale)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        (loss.linear_cross_entropy(h, w, targets) * factor).backward()
        grads.append(h.grad)
    assert torch.equal(grads[1], (grads[0].float() * scale).bfloat16())


@pytest.mark.parametrize(
    "capability, grouped, flash",
    [
        (T4, False, False),
        (A100, False, True),
        (L4, False, True),
        (RTX, False, True),
        (H100, True, True),
        (B200, True, True),
    ],
)
def test_kernels_are_chosen_by_compute_capability(capability, grouped, flash):
    assert has_grouped_kernel(BF16, capability) == grouped
    assert not has_grouped_kernel(FP32, capability) and not has_grouped_kernel(FP16, capability)
    assert has_flash(BF16, capability) == has_flash(FP16, capability) == flash
    assert not has_flash(FP32, capability)
    assert leaves_idle_gradients(capability) == (capability == B200)


def test_gradients_of_idle_experts_are_cleared():
    gradient = torch.full((4, 2, 3), 5.0)
    clear_idle(gradient, torch.tensor([0, 3, 3, 4], dtype=torch.int32))
    assert gradient[:, 0, 0].tolist() == [0, 5, 0, 5]
