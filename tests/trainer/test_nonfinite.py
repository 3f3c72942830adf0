"""Steps whose loss or gradient is not finite: they are skipped on all ranks, and end the run if there are too many."""

import os
import signal

import pytest

from data.settings import UserError
from tests.support import fault_cases
from tests.support import run_cases as cases
from trainer.checkpoint.folder import complete_checkpoints
from trainer.metrics import read_lines

POISONED = "tests.support.fault_cases:run_with_nonfinite_steps"


def saved_steps(run):
    return [int(path.name.removeprefix("step-")) for path in complete_checkpoints(run / "checkpoints")]


def skipped_steps(run):
    return [line["step"] for line in read_lines(run / "metrics.jsonl") if line.get("event") == "skipped"]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_nonfinite_step_of_one_rank_is_skipped_on_all(pool, corpus_dir, tmp_path, what):
    more = ["run.name=nan", "train.steps=6", "checkpoint.every=1", "checkpoint.keep=9"]
    ranks = pool.run(2, POISONED, corpus=str(corpus_dir), runs=str(tmp_path), more=more, rank=1, what=what, at=[4])
    for steps in ranks:
        assert [x["moved"] for x in steps] == [True, True, True, False, True, True]
        assert [x["skipped"] for x in steps] == [0, 0, 0, 1, 0, 0]
        assert steps[3]["tokens"] > steps[2]["tokens"]  # the rows of the skipped step are not used again
    lines = read_lines(tmp_path / "nan" / "metrics.jsonl")
    skipped = [x for x in lines if x.get("event") == "skipped"]
    assert [x["step"] for x in skipped] == [4] and skipped[0]["grad_norm"] in ("nan", "inf")
    assert (skipped[0]["loss"] == "nan") == (what == "loss")
    train_lines = [x for x in lines if x["kind"] == "train"]
    assert [x["step"] for x in train_lines] == [1, 2, 3, 4, 5, 6]
    assert [x["step"] for x in train_lines if x["loss"] is None] == ([4] if what == "loss" else [])
    assert "NaN" not in (tmp_path / "nan" / "metrics.jsonl").read_text()  # it would not be valid JSON
    assert saved_steps(tmp_path / "nan") == [1, 2, 3, 5, 6]


@pytest.mark.slow
def test_an_infinity_on_one_rank_halves_the_loss_scale_on_all(pool, corpus_dir, tmp_path):
    words = dict(corpus=str(corpus_dir), runs=str(tmp_path), rank=1, what="gradient", at=[2])
    more = ["run.name=inf", "train.steps=3", "train.dtype=float16"]
    for steps in pool.run(2, POISONED, **words, more=more):
        assert [(x["moved"], x["scale"]) for x in steps] == [(True, 2**16), (False, 2**15), (True, 2**15)]


@pytest.mark.parametrize("limit", [1, 3])
def test_too_many_skipped_steps_end_the_run(corpus_dir, tmp_path, limit):
    more = ["run.name=nan", "checkpoint.every=1", "checkpoint.keep=1", f"train.max_skipped={limit}"]
    steps = fault_cases.run_with_nonfinite_steps(str(corpus_dir), str(tmp_path), more, 0, "loss", list(range(4, 99)))
    error = steps.pop()["error"]
    assert len(steps) == 3 + limit
    assert error.startswith(f"train.max_skipped={limit}: {limit} consecutive steps had no finite gradient; ")
    assert "lower train.max_lr" in error and "resumes from step 3" in error
    assert saved_steps(tmp_path / "nan") == [3]
    assert cases.run(corpus_dir, tmp_path, *more) == 0  # without the faults the run continues
    assert len(cases.losses(tmp_path / "nan")) == 20


def test_a_skipped_last_step_still_ends_the_run(corpus_dir, tmp_path):
    more = ["run.name=nan", "train.steps=4", "checkpoint.every=1"]
    fault_cases.run_with_nonfinite_steps(str(corpus_dir), str(tmp_path), more, 0, "gradient", [4])
    assert saved_steps(tmp_path / "nan")[-1] == 4


def test_skipped_steps_are_counted_across_a_resume(corpus_dir, tmp_path, monkeypatch):
    """Weights that gave no finite gradient are not saved: after a stop those steps are run again."""
    from model import transformer

    words = ["run.name=nan", "train.max_skipped=3", "train.global_batch_size=2"]
    assert cases.run(corpus_dir, tmp_path, *words, "train.stop_at=2") == 0
    monkeypatch.setattr(transformer, "linear_cross_entropy", lambda hidden, *_: hidden.sum() * float("nan"))
    assert cases.run(corpus_dir, tmp_path, *words, "train.stop_at=4") == 0
    with pytest.raises(UserError, match="train.max_skipped=3"):
        cases.run(corpus_dir, tmp_path, *words)
    assert skipped_steps(tmp_path / "nan") == [3, 4, 5]
    assert saved_steps(tmp_path / "nan") == [2]


def test_a_stop_while_steps_are_skipped_saves_no_bad_weights(corpus_dir, tmp_path):
    def event():
        return any(x["step"] == 5 for x in read_lines(tmp_path / "nan" / "metrics.jsonl"))

    more = ["run.name=nan", "checkpoint.every=3", "train.max_skipped=50000", "train.steps=100000"]
    with fault_cases.call_when(event, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        fault_cases.run_with_nonfinite_steps(str(corpus_dir), str(tmp_path), more, 0, "loss", list(range(4, 100000)))
    assert saved_steps(tmp_path / "nan") == [3]
    assert (tmp_path / "nan" / "requeue").exists()
