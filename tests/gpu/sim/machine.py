"""Starts the processes of a run on simulated GPUs, and prepares the corpus that they read."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.gpu.sim.build import PRELOADED

ROOT = Path(__file__).parents[3]
CORPUS = ["data.source=storybook", "data.stories=4000", "data.vocab_size=1024"]


@dataclass(frozen=True)
class Machine:
    """GPUs of one model on `nodes` nodes; each node is a torchrun agent on this host."""

    ranks: int = 1
    card: str = "H100"
    nodes: int = 1
    gib: int | None = None  # memory of each GPU; None: that of the real card


class Simulation:
    """Runs commands with the stand-in libraries in `libraries`; runs and corpora are written to `folder`."""

    def __init__(self, libraries: Path, folder: Path) -> None:
        self.libraries, self.folder = libraries.resolve(), folder
        folder.mkdir(parents=True, exist_ok=True)

    def corpus(self) -> list[str]:
        """The settings for a small corpus. The first call prepares it."""
        settings = [*CORPUS, f"data.dir={self.folder / 'corpus'}"]
        if not (self.folder / "corpus").exists():
            done = self._run([sys.executable, "-m", "data.prepare", *settings], dict(os.environ), 600)
            if done.returncode:
                sys.exit(f"could not prepare the corpus:\n{done.stdout}")
        return settings

    def train(
        self,
        machine: Machine,
        arguments: Sequence[str],
        extra_environment: Mapping[str, str] | None = None,
        timeout: float = 900,
    ) -> subprocess.CompletedProcess[str]:
        """Run simulated.py on all ranks. The result has the output of all nodes, and the exit code of the first."""
        with tempfile.TemporaryDirectory(prefix="ranks-", dir=self.folder) as shared:
            environment = self.environment(machine, shared) | dict(extra_environment or {})
            commands = [self._command(machine, node, shared) + list(arguments) for node in range(machine.nodes)]
            with ThreadPoolExecutor(machine.nodes) as pool:
                first, *others = pool.map(lambda command: self._run(command, environment, timeout), commands)
            first.stdout += "".join(other.stdout for other in others)
            return first

    def environment(self, machine: Machine, shared: str) -> dict[str, str]:
        """The environment of a run. `shared` is a folder that all its ranks use."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SIM_GPU_")}
        environment |= {
            "LD_PRELOAD": ":".join(str(self.libraries / name) for name in PRELOADED),
            "TRITON_LIBCUDA_PATH": str(self.libraries),
            "SIM_GPU_CARD": machine.card,
            "SIM_GPU_COUNT": str(machine.ranks // machine.nodes),
            "SIM_GPU_FOLDER": shared,
            "PYTHONDONTWRITEBYTECODE": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # each of its workers would import torch again
        }
        if machine.gib is not None:
            environment["SIM_GPU_GIB"] = str(machine.gib)
        return environment

    def _command(self, machine: Machine, node: int, shared: str) -> list[str]:
        python = [sys.executable, "-m"]
        flags = [f"--nproc_per_node={machine.ranks // machine.nodes}", "--max-restarts=0"]
        if machine.ranks == 1:
            return [*python, "tests.gpu.sim.simulated"]
        if machine.nodes > 1:
            port = 29000 + os.getpid() % 1000
            flags += [f"--nnodes={machine.nodes}", f"--node_rank={node}", "--rdzv_backend=c10d"]
            flags += [f"--rdzv_id={Path(shared).name}", f"--rdzv_endpoint=localhost:{port}"]
        return [*python, "launch.torchrun", *flags, "-m", "tests.gpu.sim.simulated"]

    @staticmethod
    def _run(command: list[str], environment: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then stops its workers
            try:
                output, _ = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
            output += f"\nTimeoutError: stopped after {timeout:.0f} s"
        return subprocess.CompletedProcess(command, process.returncode, output)
