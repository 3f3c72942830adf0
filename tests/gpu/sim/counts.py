"""What a training step asks of a device, by phase, and the least time that the device needs for it: tables."""

import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.gpu.sim.machine import Machine, Simulation

VOCABULARY = 32000  # of launch/scout.yaml; the corpus here has less
STEPS = 4  # as record.py has them
Messages = dict[str, tuple[int, int]]  # kind and ranks -> number, bytes that leave the rank


@dataclass
class Row:
    """One phase of a step, or several."""

    phase: str
    kernels: int
    copies: int  # and memsets
    waits: int
    messages: Messages
    host_ms: float
    device_ms: float  # at least

    def plus(self, other: "Row", phase: str) -> "Row":
        merged = dict(self.messages)
        for kind, (times, size) in other.messages.items():
            before = merged.get(kind, (0, 0))
            merged[kind] = (before[0] + times, before[1] + size)
        return Row(
            phase,
            self.kernels + other.kernels,
            self.copies + other.copies,
            self.waits + other.waits,
            merged,
            self.host_ms + other.host_ms,
            self.device_ms + other.device_ms,
        )

    def markdown(self) -> str:
        times, size = (sum(column) for column in zip(*self.messages.values(), strict=True)) if self.messages else (0, 0)
        return (
            f"| {self.phase} | {self.kernels:,} | {self.copies:,} | {self.waits} | {times} | {size / 1e6:,.1f} | "
            f"{self.host_ms:.1f} | {self.device_ms:.1f} |"
        )


@dataclass
class Recording:
    title: str
    ranks: int
    rows: list[Row]  # the phases of a step, in their order
    memory: dict[str, int]
    costs: list[dict[str, Any]]  # see roofline.Cost
    kernels: dict[str, dict[str, int]]  # of each phase, by name

    @property
    def micro_batches(self) -> int:
        return sum(row.phase.startswith("backward") for row in self.rows)

    @property
    def first(self) -> Row:
        """Forward and backward of the first micro-batch."""
        return merge("micro-batch 1", [row for row in self.rows if row.phase in ("forward 1", "backward 1")])

    @property
    def step(self) -> Row:
        return merge(f"whole step, {self.micro_batches} micro-batches", self.rows)

    def json(self) -> dict[str, Any]:
        return vars(self) | {"rows": [vars(row) for row in (*self.rows, self.first, self.step)]}


def merge(phase: str, rows: Sequence[Row]) -> Row:
    return functools.reduce(lambda a, b: a.plus(b, phase), rows)


def record(
    simulation: Simulation,
    title: str,
    machine: Machine,
    words: Sequence[str],
    vocabulary: int = VOCABULARY,
    roofline: bool = True,
) -> Recording:
    """Run STEPS steps with the settings `words`, and read what rank 0 recorded; costs only with `roofline`."""
    path = simulation.folder / "recording.json"
    path.unlink(missing_ok=True)
    fixed = [
        f"train.steps={STEPS}",
        "eval.every=0",
        "sample.every=0",
        "checkpoint.every=0",
        "checkpoint.async_save=false",
        "log.wandb=disabled",
        f"run.dir={simulation.folder / 'recorded'}",
        "run.name=counts",
        "train.warmup_steps=1",
    ]
    environment = {"SIM_RECORD": str(path), "SIM_INIT": "0", "SIM_VOCAB": str(vocabulary)}
    if not roofline:
        environment["SIM_ROOFLINE"] = "0"
    done = simulation.train(machine, [*words, *simulation.corpus(), *fixed], environment)
    if not path.exists():
        raise RuntimeError(f"{title}: nothing was recorded\n{done.stdout[-6000:]}")
    return read(title, json.loads(path.read_text()))


def read(title: str, found: dict[str, Any]) -> Recording:
    """The recording that record.py wrote."""
    rows = []
    for phase in found["phases"]:
        name, counts = phase["phase"], phase["counts"]
        rows.append(
            Row(
                name,
                number(counts, "kernel "),
                number(counts, "copy ", "memset"),
                number(counts, "wait "),
                messages(counts),
                1e3 * min(s for other, s in found["seconds"] if other == name),
                1e3 * sum(cost["seconds"] for cost in found["costs"] if cost["phase"] == name),
            )
        )
    kernels = {
        phase["phase"]: {k.removeprefix("kernel "): c[0] for k, c in phase["counts"].items() if k.startswith("kernel ")}
        for phase in found["phases"]
    }
    return Recording(title, found["ranks"], rows, found["memory"], found["costs"], kernels)


def messages(counts: dict[str, list[int]]) -> Messages:
    kind = "message "
    return {name.removeprefix(kind): (n, size) for name, (n, size) in counts.items() if name.startswith(kind)}


def number(counts: dict[str, list[int]], *kinds: str) -> int:
    return sum(count[0] for name, count in counts.items() if name.startswith(kinds))


def table(recording: Recording) -> str:
    """For markdown. All of it is simulated."""
    first = ("data", "forward 1", "backward 1", "all-reduce", "optimizer")
    lines = [
        f"**{recording.title}** (simulated)",
        "",
        "| phase | kernels | copies, memsets | waits for the device | messages | MB sent | host, ms (this CPU) "
        "| device, ms at least |",
        "|---|---|---|---|---|---|---|---|",
        *(row.markdown() for row in recording.rows if row.phase in first),
        recording.first.markdown(),
        recording.step.markdown(),
        "",
    ]
    peak, reserved = (recording.memory[name] / 2**30 for name in ("allocated", "reserved"))
    lines.append(f"Memory of rank 0: {peak:.2f} GiB allocated at most, {reserved:.2f} GiB reserved.")
    if sent := recording.step.messages:
        kinds = (f"{times} {kind} ({size / 1e6:,.1f} MB)" for kind, (times, size) in sorted(sent.items()))
        lines.append(f"Messages of the step, and the bytes that leave a rank: {', '.join(kinds)}.")
    return "\n".join(lines)


def by_function(recording: Recording, most: int = 24) -> str:
    """The least device time of the first micro-batch by the function that asks, and by operation."""
    lines = []
    for phase in ("forward 1", "backward 1"):
        for what, kind in (("place", "function"), ("name", "operation")):
            times, launches, moved = Counter[str](), Counter[str](), Counter[str]()
            for cost in recording.costs:
                if cost["phase"] == phase:
                    times[cost[what]] += cost["seconds"]
                    launches[cost[what]] += cost["launches"]
                    moved[cost[what]] += cost["bytes"]
            lines += ["", f"| {phase}, by {kind} | device, ms at least | launches | GB |", "|---|---|---|---|"]
            lines += [
                f"| {name[:110]} | {1e3 * time:.2f} | {launches[name]} | {moved[name] / 1e9:.2f} |"
                for name, time in times.most_common(most)
            ]
    return "\n".join(lines)


def comparison(recordings: Sequence[Recording]) -> str:
    """One line for each: a whole step of each layout, for markdown."""
    lines = [
        "| step of rank 0 (simulated) | kernels | waits | messages | MB sent | kinds of messages | host, ms (this CPU) "
        "| device, ms at least | GiB at most |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for recording in recordings:
        step = recording.step
        kinds = ", ".join(f"{n} {kind} ({size / 1e6:,.0f} MB)" for kind, (n, size) in sorted(step.messages.items()))
        count, sent = (sum(column) for column in zip((0, 0), *step.messages.values(), strict=True))
        lines.append(
            f"| {recording.title} | {step.kernels:,} | {step.waits} | {count} | {sent / 1e6:,.0f} | {kinds} | "
            f"{step.host_ms:.0f} | {step.device_ms:.0f} | {recording.memory['allocated'] / 2**30:.1f} |"
        )
    return "\n".join(lines)
