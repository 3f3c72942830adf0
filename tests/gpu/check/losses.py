"""Compares the built-in loss and Liger's loss with full logits in fp64 (value and gradients), and measures the time."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gpu.check import project
from tests.gpu.check.compare import milliseconds, relative_change, relative_error
from tests.gpu.check.report import Limit, at_most
from tests.gpu.check.runner import Check

# Logits are products in bf16, summed in fp32 and rounded to bf16: the error is at most 2^-9 of a logit, which is about
# 4, and averages out in a sum over thousands of tokens. Gradients are rounded to bf16 twice, as probabilities and as
# results; the softmax adds an error of 2^-9 times its logits.
LIMITS: dict[str, Limit] = {"loss": at_most(1e-3), "to_hidden": at_most(0.02), "to_weight": at_most(0.02)}
# By how much the reference's loss per token may exceed log(vocabulary), the loss of a uniform guess: the logits are
# random and small.
ABOVE_UNIFORM_LOSS: Limit = (0.0, 1.0)
LOSS_FACTOR = 1e-3  # the loss is multiplied by it, as training divides the loss by the number of tokens


def run(check: Check) -> None:
    tokens, dim, vocab = (4096, 768, 32000) if check.on_gpu else (300, 64, 2000)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=generator).bfloat16().to(check.device)
    weight = (torch.randn(vocab, dim, generator=generator) * 0.03).bfloat16().to(check.device)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[::7] = project.IGNORE
    counted = int((targets != project.IGNORE).sum())
    targets = targets.to(check.device)
    expected = _results(_reference, hidden.double(), weight.double(), targets)
    uniform_loss = math.log(vocab)
    low, high = ABOVE_UNIFORM_LOSS
    # The reference is checked, too, because the device's fp64 could be wrong.
    per_token = float(expected[0]) / counted
    check.report.check("reference", {"loss_a_token": (uniform_loss + low, uniform_loss + high)}, loss_a_token=per_token)
    liger, why = project.liger_loss(check.device)
    for name, loss in (("built-in", project.linear_cross_entropy), ("Liger", liger)):
        if loss is None:
            check.report.skip(name, why or "not available")
        else:
            check.case(name, partial(_check, check, name, loss, (hidden, weight, targets), expected))


def _check(
    check: Check,
    name: str,
    loss: project.Loss,
    inputs: tuple[Tensor, Tensor, Tensor],
    expected: tuple[Tensor, Tensor, Tensor],
) -> None:
    value, to_hidden, to_weight = _results(loss, *inputs)
    figures = {
        "loss": relative_change(float(value), float(expected[0])),
        "to_hidden": relative_error(to_hidden, expected[1]),
        "to_weight": relative_error(to_weight, expected[2]),
        "ms": milliseconds(lambda: _results(loss, *inputs), check.device, 5),
    }
    check.report.check(name, LIMITS, **figures)


def _results(loss: project.Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    value = loss(hidden, weight, targets)
    (value * LOSS_FACTOR).backward()
    assert hidden.grad is not None and weight.grad is not None
    return value.detach(), hidden.grad, weight.grad


def _reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), targets, ignore_index=project.IGNORE, reduction="sum")
