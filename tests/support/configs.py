"""Settings and model configs of tests: a corpus, a model and a run that take seconds on a CPU."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.transformer import Transformer

CORPUS = ["data.stories=1200", "data.vocab_size=320", "data.validation=0.05", "data.shard_tokens=40000"]
MODEL = ["model.dim=16", "model.n_layers=2", "model.n_heads=2", "model.expert_dim=16", "model.n_experts=5"]
MODEL += ["model.nope_every=2", "model.max_seq_len=512", "model.balance_rate=0.01"]
TRAIN = ["train.steps=20", "train.global_batch_size=6", "train.micro_batch_size=2", "train.max_lr=3e-3"]
TRAIN += ["train.warmup_steps=5", "train.dtype=float32", "train.seed=1", "data.seq_len=32", "run.threads=1"]
QUIET = ["log.wandb=disabled", "sample.every=0", "sample.max_new_tokens=8", "eval.every=0", "eval.final=none"]

# All options whose results could depend on how the model is distributed over processes.
ALL_OPTIONS = ["data.mask_documents=true", "model.attention_chunk=20", "model.attention_dropout=0.1"]
ALL_OPTIONS += ["model.dropout=0.1", "model.top_k=2", "model.noisy_top_k=true", "model.aux_loss_weight=0.01"]
ALL_OPTIONS += ["train.recompute=full"]

TINY_MODEL = ModelConfig(dim=8, n_heads=2, n_layers=1, expert_dim=8, n_experts=3)
PRIME_MODEL = ModelConfig(dim=24, n_layers=2, n_heads=2, expert_dim=12, n_experts=31, moe_every=2, max_seq_len=32)
# Dense layers and MoE, chunks and NoPE, grouped heads.
SMALL_MODEL: dict[str, Any] = dict(
    dim=16,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=24,
    expert_dim=20,
    n_experts=5,
    moe_every=2,
    nope_every=4,
    max_seq_len=64,
    attention_chunk=8,
    temperature_floor=4,
)
SMALL_VOCAB = 40


def fp64_model(**keys: Any) -> Transformer:
    """A model of SMALL_MODEL with other `keys`, which computes in fp64."""
    model = Transformer(ModelConfig(**{**SMALL_MODEL, **keys}), SMALL_VOCAB).double()
    model.compute_dtype = torch.float64
    model.init_weights(1)
    return model


def random_tokens(rows: int = 2, length: int = 30, seed: int = 0) -> Tensor:
    """Tokens (rows, length) of SMALL_VOCAB, without pad, bos, eos and unk."""
    return torch.randint(4, SMALL_VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def run_arguments(corpus: Path, runs: Path, *more: str) -> list[str]:
    """The arguments `section.key=value` of a run that takes seconds; those in `more` override the others."""
    return [*CORPUS, *MODEL, *TRAIN, *QUIET, f"data.dir={corpus}", f"run.dir={runs}", *more]
