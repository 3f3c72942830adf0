"""A training step of this trainer, compared with its floor and with transformers' fastest mixture of experts."""

import functools
import importlib.util
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from model.config import ModelConfig
from model.precision import weights_unchanged
from parallel.build import build_model
from tests.bench import floor
from tests.bench.harness import Figure, alternate, figure
from tests.support.pool import Pool
from trainer.config import TrainConfig
from trainer.machine import bf16_pays, keep_freed_memory
from trainer.optimizer import make_optimizer

SIZES = {  # vocabulary size, rows, tokens in a row, and the model
    "small": (
        4096,
        8,
        256,
        ModelConfig(dim=256, n_layers=4, n_heads=8, expert_dim=512, ffn_dim=1024, n_experts=31, moe_every=2),
    ),
    "medium": (8192, 4, 512, ModelConfig(dim=768, n_layers=2, n_heads=8, expert_dim=2048, ffn_dim=4096, n_experts=31)),
}
Step = Callable[[], None]


def our_step(config: ModelConfig, vocab_size: int, batch: int, length: int, dtype: torch.dtype = torch.float32) -> Step:
    """A function for forward, backward and AdamW of this trainer's model, in one process."""
    model = build_model(config, vocab_size, 0, torch.device("cpu"), dtype, None).train()
    optimizer = make_optimizer(model, TrainConfig(steps=1))
    tokens = torch.randint(0, vocab_size, (batch, length))

    def run() -> None:
        with weights_unchanged():  # as in trainer/step.py
            output = model(tokens, tokens)
            assert output.loss is not None
            (output.loss / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def transformers_step(config: ModelConfig, vocab_size: int, batch: int, length: int, dtype: torch.dtype) -> Step:
    """The same for Qwen2-MoE, the nearest model of transformers that has grouped products for its experts.

    bf16 is computed by autocast. Tokens are assigned to the experts in round robin, not by the router's scores, so that
    all experts have the same load.
    """
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    model = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=vocab_size,
            hidden_size=config.dim,
            num_hidden_layers=config.n_layers,
            use_cache=False,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.kv_heads,
            intermediate_size=config.ffn_dim,
            moe_intermediate_size=config.expert_dim,
            shared_expert_intermediate_size=config.expert_dim,
            num_experts=config.n_experts,
            num_experts_per_tok=config.top_k,
            decoder_sparse_step=config.moe_every,
            max_position_embeddings=config.max_seq_len,
            output_router_logits=False,
            experts_implementation="grouped_mm",
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, vocab_size, (batch, length))

    def run() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), RoundRobinTopK(config.n_experts):
            logits = model(input_ids=tokens).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


class RoundRobinTopK(torch.overrides.TorchFunctionMode):
    """Replaces topk over the experts: the choices go through the experts in order, again and again."""

    def __init__(self, n_experts: int) -> None:
        super().__init__()
        self.n_experts = n_experts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.topk, torch.Tensor.topk) and args[0].shape[-1] == self.n_experts:
            index = torch.arange(out.indices.numel()).view_as(out.indices) % self.n_experts
            return torch.return_types.topk((args[0].gather(-1, index), index))
        return out


@functools.cache
def _peer(size: str, dtype: torch.dtype) -> Step:
    vocab_size, batch, length, config = SIZES[size]
    return transformers_step(config, vocab_size, batch, length, dtype)


def peer(size: str, dtype: torch.dtype, threads: int, keep_memory: bool) -> None:
    """Run a step of transformers. `keep_memory` applies this trainer's settings of the allocator.

    It runs in a process of its own, whose allocator has other settings than this process's.
    """
    torch.set_num_threads(threads)
    if keep_memory:
        keep_freed_memory()
    _peer(size, dtype)()


def measure(repeats: int) -> list[Figure]:
    """All figures of the step, in fp32, and in bf16 if that is faster on this machine.

    At most two models are in memory at a time.
    """
    keep_freed_memory()
    dtypes = [torch.float32, torch.bfloat16] if bf16_pays(256) else [torch.float32]
    if len(dtypes) == 1:
        print(
            "no figures in bf16, because products in bf16 are not faster than in fp32 on this machine", file=sys.stderr
        )
    peers = [
        ("speed over transformers' grouped Qwen2-MoE", False),
        ("the same with this trainer's allocator settings", True),
    ]
    if importlib.util.find_spec("transformers") is None:  # extra `hub`
        peers = []
    figures = []
    for size, (vocab_size, batch, length, config) in SIZES.items():
        rounds = repeats if size == "small" else max(5, repeats // 3)
        for dtype in dtypes:
            ours = our_step(config, vocab_size, batch, length, dtype)
            ours()
            ours()  # after two steps the process has all the memory that later steps use
            times = alternate({"ours": ours, "floor": floor.step(config, vocab_size, batch, length, dtype)}, rounds)
            shapes = f"{batch * length:,} tokens, dim {config.dim}, {config.n_layers} layers"
            name = f"training step, {size} ({shapes}), {str(dtype).removeprefix('torch.')}"
            figures.append(figure(name, times["ours"], times["floor"], "share of its floor's speed", "0.80", True))
            for meaning, keep_memory in peers:
                pool = Pool()
                arguments = dict(size=size, dtype=dtype, threads=torch.get_num_threads(), keep_memory=keep_memory)
                other = functools.partial(pool.run, 1, "tests.bench.training:peer", timeout=600, **arguments)
                times = alternate({"ours": ours, "peer": other}, rounds)
                pool.close()
                figures.append(figure(name, times["ours"], times["peer"], meaning, "1.05", True))
    return figures
