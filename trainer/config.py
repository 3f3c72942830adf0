"""The settings of a run: all sections together, and the checks that need more than one of them. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from data.config import DataConfig
from data.settings import ConfigError, Section, read
from model.config import ModelConfig

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Texts = Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]


class TrainConfig(Section):
    """The optimization."""

    alternatives: ClassVar[tuple[str, ...]] = ("steps", "epochs")

    steps: Positive | None = Field(None, description="optimizer steps; give this or epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the corpus, instead of steps")
    stop_at: Positive | None = Field(None, description="end cleanly after this step; the schedule stays as it is")
    global_batch_size: Positive = Field(256, description="sequences a step, over all ranks")
    micro_batch_size: Positive = Field(16, description="sequences a rank takes at a time, at most")
    max_lr: float = Field(6e-4, gt=0, description="peak learning rate")
    min_lr: float = Field(1e-5, ge=0, description="learning rate at the end of the decay")
    warmup_steps: Count = Field(1000, description="steps of linear warm-up")
    decay_steps: Positive | None = Field(
        None,
        description="cosine: the step at which min_lr is reached, null: the last; wsd: how many steps the decay at the "
        "end takes, null: a tenth of all",
    )
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after the warm-up: cosine | wsd (max_lr until the decay at the end) | constant"
    )
    weight_decay: float = Field(0.1, ge=0, description="AdamW's, on matrices other than the embedding")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the mean gradient")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the mean square")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    seed: int = Field(0, description="of weights, data order, dropout and samples")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of the products: auto | float32 | bfloat16 | float16 (with loss scaling); weights and sums stay "
        "float32",
    )
    reduce: Literal["once", "every"] = Field(
        "once", description="reduce gradients once a step, or at every micro-batch (slower, less memory)"
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile of parts in training: auto | true | false; auto: on CUDA, where there is a compiler",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="run parts of the forward again in the backward, for less memory: none | selective | full"
    )
    liger: bool = Field(False, description="the loss by Liger's kernels on CUDA; elsewhere the built-in one")
    max_skipped: Positive = Field(10, description="stop after this many steps in a row without a finite gradient")
    init_from: str | None = Field(
        None, description="begin with the weights of a checkpoint, a run, or a folder in the Hugging Face layout"
    )

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps={self.steps}, epochs={self.epochs}: give exactly one of train.steps, train.epochs")
        if self.min_lr > self.max_lr:
            raise ValueError(f"min_lr={self.min_lr}: above max_lr={self.max_lr}")
        if self.schedule == "wsd" and self.steps and self.warmup_steps + (self.decay_steps or 0) > self.steps:
            raise ValueError(
                f"decay_steps={self.decay_steps}: does not fit into steps={self.steps} after "
                f"warmup_steps={self.warmup_steps}"
            )
        return self


class ParallelConfig(Section):
    """How ranks are laid out."""

    replicate: Positive = Field(1, description="copies of the sharded model (HSDP)")
    shard: Positive | Literal["auto"] = Field("auto", description="ranks that share one copy (FSDP2); auto: the rest")
    expert: Positive | Literal["auto"] = Field(
        "auto", description="ranks that the experts are spread over; divides shard; auto: the most that fit a node well"
    )
    overlap: bool = Field(True, description="send rows to the experts while the shared expert works")


class CheckpointConfig(Section):
    every: Count = Field(1000, description="steps between checkpoints; 0: only at the end and when stopped")
    keep: Positive = Field(3, description="newest checkpoints kept")
    keep_every: Count = Field(0, description="those at multiples of so many steps stay for good; 0: none")
    async_save: bool = Field(False, description="write beside the training, from a copy of each rank's part in memory")
    allow_other_corpus: bool = Field(False, description="go on with another corpus, of the same tokenizer")


class EvalConfig(Section):
    every: Count = Field(400, description="steps between evaluations; 0: none during the run")
    batches: Positive | Literal["all"] = Field(
        20, description="validation batches of micro_batch_size stories, the same each time: all | N"
    )
    final: Positive | Literal["all", "none"] = Field("all", description="the same for the end of the run; none: skip")


class SampleConfig(Section):
    every: Count = Field(1000, description="steps between sampled stories; 0: only at the end")
    prompts: Texts = Field(["Once upon a time"], description="beginnings of the stories; an empty one is bos alone")
    max_new_tokens: Positive = Field(200, description="longest continuation")
    temperature: float = Field(0.8, ge=0, description="0: always the likeliest token")
    top_k: Count = Field(50, description="sample among this many likeliest tokens; 0: all")


class LogConfig(Section):
    every: Positive = Field(10, description="steps between printed lines (metrics.jsonl gets every step)")
    wandb: Literal["offline", "online", "disabled"] = Field("offline", description="offline | online | disabled")
    project: str = Field("scout", description="wandb's project")


class RunConfig(Section):
    dir: str = Field("runs", description="folder of all runs")
    name: str | None = Field(None, description="folder of this run; null: the config file's stem")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto | cpu | cuda")
    threads: Positive | Literal["auto"] = Field("auto", description="CPU threads a rank; auto: cores / local ranks")
    timeout: Positive = Field(600, description="seconds after which a silent rank ends the run")
    deterministic: bool = Field(
        False, description="the same bits on every start of the same run, on CUDA too (slower); a CPU's are anyway"
    )

    @property
    def folder(self) -> Path:
        return Path(self.dir) / (self.name or "run")


SECTION_TYPES: dict[str, type[BaseModel]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "parallel": ParallelConfig,
    "checkpoint": CheckpointConfig,
    "eval": EvalConfig,
    "sample": SampleConfig,
    "log": LogConfig,
    "run": RunConfig,
}


@dataclass(frozen=True)
class Config:
    """All sections of a run."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    eval: EvalConfig
    sample: SampleConfig
    log: LogConfig
    run: RunConfig

    def sections(self) -> dict[str, Any]:
        return dict(vars(self))


def read_config(path: str | Path | None, words: Sequence[str] = ()) -> Config:
    """The settings of a run from a YAML file and `section.key=value` words over it. Raises ConfigError."""
    config = Config(**read(SECTION_TYPES, path, words))
    if config.run.name is None and path is not None:
        config = replace(config, run=config.run.model_copy(update={"name": Path(path).stem}))
    if config.data.seq_len > config.model.max_seq_len:
        raise ConfigError(
            f"data.seq_len={config.data.seq_len}: longer than model.max_seq_len={config.model.max_seq_len}; "
            "raise the one or lower the other"
        )
    return config
