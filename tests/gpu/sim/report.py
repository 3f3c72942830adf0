"""Reads the counters of the simulated GPU from the stand-in for libcudart that is preloaded into this process."""

import ctypes
import functools
from typing import NamedTuple


class Count(NamedTuple):
    """How often something happened, and how many bytes it moved in total."""

    number: int
    bytes: int


Counts = dict[str, Count]  # "kernel NAME", "copy WAY", "memset", "wait CALL", "message KIND of RANKS", "call NAME", ...


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libcudart.so.13")
    library.sim_report.restype = library.sim_launches.restype = ctypes.c_long
    return library


def launches() -> int:
    """Kernels, copies and memsets since the process started."""
    return int(_library().sim_launches())


def reset() -> None:
    _library().sim_reset()


def counts() -> Counts:
    """The counters since `reset`."""
    size = _library().sim_report(None, ctypes.c_long(0))
    buffer = ctypes.create_string_buffer(size + (1 << 16))  # other threads may add counters in between
    _library().sim_report(buffer, ctypes.c_long(len(buffer)))
    found: Counts = {}
    for line in buffer.value.decode(errors="replace").splitlines():
        number, size, name = line.split("\t", 2)
        before = found.get(name, Count(0, 0))
        found[name] = Count(before.number + int(number), before.bytes + int(size))
    return found


def total(found: Counts, *kinds: str) -> Count:
    """The sum over the counters whose names begin with one of `kinds`."""
    parts = [count for name, count in found.items() if name.startswith(kinds)]
    return Count(sum(part.number for part in parts), sum(part.bytes for part in parts))
