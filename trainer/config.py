"""The settings of a run: the sections of the trainer, and `Config`, which holds all sections. Imports no torch.

To add a setting, add a field with a description to its section here (or in data/config.py or model/config.py), and use
it as `config.SECTION.KEY`. `--help`, docs/settings.md and the checks of YAML files are derived from the field.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from data.config import DataConfig
from data.settings import ConfigError, Section, read
from model.config import ModelConfig

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Texts = Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]


class TrainConfig(Section):
    """Optimizer, schedule, batch sizes and precision of the training."""

    mutually_exclusive: ClassVar[tuple[str, ...]] = ("steps", "epochs")

    steps: Positive | None = Field(None, description="number of optimizer steps; set either this or train.epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the corpus; set either this or train.steps")
    stop_at: Positive | None = Field(
        None, description="save and end after this step; the learning rate schedule still spans all steps"
    )
    global_batch_size: Positive = Field(256, description="sequences per optimizer step, over all ranks")
    micro_batch_size: Positive = Field(16, description="largest number of sequences that a rank processes at once")
    max_lr: float = Field(6e-4, gt=0, description="peak learning rate")
    min_lr: float = Field(1e-5, ge=0, description="learning rate at the end of the decay")
    warmup_steps: Count = Field(1000, description="steps of linear learning rate warm-up")
    decay_steps: Positive | None = Field(
        None,
        description="cosine: the step at which min_lr is reached, null: the last step; wsd: the length in steps of the "
        "decay at the end, null: a tenth of all steps",
    )
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine",
        description="learning rate after the warm-up: cosine | wsd (max_lr until the decay at the end) | constant",
    )
    weight_decay: float = Field(0.1, ge=0, description="AdamW weight decay of matrices other than the embedding")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW decay rate of the first moment (mean gradient)")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW decay rate of the second moment (mean squared gradient)")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    clip: float = Field(
        1.0, ge=0, description="largest global gradient norm, to which larger gradients are scaled down; 0: no clipping"
    )
    seed: int = Field(0, description="seed of the initial weights, data order, dropout and samples")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="dtype of matrix multiplications: auto | float32 | bfloat16 | float16 (with loss scaling); weights "
        "and gradient sums stay float32",
    )
    reduce: Literal["once", "every"] = Field(
        "once",
        description="reduce gradients over the ranks once per step, or after every micro-batch (slower, less memory): "
        "once | every",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile parts of the model in training: auto | true | false; auto: on CUDA, if a compiler "
        "is found",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="recompute parts of the forward in the backward to save memory: none | selective | full"
    )
    liger: bool = Field(False, description="use Liger's loss kernels on CUDA; elsewhere the built-in loss is used")
    max_skipped: Positive = Field(
        10, description="end the run after this many consecutive steps whose loss or gradient is not finite"
    )
    init_from: str | None = Field(
        None, description="initialize with the weights of a checkpoint, a run, or a folder in the Hugging Face format"
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
    """How the model and the batch are divided over the ranks."""

    replicate: Positive = Field(1, description="number of replicas of the sharded model (HSDP)")
    shard: Positive | Literal["auto"] = Field(
        "auto", description="ranks that each replica is sharded over (FSDP2); auto: number of ranks / replicate"
    )
    expert: Positive | Literal["auto"] = Field(
        "auto",
        description="ranks that the experts are distributed over, a divisor of shard; auto: the largest degree within "
        "a node with at most 10% more expert slots than experts",
    )
    overlap: bool = Field(True, description="overlap the all-to-all of the routed experts with the shared expert")


class CheckpointConfig(Section):
    """When checkpoints are written, and which of them are kept."""

    every: Count = Field(
        1000, description="steps between checkpoints; 0: only at the end of the run and when it is stopped"
    )
    keep: Positive = Field(3, description="number of newest checkpoints to keep")
    keep_every: Count = Field(
        0, description="also keep the checkpoints of steps that are multiples of this number; 0: none"
    )
    async_save: bool = Field(
        False, description="write checkpoints in the background, from a copy of each rank's shard in host memory"
    )
    allow_other_corpus: bool = Field(
        False, description="allow a resume with another corpus that has the same tokenizer"
    )


class EvalConfig(Section):
    """When the validation loss is computed, and on how many stories."""

    every: Count = Field(400, description="steps between evaluations; 0: none during the run")
    batches: Positive | Literal["all"] = Field(
        20, description="validation batches of micro_batch_size stories, the same stories in each evaluation: all | N"
    )
    final: Positive | Literal["all", "none"] = Field(
        "all", description="validation batches at the end of the run: all | N | none"
    )


class SampleConfig(Section):
    """When stories are sampled from the model, and how."""

    every: Count = Field(1000, description="steps between samples; 0: only at the end of the run")
    prompts: Texts = Field(
        ["Once upon a time"], description="prompts to continue; an empty prompt is the bos token alone"
    )
    max_new_tokens: Positive = Field(200, description="largest number of tokens that a sample adds to its prompt")
    temperature: float = Field(0.8, ge=0, description="sampling temperature; 0: always the likeliest token")
    top_k: Count = Field(50, description="sample among this many likeliest tokens; 0: all")


class LogConfig(Section):
    """Log lines and wandb."""

    every: Positive = Field(10, description="steps between log lines (metrics.jsonl records every step)")
    wandb: Literal["offline", "online", "disabled"] = Field(
        "offline", description="mode of wandb: offline | online | disabled"
    )
    project: str = Field("scout", description="wandb project")


class RunConfig(Section):
    """The run's folder, and how its processes use the machine."""

    dir: str = Field("runs", description="folder that contains all runs")
    name: str | None = Field(None, description="name of this run's folder; null: the name of the config file")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device to train on: auto | cpu | cuda")
    threads: Positive | Literal["auto"] = Field("auto", description="CPU threads per rank; auto: cores / local ranks")
    timeout: Positive = Field(600, description="seconds without progress of a rank after which the run ends")
    deterministic: bool = Field(
        False,
        description="use deterministic kernels on CUDA (slower), so that a repeated run is bitwise the same; on a CPU "
        "it always is",
    )

    @property
    def folder(self) -> Path:
        return Path(self.dir) / (self.name or "run")


@dataclass(frozen=True)
class Config:
    """All sections of a run; the name of a field is the name of its section in YAML files and on the command line."""

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
        """The sections by name, in the order of the fields."""
        return dict(vars(self))


SECTION_TYPES: dict[str, type[BaseModel]] = get_type_hints(Config)


def read_config(path: str | Path | None, words: Sequence[str] = ()) -> Config:
    """The settings of a run from a YAML file and from `section.key=value` words, which override it.

    Raises ConfigError if a setting is unknown or invalid, or if two of them do not fit together.
    """
    config = Config(**read(SECTION_TYPES, path, words))
    if config.run.name is None and path is not None:
        config = replace(config, run=config.run.model_copy(update={"name": Path(path).stem}))
    if config.data.seq_len > config.model.max_seq_len:
        raise ConfigError(
            f"data.seq_len={config.data.seq_len}: longer than model.max_seq_len={config.model.max_seq_len}; "
            "lower data.seq_len or raise model.max_seq_len"
        )
    return config
