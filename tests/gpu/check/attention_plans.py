"""A new shape with each call, as in generation and evaluation: what a plan of cuDNN's attention costs.

Where cuDNN takes much longer a shape than the others, evaluation and samples must do without it.
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
    for on in (True, False):
        name = "with cuDNN" if on else "without cuDNN"
        check.case(name, partial(_measure, check, name, on))


def _measure(check: Check, name: str, on: bool) -> None:
    with cudnn_attention(on):
        check.report.measure(
            name,
            allowed=int(torch.backends.cuda.cudnn_sdp_enabled()),
            ms_a_query=_ms_a_shape(check.device, lambda length: 1),
            ms_a_row=_ms_a_shape(check.device, lambda length: length),
        )


def _ms_a_shape(device: torch.device, queries: Callable[[int], int]) -> float:
    """Milliseconds of one forward, on average over shapes that were not seen before."""
    _attend(device, queries(299), 299)  # the first call ever loads the library
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
