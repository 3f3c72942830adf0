"""Whole runs of launch/tiny.yaml with the project's commands: train, resume, evaluate, generate, and two equal runs."""

import json
from pathlib import Path
from typing import NamedTuple

from tests.gpu.check import project
from tests.gpu.check.compare import relative_change
from tests.gpu.check.report import at_least, at_most, exactly
from tests.gpu.check.runner import Check

CORPUS = ["data.source=storybook", "data.stories=8000", "data.vocab_size=1024"]
TIMEOUT_S = 150.0


class Sizes(NamedTuple):
    """Steps of the runs, and limits for what the model must have learned by then."""

    stop: int  # the first start of the run ends after this step
    steps: int  # of the whole run
    fixed: int  # of each of the two runs that must be equal
    every: int  # steps between evaluations, and between checkpoints
    loss: float  # largest loss at the stop
    excess: float  # largest excess over the corpus's true entropy


# No model can be below the corpus's true entropy, except for the noise of the evaluated stories. A CPU in fp32 had a
# loss of 2.80 in step 60 and 1.44 in step 300, and an excess of 0.38 after step 200, the last evaluation before the
# stop.
ON_GPU = Sizes(300, 400, 40, 100, 1.7, 0.6)
ON_CPU = Sizes(60, 80, 10, 20, 3.4, 4.0)


def sizes(check: Check) -> Sizes:
    return ON_GPU if check.on_gpu else ON_CPU


def _run_settings(check: Check) -> list[str]:
    """Settings of the run that is stopped and resumed."""
    size = sizes(check)
    return [
        f"train.steps={size.steps}",
        f"checkpoint.every={size.every}",
        f"eval.every={size.every}",
        "checkpoint.async_save=true",
        "sample.max_new_tokens=60",
    ]


def run(check: Check) -> None:
    prepare_corpus(check)
    check.case("train", lambda: _train(check))
    check.case("resume", lambda: _resume(check))
    check.case("evaluate", lambda: _evaluate(check))
    check.case("generate", lambda: _generate(check))
    check.case("deterministic", lambda: _deterministic(check), seconds=30)


def prepare_corpus(check: Check) -> None:
    """Prepare a storybook corpus for the runs of all parts. Raises RuntimeError if the command fails."""
    if not (corpus(check) / "manifest.json").exists():
        arguments = project.config_arguments(project.TINY, [*CORPUS, f"data.dir={corpus(check)}"])
        log = check.options.out / "prepare.log"
        done = project.command("data.prepare", *arguments, log=log, timeout=_timeout(check))
        if done.code:
            raise RuntimeError(f"data.prepare failed with exit code {done.code}: {done.tail}")


def corpus(check: Check) -> Path:
    return check.options.scratch / "corpus"


def folder(check: Check, name: str) -> Path:
    return check.options.scratch / "runs" / name


def _timeout(check: Check) -> float:
    return max(1.0, min(TIMEOUT_S, check.seconds_left()))


def _trainer(check: Check, name: str, log: str, *settings: str) -> project.CommandResult:
    """Run trainer.main as the run `name`; its output is written to LOG.log."""
    all_settings = [
        *CORPUS,
        f"data.dir={corpus(check)}",
        f"run.dir={check.options.scratch / 'runs'}",
        f"run.name={name}",
        f"run.device={check.options.device}",
        "log.wandb=disabled",
        *settings,
    ]
    path = check.options.out / f"{log}.log"
    arguments = project.config_arguments(project.TINY, all_settings)
    return project.command("trainer.main", *arguments, log=path, timeout=_timeout(check))


def _train(check: Check) -> None:
    size = sizes(check)
    done = _trainer(check, "tiny", "train", *_run_settings(check), f"train.stop_at={size.stop}")
    train = project.metrics(folder(check, "tiny"), "train")
    evals = project.metrics(folder(check, "tiny"), "eval")
    steady = sorted(line["tokens_per_second"] for line in train[3:])
    figures = {
        "code": done.code,
        "steps": len(train),
        "loss": train[-1]["loss"] if train else None,
        "evaluations": len(evals),
        "excess": evals[-1]["excess"] if evals else None,
        "tokens_per_second": steady[len(steady) // 2] if steady else None,
        "error": done.tail,
    }
    limits = {
        "code": exactly(0),
        "steps": exactly(size.stop),
        "loss": at_most(size.loss),
        "evaluations": at_least(2),
        "excess": (-0.02, size.excess),
    }
    check.report.check("train", limits, **figures)


def _resume(check: Check) -> None:
    size = sizes(check)
    done = _trainer(check, "tiny", "resume", *_run_settings(check))
    train = project.metrics(folder(check, "tiny"), "train")
    steps = [line["step"] for line in train]
    losses = {line["step"]: line["loss"] for line in train}
    figures = {
        "code": done.code,
        "resumed": int(f"resumed from step {size.stop}" in done.stdout + done.stderr),
        "missing_steps": len(set(range(1, size.steps + 1)) - set(steps)) + len(steps) - len(set(steps)),
        "jump": relative_change(losses.get(size.stop + 1, float("nan")), losses.get(size.stop, float("nan"))),
        "picture": int((folder(check, "tiny") / "loss.png").exists()),
        "error": done.tail,
    }
    # The losses of consecutive batches differ by a few percent. If the run started from other weights, it would double.
    limits = {
        "code": exactly(0),
        "resumed": exactly(1),
        "missing_steps": exactly(0),
        "jump": at_most(0.2),
        "picture": exactly(1),
    }
    check.report.check("resume", limits, **figures)


def _evaluate(check: Check) -> None:
    log = check.options.out / "evaluate.log"
    run = folder(check, "tiny")
    done = project.command("trainer.evaluate", "--checkpoint", str(run), log=log, timeout=_timeout(check))
    lines = done.stdout.splitlines()
    loss = json.loads(lines[-1])["loss"] if done.code == 0 and lines else None
    evals = project.metrics(run, "eval")
    inside = evals[-1]["loss"] if evals else float("nan")
    change = relative_change(loss, inside) if loss is not None else float("nan")
    # The command computes in fp32 and the run in bf16, which changes the mean over thousands of tokens by far less.
    limits = {"code": exactly(0), "change": at_most(5e-3)}
    check.report.check("evaluate", limits, code=done.code, loss=loss, change=change, error=done.tail)


def _generate(check: Check) -> None:
    log = check.options.out / "generate.log"
    arguments = ["--checkpoint", str(folder(check, "tiny")), "--prompt", "Once a", "--max-new-tokens", "40"]
    done = project.command("trainer.generate", *arguments, log=log, timeout=_timeout(check))
    limits = {"code": exactly(0), "characters": at_least(20)}
    check.report.check("generate", limits, code=done.code, characters=len(done.stdout.strip()), error=done.tail)


def _deterministic(check: Check) -> None:
    """Two runs with the same settings must have the same losses to the last bit."""
    fixed = sizes(check).fixed
    settings = [f"train.steps={fixed}", "run.deterministic=true", "eval.every=0", "eval.final=none"]
    settings += ["checkpoint.every=0", "sample.max_new_tokens=3"]
    first = _trainer(check, "deterministic-a", "deterministic-a", *settings)
    second = _trainer(check, "deterministic-b", "deterministic-b", *settings)
    first_losses = [line["loss"] for line in project.metrics(folder(check, "deterministic-a"), "train")]
    second_losses = [line["loss"] for line in project.metrics(folder(check, "deterministic-b"), "train")]
    figures = {
        "code": max(first.code, second.code),
        "steps": min(len(first_losses), len(second_losses)),
        "different_losses": sum(x != y for x, y in zip(first_losses, second_losses, strict=False)),
        "error": first.tail + second.tail,
    }
    limits = {"code": exactly(0), "steps": exactly(fixed), "different_losses": exactly(0)}
    check.report.check("deterministic", limits, **figures)
