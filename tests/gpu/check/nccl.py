"""FSDP2, the exchange of rows and recomputation in a world of one rank, against the model that is not wrapped.

One GPU is enough to run every collective over NCCL, though nothing travels: what fails on eight often fails here.
"""

from functools import partial

import torch

from tests.gpu.check import parity, project
from tests.gpu.check.project import StepNumbers
from tests.gpu.check.runner import Check

MODES = ("none", "selective", "full")
CASES = {"rows": parity.Case([]), "documents": parity.Case([], documents=True)}
# The same kernels on the same bf16 weights. Gradients of norms are rounded to bf16 under FSDP before they are summed,
# which the others are anyway: 2^-9 of a number; atomic additions as in `parity.AGAIN`.
LIMITS = parity.AGAIN


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
