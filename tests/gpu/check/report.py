"""The results of the check: records in a file of JSON lines, a verdict for each part, and two tables."""

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OK, FAILED, SKIPPED, MEASURED = "ok", "FAILED", "skipped", "measured"
Limit = tuple[float, float]  # the smallest and the largest value that pass


def at_most(value: float) -> Limit:
    return 0.0, value


def at_least(value: float) -> Limit:
    return value, 1e300  # JSON has no infinity


def exactly(value: float) -> Limit:
    return float(value), float(value)


@dataclass(frozen=True)
class Record:
    """One case of a part. A figure is judged if `limits` contains its name; the others are only recorded."""

    part: str
    case: str
    verdict: str
    at: float  # seconds since the check was started
    figures: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Limit] = field(default_factory=dict)
    why: str = ""  # the reason of a failure or a skip

    def line(self) -> str:
        """The record for the terminal, in one line."""
        figures = ", ".join(f"{name} {shown(value)}" for name, value in self.figures.items())
        details = "; ".join(filter(None, [last_line(self.why), figures]))
        return f"{self.at:5.0f} s  {self.part}: {self.case or 'all'}: {self.verdict}: {details}"


def judge(figures: Mapping[str, Any], limits: Mapping[str, Limit]) -> str:
    """Why the figures fail their limits; "" if they pass. A figure that is missing or not finite fails."""
    faults = []
    for name, (low, high) in limits.items():
        value = figures.get(name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            faults.append(f"{name} is {value}")
        elif value < low:
            faults.append(f"{name} {shown(value)} is below {shown(low)}")
        elif value > high:
            faults.append(f"{name} {shown(value)} is above {shown(high)}")
    return "; ".join(faults)


@dataclass
class Report:
    """Appends the records of one part to the file. A part has no other output, so its records survive a crash."""

    path: Path
    part: str
    start: float  # time.time() when the check was started

    def measure(self, case: str, **figures: Any) -> None:
        """Record figures without limits."""
        self._write(case, MEASURED, figures)

    def check(self, case: str, limits: Mapping[str, Limit], **figures: Any) -> bool:
        """Record the figures with a verdict. Returns whether they pass."""
        why = judge(figures, limits)
        self._write(case, FAILED if why else OK, figures, limits, why)
        return not why

    def skip(self, case: str, why: str) -> None:
        """Record that a case did not run."""
        self._write(case, SKIPPED, why=why)

    def fail(self, case: str, why: str) -> None:
        """Record a case that failed before it had figures; `why` may be a traceback."""
        self._write(case, FAILED, why=why)

    def _write(
        self,
        case: str,
        verdict: str,
        figures: Mapping[str, Any] | None = None,
        limits: Mapping[str, Limit] | None = None,
        why: str = "",
    ) -> None:
        at = round(time.time() - self.start, 1)
        plain = {name: _json(value) for name, value in (figures or {}).items()}
        record = Record(self.part, case, verdict, at, plain, dict(limits or {}), why)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record), default=str) + "\n")
        print(record.line(), flush=True)


def _json(value: Any) -> Any:
    """NaN and infinity as strings, because JSON has no numbers for them; other values as they are."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_records(path: Path) -> list[Record]:
    """The records of a file. A last line that a killed process did not finish is dropped."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            continue
        records.append(Record(**fields))
    return records


def part_verdict(records: Iterable[Record]) -> tuple[str, str]:
    """The verdict of a part and its reason, from the part's records."""
    records = list(records)
    failed = [r for r in records if r.verdict == FAILED]
    skipped = [r for r in records if r.verdict == SKIPPED]
    if not records:
        return FAILED, "recorded nothing"
    if failed:
        first = failed[0]
        why = last_line(first.why)
        count = f"{len(failed)} of {len(records)} cases: " if len(records) > 1 else ""
        return FAILED, f"{count}{first.case}: {why}" if first.case else f"{count}{why}"
    if len(skipped) == len(records):
        return SKIPPED, skipped[0].why
    skips = f", {len(skipped)} skipped ({skipped[0].case}: {skipped[0].why})" if skipped else ""
    done = len(records) - len(skipped)
    return OK, f"{done} case{'s' if done > 1 else ''}{skips}"


def last_line(text: str) -> str:
    """The last line of a text such as a traceback, cut to the width of a table."""
    line = (text.strip().splitlines() or [""])[-1]
    return line if len(line) <= 160 else line[:157] + "..."


def exit_code(records: Iterable[Record], parts: Iterable[str]) -> int:
    """1 if a part failed, else 0. A skipped part is not a failure."""
    records = list(records)
    return int(any(part_verdict(r for r in records if r.part == part)[0] == FAILED for part in parts))


def plain_table(records: Iterable[Record], parts: Iterable[str]) -> str:
    """A verdict for each part, for the terminal."""
    records = list(records)
    rows = [("part", "verdict", "about")]
    rows += [(part, *part_verdict(r for r in records if r.part == part)) for part in parts]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{name:<{width}}  {verdict:<8} {about}".rstrip() for name, verdict, about in rows)


def markdown(records: Iterable[Record], title: str) -> str:
    """Tables for docs/benchmarks.md: one for each part, with a row for each case that has figures."""
    by_part: dict[str, list[Record]] = {}
    for record in records:
        if record.figures:
            by_part.setdefault(record.part, []).append(record)
    return "\n\n".join([title, *(_part_table(part, rows) for part, rows in by_part.items())]) + "\n"


def _part_table(part: str, records: list[Record]) -> str:
    columns = list(dict.fromkeys(name for r in records for name, value in r.figures.items() if _fits(value)))
    lines = [f"| {part} | " + " | ".join(c.replace("_", " ") for c in columns) + " | verdict |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for record in records:
        cells = [shown(record.figures.get(name, "")) for name in columns]
        lines.append(f"| {record.case or part} | " + " | ".join(cells) + f" | {record.verdict} |")
    return "\n".join(lines)


def _fits(value: Any) -> bool:
    return isinstance(value, int | float | str) and len(str(value)) <= 80


def shown(value: Any) -> str:
    """A figure as text: four digits of a float, all digits of an integer."""
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if type(value) is int else str(value)
    if value == 0 or 0.01 <= abs(value) < 1e6:
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.2e}"
