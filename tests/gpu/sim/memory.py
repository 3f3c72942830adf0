"""Compares the estimates of `--dry-run` with the peak of torch's allocator in a step on simulated GPUs."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from data.loader import BatchLayout
from parallel import mesh
from parallel.mesh import World
from tests.gpu.sim import counts
from tests.gpu.sim.machine import Machine, Simulation
from trainer.config import read_config
from trainer.memory import Memory, memory_needed

MICRO_BATCHES = 3  # largest number of micro-batches in a step: more of them have the same peak
TOLERANCE = 0.05  # relative error of an estimate


@dataclass(frozen=True)
class Case:
    """A configuration on a machine."""

    machine: Machine
    config: str  # name in launch/
    settings: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16  # of the products

    def need(self) -> Memory:
        """The estimate of --dry-run."""
        config = read_config(self.path, list(self.settings))
        p, ranks = config.parallel, self.machine.ranks
        degrees = mesh.resolve_degrees(World(0, ranks, 0, ranks), config.model, p.replicate, p.shard, p.expert)
        share = BatchLayout(config.train.global_batch_size, config.train.micro_batch_size, ranks)
        return memory_needed(config, config.data.vocab_size, self.dtype, degrees, share)

    def record(self, simulation: Simulation, name: str) -> counts.Recording:
        """Run some steps of at most MICRO_BATCHES micro-batches, and record them."""
        config = read_config(self.path, list(self.settings))
        most = MICRO_BATCHES * config.train.micro_batch_size * self.machine.ranks
        size = f"train.global_batch_size={min(config.train.global_batch_size, most)}"
        arguments = ["--config", self.path, *self.settings, size]
        return counts.record(simulation, name, self.machine, arguments, config.data.vocab_size, roofline=False)

    @property
    def path(self) -> str:
        return f"launch/{self.config}.yaml"


@dataclass(frozen=True)
class Result:
    """The result of one case, in bytes of rank 0."""

    name: str
    estimate: int
    allocated: int
    reserved: int

    @property
    def error(self) -> float:
        return self.estimate / self.allocated - 1

    @property
    def passed(self) -> bool:
        return abs(self.error) <= TOLERANCE

    def markdown(self) -> str:
        allocated, estimate = self.allocated / 2**30, self.estimate / 2**30
        return (
            f"| {self.name} | {allocated:.3f} | {estimate:.3f} | {self.error:+.1%} "
            f"| {self.reserved / self.allocated - 1:+.0%} |"
        )


@dataclass(frozen=True)
class Failure:
    """A case whose run recorded nothing."""

    name: str
    output: str
    passed = False

    def markdown(self) -> str:
        return f"| {self.name} | FAILED: {self.output.splitlines()[-1]} | | | |"


HEAD = (
    "| configuration, GPUs (simulated) | allocated, GiB | estimate, GiB | error | reserved, relative to allocated |\n"
    "|---|---|---|---|---|"
)


def scout(ranks: int, *settings: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    return Case(Machine(ranks), "scout", settings, dtype)


def cut_17b(ranks: int, *settings: str) -> Case:
    return Case(Machine(ranks), "scout-17b-16e", ("model.n_layers=2", *settings))


CASES = {
    "scout.yaml, 1": scout(1),
    "scout.yaml, 1, `compile=false`": scout(1, "train.compile=false"),
    "scout.yaml, 1, `dtype=float32`": scout(1, "train.dtype=float32", dtype=torch.float32),
    "scout.yaml, 1, `top_k=2`": scout(1, "model.top_k=2"),
    "scout.yaml, 1, `recompute=full`": scout(1, "train.recompute=full"),
    "scout.yaml, 2": scout(2),
    "scout.yaml, 2, `compile=false`": scout(2, "train.compile=false"),
    "scout.yaml, 2, `recompute=selective`": scout(2, "train.recompute=selective"),
    "scout.yaml, 2, `recompute=full`": scout(2, "train.recompute=full"),
    "scout.yaml, 2, `reduce=every`": scout(2, "train.reduce=every"),
    "scout.yaml, 4": scout(4),
    "scout.yaml, 4, `expert=2`": scout(4, "parallel.expert=2"),
    "scout.yaml, 4, `expert=1`": scout(4, "parallel.expert=1"),
    "scout.yaml with 2 layers, 4, `replicate=2`": scout(4, "model.n_layers=2", "parallel.replicate=2"),
    "kaggle.yaml, 2 T4": Case(Machine(2, "T4"), "kaggle", dtype=torch.float16),
    "scout-17b-16e.yaml with 2 layers, 4": cut_17b(4),
    "scout-17b-16e.yaml with 2 layers, 4, `recompute=none`": cut_17b(4, "train.recompute=none"),
    "scout-17b-16e.yaml with 2 layers, 8": cut_17b(8),
    "tiny.yaml, 1": Case(Machine(1), "tiny"),
    "tiny.yaml, 2": Case(Machine(2), "tiny"),
}


def run(simulation: Simulation, pattern: str) -> Iterator[Result | Failure]:
    """Measure the cases whose names match the regular expression `pattern`, one after another."""
    for name, case in CASES.items():
        if not re.search(pattern, name, re.IGNORECASE):
            continue
        try:
            memory = case.record(simulation, name).memory
        except RuntimeError as error:  # the other cases can still be compared
            yield Failure(name, str(error))
        else:
            yield Result(name, case.need().total, memory["allocated"], memory["reserved"])
