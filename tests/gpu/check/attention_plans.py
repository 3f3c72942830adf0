"""What cuDNN's attention costs if each call has a new shape, as in generation and evaluation.

cuDNN makes a plan for each new shape. If that takes much longer than the other kernels need for a shape, evaluation and
samples must disable cuDNN.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from tests.gpu.check.compare import synchronize
from tests.gpu.check.runner import Check
from tests.gpu.check.speed import cudnn_attention

SHAPES = 20
HEADS, HEAD_DIM = 8, 96


def run(check: Check) -> None:
    check.case("with cuDNN", partial(_measure, check, "with cuDNN", True))
    check.case("without cuDNN", partial(_measure, check, "without cuDNN", False))


def _measure(check: Check, name: str, enabled: bool) -> None:
    with cudnn_attention(enabled):
        check.report.measure(
            name,
            allowed=int(torch.backends.cuda.cudnn_sdp_enabled()),
            ms_a_query=_ms_per_shape(check.device, lambda length: 1),
            ms_a_row=_ms_per_shape(check.device, lambda length: length),
        )


def _ms_per_shape(device: torch.device, queries: Callable[[int], int]) -> float:
    """Mean milliseconds of one forward over SHAPES new shapes; `queries` gives the number of queries for a length."""
    _attend(device, queries(299), 299)  # the first call loads the library
    synchronize(device)
    start = time.perf_counter()
    for length in range(300, 300 + SHAPES):
        _attend(device, queries(length), length)
    synchronize(device)
    return 1e3 * (time.perf_counter() - start) / SHAPES


def _attend(device: torch.device, queries: int, length: int) -> torch.Tensor:
    q = torch.randn(1, HEADS, queries, HEAD_DIM, device=device, dtype=torch.bfloat16)
    k = torch.randn(1, HEADS, length, HEAD_DIM, device=device, dtype=torch.bfloat16)
    return F.scaled_dot_product_attention(q, k, k, is_causal=queries > 1)
