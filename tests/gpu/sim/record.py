"""Records a few steps of a run on simulated GPUs by phase, on rank 0, and ends the run: what counts.py prints.

The phases are those that the trainer names to its watchdog. The last step runs under the roofline's mode, unless
SIM_ROOFLINE=0 leaves it out; the one before it gives the counts; those before that warm up, so that nothing is compiled
or allocated for the first time.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.gpu.sim import report
from tests.gpu.sim.roofline import Roofline
from trainer.fault_tolerance.watchdog import Watchdog

STEPS = 4  # of the run: train.steps
COUNTED, LAST = 3, 4


class Recorder:
    """Hears of each phase, and writes everything to `path` in the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step, self.phase = 0, ""
        self.started, self.launches = 0.0, 0
        self.counts: list[dict[str, Any]] = []  # of the phases of the counted step, in their order
        self.seconds: list[tuple[str, float]] = []  # of those and of the warm step before
        self.memory: dict[str, int] = {}  # torch's peaks of the counted step and of the one before
        self.roofline = Roofline()
        self.micro_batch = 0  # of the step, from 1 on

    def install(self) -> None:
        # Inductor says with each kernel what it reads and writes
        import torch._inductor.config as inductor

        inductor.benchmark_combo_kernel = True
        kind: Any = Watchdog
        mark = kind.mark

        def heard(watchdog: Watchdog, phase: str, step: int | None = None) -> None:
            mark(watchdog, phase, step)
            self.hear(phase, step)

        kind.mark = heard
        # The trainer resets torch's peaks with each line of metrics; only the recorder does now.
        self.reset_peaks = torch.cuda.reset_peak_memory_stats
        torch.cuda.reset_peak_memory_stats = lambda device=None: None

    def hear(self, phase: str, step: int | None) -> None:
        """The phase before is over, and this one begins; step is given with the first of a kind in a step."""
        self._close()
        if self.step == LAST and phase == "saving":
            self._end()
        if step is not None:
            self.step, self.micro_batch = step, 0
            self._take_memory()
        else:
            self.micro_batch += phase == "forward"
        self.phase = phase
        if self.step == LAST and phase != "data":
            self.roofline.phase = self._name()
            self.roofline.__enter__()
        report.reset()
        self.launches, self.started = report.launches(), time.process_time()

    def _take_memory(self) -> None:
        if self.step == COUNTED - 1:
            self.reset_peaks()
        elif self.step == LAST:
            self.memory = torch.cuda.memory_stats()
            if os.environ.get("SIM_ROOFLINE") == "0":
                self._end()

    def _close(self) -> None:
        seconds = time.process_time() - self.started
        if self.step == LAST and self.phase != "data":
            self.roofline.__exit__(None, None, None)
            self.roofline.add_the_rest(report.launches() - self.launches)
        if self.step == COUNTED:
            self.counts.append({"phase": self._name(), "counts": report.counts()})
        if self.step in (COUNTED - 1, COUNTED):
            self.seconds.append((self._name(), seconds))

    def _name(self) -> str:
        return f"{self.phase} {self.micro_batch}" if self.phase in ("forward", "backward") else self.phase

    def _end(self) -> None:
        if os.environ.get("RANK", "0") == "0":
            self.path.write_text(
                json.dumps(
                    {
                        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
                        "phases": self.counts,
                        "seconds": self.seconds,
                        "memory": {key: self.memory[f"{key}_bytes.all.peak"] for key in ("allocated", "reserved")},
                        "costs": [asdict(cost) for cost in self.roofline.costs.values()],
                    }
                )
            )
        sys.stdout.flush()
        os._exit(0)
