"""Measures two or more cases alternately. Each figure is a ratio of medians from one run; no test has it as a limit."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Figure:
    """One line of the table.

    `ours` and `other` are medians, in `unit`. `spread` is that of ours: (third quartile - first quartile) / median.
    """

    name: str
    ours: float
    other: float
    ratio: float  # of the two medians; `meaning` describes it
    spread: float
    meaning: str
    wanted: str  # the target for the ratio
    unit: str = "s"

    def row(self) -> str:
        """The line as Markdown; seconds are printed as milliseconds."""
        factor, unit = (1e3, "ms") if self.unit == "s" else (1.0, self.unit)
        values = f"{factor * self.ours:,.1f} {unit} | {factor * self.other:,.1f} {unit}"
        ratio = f"{self.ratio:.2f} | ±{50 * self.spread:.0f}%"
        return f"| {self.name} | {values} | {ratio} | {self.meaning} | {self.wanted} |"

    def json(self) -> dict[str, object]:
        return asdict(self)


HEAD = "| what | ours | other | ratio | spread | meaning of the ratio | target |\n|---|---|---|---|---|---|---|"


def alternate(cases: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each case, by name. Cases alternate, so a slow phase of the machine affects all of them.

    A first round, which is not timed, is the warm-up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(repeats + 1):
        is_warm_up = number == 0
        for name, call in cases.items():
            start = time.perf_counter()
            call()
            if not is_warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(seconds: list[float]) -> float:
    """The range of the middle half of the times over their median; 0 for fewer than four times."""
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
    """A Figure with ratio = ours / other; with `inverse` other / ours: for a speed-up, or a share of a floor."""
    our_median, other_median = statistics.median(ours), statistics.median(other)
    ratio = other_median / our_median if inverse else our_median / other_median
    return Figure(name, our_median, other_median, ratio, spread(ours), meaning, wanted, unit)


def reset_peak() -> int:
    """Reset this process's peak of resident memory, which it may inherit from its parent. Returns the present bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Peak resident memory of this process in bytes, since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
