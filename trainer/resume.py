"""The checkpoint from which a run resumes: whether it fits the settings, and what has changed since it was saved.

`checkpoint_fields` is what a save records for these comparisons.
"""

from dataclasses import asdict
from typing import Any

import torch

from data.settings import UserError
from data.shards import Corpus
from data.tokenizer import Tokenizer
from parallel import collectives
from trainer.checkpoint.folder import Checkpoint, newest_checkpoint, no_usable_checkpoint
from trainer.config import Config
from trainer.fault_tolerance.errors import AlreadyFinished
from trainer.hub.mapping import MAY_DIFFER_KEYS
from trainer.machine import dtype_name
from trainer.metrics import read_lines
from trainer.optimizer import learning_rate
from trainer.run import Run

# the order of the training rows depends on these settings
DATA_ORDER_KEYS = ("train.global_batch_size", "train.seed", "data.seq_len", "data.pack")


def find_checkpoint(config: Config, corpus: Corpus, tokenizer: Tokenizer) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from (None for a new run), and a line for each newer one that was skipped.

    Rank 0 searches the folder. Raises UserError if there are checkpoints but none can be used, or if they are of
    another model or corpus.
    """
    folder = config.run.folder
    found, skipped_checkpoints = collectives.broadcast(
        newest_checkpoint(folder / "checkpoints") if collectives.rank() == 0 else None
    )
    if found is None:
        if skipped_checkpoints:
            raise UserError(no_usable_checkpoint(folder / "checkpoints", skipped_checkpoints))
        return None, []
    manifest = found.manifest
    may_change = {f"model.{key}" for key in MAY_DIFFER_KEYS}
    changed = changes(manifest["config"], config)
    refused = [line for key, line in changed.items() if key.startswith("model.") and key not in may_change]
    if refused:
        raise UserError(f"{folder}: made with another model ({'; '.join(refused)}); choose another run.name=")
    if manifest["tokenizer"] != tokenizer.hash:
        size = f"vocabulary {manifest['vocab_size']} -> {tokenizer.vocab_size}"
        raise UserError(f"{folder}: made with another tokenizer ({size}); choose another run.name=")
    if manifest["corpus"] != corpus.hash and not config.checkpoint.allow_other_corpus:
        raise UserError(
            f"{folder}: made with another corpus than {config.data.dir}; choose another run.name=, or continue with "
            "checkpoint.allow_other_corpus=true"
        )
    return found, skipped_checkpoints


def raise_if_finished(config: Config, found: Checkpoint | None, steps: int) -> None:
    """Raises AlreadyFinished on all ranks if the last step and the final evaluation are done."""
    if found is None:
        return
    folder = config.run.folder
    lines = read_lines(folder / "metrics.jsonl")
    finished_steps = [line["step"] for line in lines if line.get("event") == "finished"]
    is_finished = found.step > steps or (found.step == steps and found.step in finished_steps)
    if collectives.broadcast(is_finished):
        hint = "set run.name= for another run, or train.steps= to continue this one"
        raise AlreadyFinished(f"{folder}: finished at step {found.step}; {hint}")


def resume_notes(manifest: dict[str, Any], run: Run, threads: int) -> list[str]:
    """A line for each difference between this launch and the one that wrote the checkpoint."""
    changed = changes(manifest["config"], run.config)
    notes = [f"changed since step {manifest['step']}: {line}" for line in changed.values()]
    if manifest["corpus"] != run.corpus.hash or any(key in changed for key in DATA_ORDER_KEYS):
        notes.append("the data order changes at this step: rows of this epoch may be repeated or skipped")
    if manifest["corpus"] != run.corpus.hash:
        notes.append(f"continuing on another corpus, {run.config.data.dir}")
    old_rate = learning_rate(run.config.train, manifest["step"], manifest["steps"])
    new_rate = learning_rate(run.config.train, manifest["step"], run.steps)
    if old_rate != new_rate:
        steps = f"{run.steps} steps instead of {manifest['steps']}"
        notes.append(f"the learning rate jumps from {old_rate:.2e} to {new_rate:.2e}, because it decays over {steps}")
    now = {
        "world": run.world.size,
        "degrees": asdict(run.degrees),
        "threads": threads,
        "device": run.device.type,
        "dtype": dtype_name(run.dtype),
        "torch": torch.__version__,
    }
    moved = [f"{key} {manifest[key]} -> {value}" for key, value in now.items() if manifest[key] != value]
    if moved:
        notes.append(
            f"losses from here on differ by rounding from those of an uninterrupted run, because of {', '.join(moved)}"
        )
    return notes


def changes(before: dict[str, dict[str, Any]], config: Config) -> dict[str, str]:
    """Settings that differ from those of a checkpoint: `section.key` -> `section.key: old -> new`.

    The section `run` is not compared: it changes no results.
    """
    changed = {}
    for name, section in config.sections().items():
        if name == "run":
            continue
        old_values = before.get(name, {})
        for key, value in section.model_dump().items():
            if key in old_values and old_values[key] != value:
                changed[f"{name}.{key}"] = f"{name}.{key}: {old_values[key]} -> {value}"
    return changed


def checkpoint_fields(run: Run) -> dict[str, Any]:
    """Fields of a checkpoint's manifest besides the tensors: what a resume restores or compares."""
    return {
        "config": {name: section.model_dump() for name, section in run.config.sections().items()},
        "steps": run.steps,
        "tokens": run.tokens,
        "skipped": run.skipped_steps,
        "loss_scale": asdict(run.scale),
        "vocab_size": run.tokenizer.vocab_size,
        "tokenizer": run.tokenizer.hash,
        "corpus": run.corpus.hash,
        "torch": torch.__version__,
        "world": run.world.size,
        "degrees": asdict(run.degrees),
        "threads": torch.get_num_threads(),
        "device": run.device.type,
        "dtype": dtype_name(run.dtype),
    }
