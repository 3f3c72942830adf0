"""Runs of seconds for the pool's processes, and for this one."""

from pathlib import Path

from trainer.checkpoint import complete, digest
from trainer.config import Config, read_config
from trainer.loop import train
from trainer.metrics import read_lines

MODEL = ["model.dim=16", "model.n_layers=2", "model.n_heads=2", "model.expert_dim=16", "model.n_experts=5"]
MODEL += ["model.nope_every=2", "model.max_seq_len=512", "model.balance_rate=0.01"]
TRAIN = ["train.steps=20", "train.global_batch_size=6", "train.micro_batch_size=2", "train.max_lr=3e-3"]
TRAIN += ["train.warmup_steps=5", "train.dtype=float32", "train.seed=1"]
QUIET = ["log.wandb=disabled", "sample.every=0", "sample.max_new_tokens=8", "eval.every=0", "eval.final=none"]


def words(corpus: Path, runs: Path, *more: str) -> list[str]:
    """The settings of a run of seconds, as a user would type them."""
    data = [f"data.dir={corpus}", "data.stories=1200", "data.vocab_size=320", "data.validation=0.05"]
    data += ["data.shard_tokens=40000", "data.seq_len=32"]
    return [*data, *MODEL, *TRAIN, *QUIET, f"run.dir={runs}", "run.threads=1", *more]


def config(corpus: Path, runs: Path, *more: str) -> Config:
    return read_config(None, words(corpus, runs, *more))


def run(corpus: Path, runs: Path, *more: str) -> int:
    return train(config(corpus, runs, *more))


def run_words(corpus: str, runs: str, more: list[str]) -> int:
    """`run` for the pool."""
    return run(Path(corpus), Path(runs), *more)


def losses(folder: Path) -> list[float]:
    """Training losses of a run by step, which must count up from 1."""
    lines = [x for x in read_lines(folder / "metrics.jsonl") if x["kind"] == "train"]
    assert [x["step"] for x in lines] == list(range(1, len(lines) + 1))
    return [x["loss"] for x in lines]


def last_digest(folder: Path) -> str:
    """Of weights and biases of a run's newest checkpoint."""
    from trainer.evaluate import load_model

    return digest(load_model(complete(folder / "checkpoints")[-1])[0])
