"""Matrix multiplications of rows with one matrix for each group of rows: those of the experts.

Letters: R rows, G groups (experts), I inputs and O outputs of a matrix.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.precision import cast, copies_are_kept


def grouped_matmul(rows: Tensor, weight: Tensor, counts: Tensor, host_counts: list[int] | None = None) -> Tensor:
    """rows (R, I) sorted by group, weight (G, I, O), counts (G,) of rows per group -> (R, O).

    Rows beyond the sum of counts are padding: they cost nothing, and their results are undefined. host_counts are the
    same numbers as counts, if the host knows them. Without them, and if no grouped kernel exists, the host waits for
    the device.
    """
    weight = cast(weight, rows.dtype)
    if can_group(rows.dtype, rows.device, weight.shape):
        ends = counts.cumsum(0).to(torch.int32)
        return _GroupedMatmul.apply(rows, weight, ends)
    if host_counts is None:
        host_counts = counts.tolist()
    padding = rows.shape[0] - sum(host_counts)
    groups = rows.split([*host_counts, padding])
    outputs = [group @ matrix for group, matrix in zip(groups, weight.unbind(0), strict=False)]  # without the padding
    return torch.cat([*outputs, rows.new_zeros(padding, weight.shape[2])])


def per_row_matmul(rows: Tensor, weight: Tensor, groups: list[int]) -> Tensor:
    """rows (R, I) in any order, weight (G, I, O), groups (R,) with G for no group -> (R, O), zero for no group.

    For few rows: only the matrices of the rows' groups are read and cast.
    """
    if copies_are_kept():
        weight = cast(weight, rows.dtype)
    outputs = []
    for row, group in zip(rows.split(1), groups, strict=True):
        if group < len(weight):
            outputs.append(row @ weight[group].to(row.dtype))
        else:
            outputs.append(rows.new_zeros(1, weight.shape[2]))
    return torch.cat(outputs)


def can_group(dtype: torch.dtype, device: torch.device, *shapes: torch.Size) -> bool:
    """Whether `grouped_mm` has a kernel for weights of these shapes. It needs rows of a multiple of 16 bytes."""
    if dtype not in (torch.float32, torch.bfloat16) or torch.compiler.is_compiling():
        return False
    if device.type == "cuda" and not has_grouped_kernel(dtype, torch.cuda.get_device_capability(device)):
        return False
    return all(size * dtype.itemsize % 16 == 0 for shape in shapes for size in shape[1:])


def has_grouped_kernel(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether a CUDA device of this compute capability has a kernel: in bf16 Hopper, and Blackwell's sm_10x.

    On other devices `grouped_mm` copies the offsets to the host in each call, and loops.
    """
    return dtype == torch.bfloat16 and capability[0] in (9, 10)


def leaves_idle_gradients(capability: tuple[int, int]) -> bool:
    """Whether the weight gradient of an empty group may be left uninitialized.

    CUTLASS before 4.3 does so on sm_100 (NVIDIA/cutlass#2674, pytorch/pytorch#172439).
    """
    return capability[0] == 10


def clear_idle(gradient: Tensor, ends: Tensor) -> None:
    """Zero the gradient (G, I, O) of empty groups; ends (G,) is the end of each group's rows."""
    is_idle = ends.diff(prepend=ends.new_zeros(1)) == 0
    gradient.masked_fill_(is_idle[:, None, None], 0)


class _GroupedMatmul(torch.autograd.Function):
    """grouped_mm, whose own backward refuses gradients that broadcast, such as those of a sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        rows = rows.contiguous()
        ctx.save_for_backward(rows, weight, ends)
        return F.grouped_mm(rows, weight, offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight, ends = ctx.saved_tensors
        # `contiguous` returns an empty tensor as it is, but grouped_mm checks the strides of empty tensors, too.
        grad = grad.contiguous() if grad.numel() else grad.new_empty(grad.shape)
        grad_rows, grad_weight = None, None
        if ctx.needs_input_grad[0]:
            grad_rows = F.grouped_mm(grad, weight.transpose(1, 2), offs=ends)
        if ctx.needs_input_grad[1]:
            grad_weight = F.grouped_mm(rows.t(), grad, offs=ends)
            if grad.is_cuda and leaves_idle_gradients(torch.cuda.get_device_capability()):
                clear_idle(grad_weight, ends)
        return grad_rows, grad_weight, None
