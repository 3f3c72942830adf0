"""Tables of what a training step asks of a device, by phase, and of the least time that the device needs for it."""

import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.gpu.sim.machine import Machine, Simulation

VOCABULARY = 32000  # that of launch/scout.yaml; the vocabulary of the corpus here is smaller
STEPS = 4  # record.STEPS
Messages = dict[str, tuple[int, int]]  # kind and number of ranks -> number of messages, bytes that leave the rank


@dataclass
class Row:
    """Counts of one phase of a step, or the sum over several phases."""

    phase: str
    kernels: int
    copies: int  # copies and memsets
    waits: int
    messages: Messages
    host_ms: float
    device_ms: float  # lower bound

    def plus(self, other: "Row", phase: str) -> "Row":
        """The sum of two rows, named `phase`."""
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
        sent, size = total(self.messages)
        return (
            f"| {self.phase} | {self.kernels:,} | {self.copies:,} | {self.waits} | {sent} | {size / 1e6:,.1f} | "
            f"{self.host_ms:.1f} | {self.device_ms:.1f} |"
        )


def total(messages: Messages) -> tuple[int, int]:
    """The number of all messages, and their bytes."""
    return sum(number for number, _ in messages.values()), sum(size for _, size in messages.values())


@dataclass
class Recording:
    """The counts of rank 0 in one step of a run."""

    title: str
    ranks: int
    rows: list[Row]  # the phases of the step, in their order
    memory: dict[str, int]
    costs: list[dict[str, Any]]  # see roofline.Cost
    kernels: dict[str, dict[str, int]]  # phase -> name -> number

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
    arguments: Sequence[str],
    vocabulary: int = VOCABULARY,
    roofline: bool = True,
) -> Recording:
    """Run STEPS steps with the command line `arguments`. Returns rank 0's recording; it has costs only with `roofline`.

    Raises RuntimeError if the run recorded nothing.
    """
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
    done = simulation.train(machine, [*arguments, *simulation.corpus(), *fixed], environment)
    if not path.exists():
        raise RuntimeError(f"{title}: the run ended without a recording\n{done.stdout[-6000:]}")
    return read(title, json.loads(path.read_text()))


def read(title: str, found: dict[str, Any]) -> Recording:
    """The recording, from the JSON object that record.py wrote."""
    rows = []
    kernels: dict[str, dict[str, int]] = {}
    for phase in found["phases"]:
        name, counts = phase["phase"], phase["counts"]
        rows.append(
            Row(
                phase=name,
                kernels=number(counts, "kernel "),
                copies=number(counts, "copy ", "memset"),
                waits=number(counts, "wait "),
                messages=messages(counts),
                host_ms=1e3 * min(seconds for other, seconds in found["seconds"] if other == name),
                device_ms=1e3 * sum(cost["seconds"] for cost in found["costs"] if cost["phase"] == name),
            )
        )
        kernels[name] = {
            key.removeprefix("kernel "): count[0] for key, count in counts.items() if key.startswith("kernel ")
        }
    return Recording(title, found["ranks"], rows, found["memory"], found["costs"], kernels)


def messages(counts: dict[str, list[int]]) -> Messages:
    kind = "message "
    return {name.removeprefix(kind): (n, size) for name, (n, size) in counts.items() if name.startswith(kind)}


def number(counts: dict[str, list[int]], *kinds: str) -> int:
    """The sum of the counters whose names begin with one of `kinds`."""
    return sum(count[0] for name, count in counts.items() if name.startswith(kinds))


def table(recording: Recording) -> str:
    """The phases of the first micro-batch and the whole step, as a Markdown table. All figures are simulated."""
    shown = ("data", "forward 1", "backward 1", "all-reduce", "optimizer")
    lines = [
        f"**{recording.title}** (simulated)",
        "",
        "| phase | kernels | copies, memsets | waits for the device | messages | MB sent | host, ms (this CPU) "
        "| device, ms (lower bound) |",
        "|---|---|---|---|---|---|---|---|",
        *(row.markdown() for row in recording.rows if row.phase in shown),
        recording.first.markdown(),
        recording.step.markdown(),
        "",
    ]
    peak, reserved = (recording.memory[name] / 2**30 for name in ("allocated", "reserved"))
    lines.append(f"Peak memory of rank 0: {peak:.2f} GiB allocated, {reserved:.2f} GiB reserved.")
    if sent := recording.step.messages:
        kinds = (f"{count} {kind} ({size / 1e6:,.1f} MB)" for kind, (count, size) in sorted(sent.items()))
        lines.append(f"Messages of the step, and the bytes that leave a rank: {', '.join(kinds)}.")
    return "\n".join(lines)


def by_function(recording: Recording, most: int = 24) -> str:
    """The lower bound of the first micro-batch's device time, by calling function and by operation."""
    lines = []
    for phase in ("forward 1", "backward 1"):
        for key, kind in (("place", "function"), ("name", "operation")):
            times, launches, moved = Counter[str](), Counter[str](), Counter[str]()
            for cost in recording.costs:
                if cost["phase"] == phase:
                    times[cost[key]] += cost["seconds"]
                    launches[cost[key]] += cost["launches"]
                    moved[cost[key]] += cost["bytes"]
            lines += ["", f"| {phase}, by {kind} | device, ms (lower bound) | launches | GB |", "|---|---|---|---|"]
            lines += [
                f"| {name[:110]} | {1e3 * time:.2f} | {launches[name]} | {moved[name] / 1e9:.2f} |"
                for name, time in times.most_common(most)
            ]
    return "\n".join(lines)


def comparison(recordings: Sequence[Recording]) -> str:
    """A Markdown table with a whole step of each recording in one line."""
    lines = [
        "| step of rank 0 (simulated) | kernels | waits | messages | MB sent | kinds of messages | host, ms (this CPU) "
        "| device, ms (lower bound) | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for recording in recordings:
        step = recording.step
        kinds = ", ".join(f"{n} {kind} ({size / 1e6:,.0f} MB)" for kind, (n, size) in sorted(step.messages.items()))
        count, sent = total(step.messages)
        lines.append(
            f"| {recording.title} | {step.kernels:,} | {step.waits} | {count} | {sent / 1e6:,.0f} | {kinds} | "
            f"{step.host_ms:.0f} | {step.device_ms:.0f} | {recording.memory['allocated'] / 2**30:.1f} |"
        )
    return "\n".join(lines)
