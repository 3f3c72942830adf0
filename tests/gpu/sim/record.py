"""Records a few steps of a run on simulated GPUs by phase, writes those of rank 0 for counts.py, and ends the run.

The phases are those that the trainer reports to its watchdog. The last step runs under the dispatch mode of
roofline.py, unless SIM_ROOFLINE=0 omits it. The step before it is counted. The steps before that are a warm-up, so that
nothing is compiled or allocated for the first time in the counted step.
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

STEPS = 4  # train.steps of the run
COUNTED_STEP = 3
LAST_STEP = 4


class Recorder:
    """Is called at the start of each phase, and writes everything to `path` in the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = 0
        self.phase = ""
        self.started = 0.0  # CPU time at which the phase started
        self.launches = 0  # launches before the phase
        self.counts: list[dict[str, Any]] = []  # one for each phase of the counted step, in their order
        # the host's CPU time of the phases of the counted step and of the step before it
        self.seconds: list[tuple[str, float]] = []
        self.memory: dict[str, int] = {}  # torch's peaks during the counted step and the step before it
        self.roofline = Roofline()
        self.micro_batch = 0  # number of the micro-batch in the step, from 1

    def install(self) -> None:
        # with this setting Inductor stores with each kernel how much it reads and writes
        import torch._inductor.config as inductor

        inductor.benchmark_combo_kernel = True
        watchdog_class: Any = Watchdog
        mark = watchdog_class.mark

        def mark_and_record(watchdog: Watchdog, phase: str, step: int | None = None) -> None:
            mark(watchdog, phase, step)
            self.start_phase(phase, step)

        watchdog_class.mark = mark_and_record
        # The trainer resets torch's peaks at each line of metrics; here only the recorder resets them.
        self.reset_peaks = torch.cuda.reset_peak_memory_stats
        torch.cuda.reset_peak_memory_stats = lambda device=None: None

    def start_phase(self, phase: str, step: int | None) -> None:
        """End the current phase and start this one. `step` is given with the first phase of a step."""
        self._end_phase()
        if self.step == LAST_STEP and phase == "saving":
            self._write_and_exit()
        if step is not None:
            self.step, self.micro_batch = step, 0
            self._record_memory()
        else:
            self.micro_batch += phase == "forward"
        self.phase = phase
        if self.step == LAST_STEP and phase != "data":
            self.roofline.phase = self._name()
            self.roofline.__enter__()
        report.reset()
        self.launches, self.started = report.launches(), time.process_time()

    def _record_memory(self) -> None:
        if self.step == COUNTED_STEP - 1:
            self.reset_peaks()
        elif self.step == LAST_STEP:
            self.memory = torch.cuda.memory_stats()
            if os.environ.get("SIM_ROOFLINE") == "0":
                self._write_and_exit()

    def _end_phase(self) -> None:
        seconds = time.process_time() - self.started
        if self.step == LAST_STEP and self.phase != "data":
            self.roofline.__exit__(None, None, None)
            self.roofline.add_unattributed(report.launches() - self.launches)
        if self.step == COUNTED_STEP:
            self.counts.append({"phase": self._name(), "counts": report.counts()})
        if self.step in (COUNTED_STEP - 1, COUNTED_STEP):
            self.seconds.append((self._name(), seconds))

    def _name(self) -> str:
        return f"{self.phase} {self.micro_batch}" if self.phase in ("forward", "backward") else self.phase

    def _write_and_exit(self) -> None:
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
