"""Timing in turns: every figure is a ratio of medians measured in one run, never a bound in a test."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Figure:
    """One line of the table. Both are medians, in `unit`; spread is (third - first quartile) / median of ours."""

    name: str
    ours: float
    other: float
    ratio: float  # of medians, the way `meaning` says
    spread: float
    meaning: str
    wanted: str
    unit: str = "s"

    def row(self) -> str:
        by, unit = (1e3, "ms") if self.unit == "s" else (1.0, self.unit)
        times = f"{by * self.ours:,.1f} {unit} | {by * self.other:,.1f} {unit}"
        ratio = f"{self.ratio:.2f} | ±{50 * self.spread:.0f}%"
        return f"| {self.name} | {times} | {ratio} | {self.meaning} | {self.wanted} |"

    def json(self) -> dict[str, object]:
        return asdict(self)


HEAD = "| what | ours | other | ratio | spread | of what | aim |\n|---|---|---|---|---|---|---|"


def in_turns(cases: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each case, called in turns so that slow spells fall on all; a first round is to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(repeats + 1):
        for name, call in cases.items():
            start = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(seconds: list[float]) -> float:
    """The middle half of the times over their median."""
    if len(seconds) < 4:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, n=4)
    return (high - low) / middle


def figure(
    name: str,
    ours: list[float],
    other: list[float],
    meaning: str,
    wanted: str,
    inverse: bool = False,
    unit: str = "s",
) -> Figure:
    """ratio = ours / other, or other / ours where `inverse` (a share of a floor's speed, a speed-up)."""
    a, b = statistics.median(ours), statistics.median(other)
    return Figure(name, a, b, b / a if inverse else a / b, spread(ours), meaning, wanted, unit)


def reset_peak() -> int:
    """Forget the largest size so far, inherited from the process that started this one; returns the present one."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Bytes that this process had in memory at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
