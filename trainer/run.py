"""The state of a run on one rank."""

from dataclasses import dataclass, field
from pathlib import Path

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


@dataclass
class Run:
    """All that a run is, on one rank."""

    config: Config
    world: World
    device: torch.device
    dtype: torch.dtype
    corpus: Corpus
    tokenizer: Tokenizer
    loader: Loader
    steps: int  # of the whole run
    model: Transformer
    optimizer: torch.optim.AdamW
    degrees: Degrees
    scale: LossScale
    reporter: Reporter
    stop: StopFlag
    step: int = 0  # finished steps
    tokens: int = 0  # targets that entered the loss so far
    skipped: int = 0  # steps in a row without a finite gradient
    saver: Saver | None = None
    watchdog: Watchdog = field(default_factory=Watchdog)
    spikes: Spikes = field(default_factory=Spikes)

    @property
    def folder(self) -> Path:
        return self.config.run.folder
