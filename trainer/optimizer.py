"""AdamW (arXiv:1711.05101), the learning rate, which is a function of the step alone, and the loss scale of fp16."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of `step` (from 0) of a run of `steps`: linear warm-up, and then by the schedule.

    cosine falls to min_lr at step decay_steps. wsd (warm-up, stable, decay; arXiv:2404.06395) stays at max_lr and falls
    to min_lr in the last decay_steps of the run, by 1 - sqrt (arXiv:2405.18392): until then a longer run has the same
    rates.
    """
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.max_lr
    if config.schedule == "wsd":
        length = min(config.decay_steps or -(-steps // 10), steps - config.warmup_steps)
        share = 1 - math.sqrt(min(1.0, max(0, step + 1 - (steps - length)) / max(1, length)))
    else:
        length = (config.decay_steps or steps) - config.warmup_steps
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, (step + 1 - config.warmup_steps) / max(1, length))))
    return config.min_lr + (config.max_lr - config.min_lr) * share


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over all weights, with its state made at once (zeros), so that a checkpoint can be loaded into it.

    Norms are not decayed, nor is the embedding: a step touches few of its rows, and decay would shrink the rest.
    """
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        decays = parameter.ndim >= 2 and name != "embedding.weight"
        kind = isinstance(parameter, DTensor)  # fused AdamW takes a group of one kind only
        groups.setdefault((decays, kind), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": p, "weight_decay": config.weight_decay if decays else 0.0} for (decays, _), p in groups.items()],
        lr=config.max_lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


@dataclass
class LossScale:
    """What the loss is multiplied by, so that small gradients survive fp16 (arXiv:1710.03740); else 1, and stays so.

    Halved when a gradient is not finite, doubled after PATIENCE steps in a row that are.
    """

    value: float = 1.0
    good: int = 0  # finite steps since the last change
    on: bool = False

    PATIENCE = 1000
    LARGEST = 2.0**24

    @classmethod
    def of(cls, dtype: torch.dtype) -> "LossScale":
        return cls(2.0**16, on=True) if dtype == torch.float16 else cls()

    @property
    def can_fall(self) -> bool:
        return self.on and self.value > 1

    def update(self, finite: bool) -> None:
        """After a step."""
        if not self.on:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.good >= self.PATIENCE:
            self.value, self.good = min(self.LARGEST, 2 * self.value), 0
