"""A lower bound of the device's time: the bytes, products and launches of each operation.

An operation needs at least the time for its bytes at BYTES_PER_SECOND, for its products at FLOPS (FLOPS_FP32 in
float32), and SECONDS_PER_LAUNCH for each launch; the largest of the three counts. The sum over the operations is a
lower bound if no data stays in a cache between two operations, and no two operations run at the same time. A dispatch
mode sees ATen's operations. Compiled operations do not pass through it. They are counted when they are launched: for
Inductor's kernels with Inductor's own number of bytes that a kernel reads and writes, for Triton's kernels with the
sizes of the tensors that a kernel receives. Messages are not included.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tests.gpu.sim import report

BYTES_PER_SECOND = 2.8e12  # an H100 reaches this much of its nominal 3.35e12
FLOPS = 5e14  # products in bfloat16 per second, of nominally 9.9e14
FLOPS_FP32 = 4.5e13
SECONDS_PER_LAUNCH = 2.5e-6

ROOT = Path(__file__).parents[3]
PACKAGES = tuple(str(ROOT / name) + "/" for name in ("model", "parallel", "trainer"))
AUTOGRAD = "autograd"  # the place of operations that no function of the project calls
aten = torch.ops.aten
WRITE_ONLY = {aten.copy_, aten.zero_, aten.fill_}  # do not read the tensor that they change
GATHER = {aten.index_select, aten.gather, aten.embedding, aten.index}  # read as much as they return
SCATTER = {aten.scatter_, aten.scatter_add_, aten.index_fill_}  # change as many elements as their index has

FORMULAS = {aten._grouped_mm: lambda a, b, *rest, **options: 2 * a.shape[0] * a.shape[1] * b.shape[-1], **flop_registry}

Measure = Callable[[Any, Any, Any], tuple[str, float, float]]  # kernel, args, options -> name, bytes, flops


@dataclass
class Cost:
    """The cost of one operation at one place in the project: sums over its calls."""

    phase: str
    place: str  # file and function
    name: str  # of the operation or kernel
    launches: int = 0
    bytes: float = 0
    flops: float = 0
    seconds: float = 0


class Roofline(TorchDispatchMode):
    """Adds up costs while it is active; the recorder sets `phase`."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.costs: dict[tuple[str, str, str], Cost] = {}
        self._attributed = 0  # launches that are part of a cost
        self._replaced: list[tuple[Any, Callable[..., Any]]] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # otherwise compiled functions would run uncompiled

    def __enter__(self) -> "Roofline":
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner
        from triton.runtime.jit import JITFunction

        launchers: list[tuple[Any, Measure]] = [(CachingAutotuner, _inductor_kernel), (JITFunction, _triton_kernel)]
        for launcher, measure in launchers:
            self._replaced.append((launcher, launcher.run))
            launcher.run = self._measured(launcher.run, measure)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        while self._replaced:
            launcher, run = self._replaced.pop()
            launcher.run = run

    def _measured(self, run: Callable[..., Any], measure: Measure) -> Callable[..., Any]:
        def measured(kernel: Any, *args: Any, **options: Any) -> Any:
            before, inside = report.launches(), self._attributed
            result = run(kernel, *args, **options)
            if launches := report.launches() - before - (self._attributed - inside):
                name, size, flops = measure(kernel, args, options)
                self.add(name, launches, size, flops, FLOPS)
            return result

        return measured

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before, inside = report.launches(), self._attributed
        out = func(*args, **kwargs)
        if launches := report.launches() - before - (self._attributed - inside):
            dtypes = {t.dtype for t in tree_leaves(args) if isinstance(t, Tensor)}
            is_half = dtypes & {torch.bfloat16, torch.float16}  # the sums may have a wider dtype than the factors
            rate = FLOPS if is_half else FLOPS_FP32
            flops = flops_of(func, args, kwargs, out)
            self.add(str(func._overloadpacket), launches, bytes_of(func, args, kwargs, out), flops, rate)
        return out

    def add(self, name: str, launches: int, size: float, flops: float, rate: float) -> None:
        """Add an operation that moves `size` bytes and computes `flops` operations at `rate` per second."""
        self._attributed += launches
        key = (self.phase, place(), name)
        cost = self.costs.setdefault(key, Cost(*key))
        cost.launches += launches
        cost.bytes += size
        cost.flops += flops
        cost.seconds += max(size / BYTES_PER_SECOND, flops / rate, SECONDS_PER_LAUNCH * launches)

    def add_unattributed(self, launches: int) -> None:
        """Add those of the phase's `launches` that are not part of any cost yet."""
        known = sum(cost.launches for cost in self.costs.values() if cost.phase == self.phase)
        if launches > known:
            self.add("unknown", launches - known, 0, 0, FLOPS)


def place() -> str:
    """The innermost function of the project on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGES):
            return f"{name[len(str(ROOT)) + 1 :]} {frame.f_code.co_qualname}"
        frame = frame.f_back  # type: ignore[assignment]
    return AUTOGRAD


def size_of(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors that are on a device. An expanded tensor has less storage than its shape suggests."""
    local = (getattr(t, "_local_tensor", t) for t in tensors if isinstance(t, Tensor))
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in local if t.is_cuda)


def bytes_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """The bytes that an operation reads and writes."""
    packet, schema = func._overloadpacket, func._schema
    read, changed = [], []
    for argument, value in zip(schema.arguments, args, strict=False):
        leaves = tree_leaves(value)
        written = argument.alias_info is not None and argument.alias_info.is_write
        changed += leaves if written else []
        read += leaves if not written or packet not in WRITE_ONLY else []
    for argument in schema.arguments:
        if argument.name in kwargs:
            written = argument.alias_info is not None and argument.alias_info.is_write
            (changed if written else read).extend(tree_leaves(kwargs[argument.name]))
    results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    fresh = [t for t in results if not any(t is c for c in changed)]
    if packet in GATHER:
        return size_of(read[1:]) + 2 * size_of(fresh)
    if packet in SCATTER:
        return 2 * size_of(read[1:]) + size_of(read[1:2])
    return size_of(read) + size_of(changed) + size_of(fresh)


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    formula = FORMULAS.get(func._overloadpacket)
    if formula is None:
        return 0.0
    args = [
        a for a in args if not isinstance(a, torch.dtype)
    ]  # the dtype of the result, which the formulas do not accept
    flops = float(formula(*args, **kwargs, out_val=out))
    return flops / 2 if "scaled_dot_product" in str(func) else flops  # causal attention needs half of the scores


def _inductor_kernel(kernel: Any, args: Any, options: Any) -> tuple[str, float, float]:
    size = kernel.inductor_meta.get("kernel_num_gb")
    return (
        f"inductor {kernel.inductor_meta.get('kernel_name', kernel.fn.__name__)}",
        size_of(args) if size is None else 1e9 * size,
        float(kernel.inductor_meta.get("kernel_flop") or 0),
    )


def _triton_kernel(kernel: Any, args: Any, options: Any) -> tuple[str, float, float]:
    return f"triton {kernel.fn.__name__}", size_of([*args, *options.values()]), 0.0
