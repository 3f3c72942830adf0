"""AdamW (arXiv:1711.05101), the learning rate, which depends on the step alone, and the loss scale of fp16.

To add an optimizer, add a setting that selects it to `TrainConfig`, and construct it and its state in `make_optimizer`.
A checkpoint stores each tensor of that state under the name `optim.KEY.PARAMETER`. `bytes_per_weight` counts them.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of `step` (from 0) in a run of `steps` steps: a linear warm-up, and then the schedule.

    cosine reaches min_lr at step decay_steps. wsd (warm-up, stable, decay; arXiv:2404.06395) stays at max_lr, and falls
    to min_lr in the last decay_steps steps of the run, as 1 - sqrt (arXiv:2405.18392). Before that decay, its rates do
    not depend on the length of the run.
    """
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.max_lr
    if config.schedule == "wsd":
        length = min(config.decay_steps or -(-steps // 10), steps - config.warmup_steps)
        factor = 1 - math.sqrt(min(1.0, max(0, step + 1 - (steps - length)) / max(1, length)))
    else:
        length = (config.decay_steps or steps) - config.warmup_steps
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, (step + 1 - config.warmup_steps) / max(1, length))))
    return config.min_lr + (config.max_lr - config.min_lr) * factor


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over all weights. Its state is allocated here (zeros), so that a checkpoint can be loaded into it.

    There is no weight decay of norms and of the embedding: a step has gradients for few of the embedding's rows, and
    decay would shrink all others.
    """
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        decays = parameter.ndim >= 2 and name != "embedding.weight"
        is_dtensor = isinstance(parameter, DTensor)  # fused AdamW accepts no group with both kinds of tensors
        groups.setdefault((decays, is_dtensor), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0}
            for (decays, _), parameters in groups.items()
        ],
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


def bytes_per_weight(config: TrainConfig) -> int:
    """The bytes of an fp32 weight and of its state, counted on the optimizer of one small matrix.

    They are the same in memory and in a checkpoint. Numbers of the state that are not one for each weight, such as the
    step, are not counted.
    """
    layer = nn.Linear(2, 2, bias=False)
    state = make_optimizer(layer, config).state[layer.weight].values()
    return layer.weight.element_size() + sum(value.element_size() for value in state if value.ndim)


@dataclass
class LossScale:
    """The factor of the loss that keeps small gradients representable in fp16 (arXiv:1710.03740); 1 in other dtypes.

    It is halved when a gradient is not finite, and doubled after GROWTH_INTERVAL_STEPS consecutive finite steps. The
    fields are stored in the manifest of a checkpoint under these names.
    """

    value: float = 1.0
    good: int = 0  # finite steps since the last change
    on: bool = False

    INITIAL: ClassVar[float] = 2.0**16
    LARGEST: ClassVar[float] = 2.0**24
    GROWTH_INTERVAL_STEPS: ClassVar[int] = 1000

    @classmethod
    def of(cls, dtype: torch.dtype) -> "LossScale":
        """The scale at the start of a run whose matrix multiplications are in `dtype`."""
        return cls(cls.INITIAL, on=True) if dtype == torch.float16 else cls()

    @property
    def can_fall(self) -> bool:
        return self.on and self.value > 1

    def update(self, is_finite: bool) -> None:
        """Adjust the scale after a step, whose loss and gradients were finite or not."""
        if not self.on:
            return
        if not is_finite:
            self.good = 0
            self.value = max(1.0, self.value / 2)
            return
        self.good += 1
        if self.good >= self.GROWTH_INTERVAL_STEPS:
            self.good = 0
            self.value = min(self.LARGEST, 2 * self.value)
