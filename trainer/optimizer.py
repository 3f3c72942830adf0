"""AdamW (arXiv:1711.05101) and the learning rate, which is a function of the step alone."""

import math

import torch
from torch import nn

from trainer.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of `step` (from 0) of a run of `steps`: linear warm-up, then cosine to min_lr, or constant."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.max_lr
    length = (config.decay_steps or steps) - config.warmup_steps
    progress = min(1.0, (step + 1 - config.warmup_steps) / max(1, length))
    return config.min_lr + (config.max_lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over all weights, with its state made at once (zeros), so that a checkpoint can be loaded into it.

    Norms are not decayed, nor is the embedding: a step touches few of its rows, and decay would shrink the rest.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (kept if parameter.ndim < 2 or name == "embedding.weight" else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=config.max_lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer
