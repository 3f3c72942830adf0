"""Compares FSDP2, the exchange of rows and recomputation in a world of one rank with the model without FSDP.

One GPU is enough to run every collective over NCCL, although no data is sent: a fault on eight GPUs often appears here.
"""

from functools import partial

import torch

from tests.gpu.check import parity, project
from tests.gpu.check.project import StepNumbers
from tests.gpu.check.runner import Check

MODES = ("none", "selective", "full")
CASES = {"rows": parity.Case([]), "documents": parity.Case([], documents=True)}
# The same kernels compute with the same bf16 weights. FSDP rounds gradients of norms to bf16 before it sums them, as
# all other gradients are rounded anyway: 2^-9 of a number. Atomic additions have the effect described at
# `parity.SAME_KERNELS`.
LIMITS = parity.SAME_KERNELS


def run(check: Check) -> None:
    plain: dict[str, StepNumbers] = {}
    for name, case in CASES.items():
        plain[name] = parity.numbers(case, check.device, torch.bfloat16)
    with project.one_rank_world(check.device) as mesh:
        for name in CASES:
            for mode in MODES:
                label = f"{name}, recompute={mode}"
                check.case(label, partial(_check, check, label, CASES[name], mode, mesh, plain[name]))


def _check(check: Check, label: str, case: parity.Case, mode: str, mesh: project.Mesh, plain: StepNumbers) -> None:
    found = parity.numbers(case, check.device, torch.bfloat16, mode, mesh=mesh)
    parity.judge(check, label, found, plain, LIMITS)
