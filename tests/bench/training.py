"""A training step of this trainer against its floor."""

from collections.abc import Callable

import torch

from model.config import ModelConfig
from parallel import fsdp
from tests.bench import floor
from tests.bench.harness import Figure, figure, in_turns
from trainer.config import TrainConfig
from trainer.machine import keep_freed_memory
from trainer.optimizer import make_optimizer

SIZES = {  # vocabulary, rows, tokens a row, and the model
    "small": (4096, 8, 256, ModelConfig(
        dim=256, n_layers=4, n_heads=8, expert_dim=512, ffn_dim=1024, n_experts=31, moe_every=2)),
    "medium": (8192, 4, 512, ModelConfig(
        dim=768, n_layers=2, n_heads=8, expert_dim=2048, ffn_dim=4096, n_experts=31)),
}  # fmt: skip


def our_step(config: ModelConfig, vocab_size: int, batch: int, length: int) -> Callable[[], None]:
    """Forward, backward and AdamW of this trainer's model, in fp32, on one process."""
    model = fsdp.build(config, vocab_size, 0, torch.device("cpu"), torch.float32, None).train()
    optimizer = make_optimizer(model, TrainConfig(steps=1))
    tokens = torch.randint(0, vocab_size, (batch, length))

    def run() -> None:
        output = model(tokens, tokens)
        assert output.loss is not None
        (output.loss / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def measure(repeats: int) -> list[Figure]:
    keep_freed_memory()
    figures = []
    for name, (vocab_size, batch, length, config) in SIZES.items():
        cases = {
            "ours": our_step(config, vocab_size, batch, length),
            "floor": floor.step(config, vocab_size, batch, length),
        }
        times = in_turns(cases, repeats if name == "small" else max(3, repeats // 3))
        what = f"training step, {name} ({batch * length:,} tokens, dim {config.dim}, {config.n_layers} layers), fp32"
        figures.append(figure(what, times["ours"], times["floor"], "share of its floor's speed", "0.80", True))
    return figures
