"""The state of a run on one rank: `startup.start` creates it, `loop.py` and `step.py` change it."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch

from data.loader import Loader
from data.shards import Corpus
from data.tokenizer import Tokenizer
from model.transformer import Transformer
from parallel.mesh import Degrees, World
from trainer.checkpoint.saver import Saver
from trainer.config import Config
from trainer.fault_tolerance.signals import StopFlag
from trainer.fault_tolerance.watchdog import Watchdog
from trainer.metrics import Reporter
from trainer.optimizer import LossScale
from trainer.spikes import Spikes


@dataclass(kw_only=True)
class Run:
    """A run on one rank, used as a context manager.

    Leaving the context closes `resources`: the folder lock, the process group, wandb, the saver and the watchdog.
    """

    config: Config
    world: World
    device: torch.device
    dtype: torch.dtype  # of matrix multiplications
    degrees: Degrees
    corpus: Corpus
    tokenizer: Tokenizer
    loader: Loader
    steps: int  # of the whole run
    model: Transformer
    optimizer: torch.optim.Optimizer
    scale: LossScale
    reporter: Reporter
    stop: StopFlag
    watchdog: Watchdog
    saver: Saver | None = None  # None if nothing is saved, as in tests of single steps
    step: int = 0  # finished steps
    tokens: int = 0  # targets that entered the loss so far
    skipped_steps: int = 0  # consecutive steps whose loss or gradient was not finite
    spikes: Spikes = field(default_factory=Spikes)
    resources: ExitStack = field(default_factory=ExitStack)

    @property
    def folder(self) -> Path:
        return self.config.run.folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.resources.close()
