"""Files that an earlier version wrote still open, and a run that it began continues with the losses that it recorded.

The folder holds a corpus, a checkpoint of step 5 (two processes, `parallel.expert=2`) and metrics.jsonl of all 10
steps, with dropout, router noise, chunked attention and uneven experts, so that every random stream takes part.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from data.prepare import main as prepare
from tests.compatibility.cases import RECORDED
from trainer.checkpoint.load import load_model
from trainer.metrics import read_lines


def recorded(kind: str) -> list[dict]:
    return [line for line in read_lines(RECORDED / "run" / "metrics.jsonl") if line["kind"] == kind]


def test_the_recorded_run_resumes_with_the_same_losses(pool, tmp_path):
    shutil.copytree(RECORDED / "run", tmp_path / "run")
    assert pool.run(2, "tests.compatibility.cases:resume", runs=str(tmp_path)) == [0, 0]
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 11))
    keys = ("loss", "grad_norm", "z_loss", "router_entropy", "tokens", "lr")
    got, expected = ([[line[key] for key in keys] for line in side] for side in (train, recorded("train")))
    evaluations = ([line["loss"] for line in side if line["kind"] == "eval"] for side in (lines, recorded("eval")))
    if runs_on_the_recording_machine():
        assert got == expected
        assert len(set(map(tuple, evaluations))) == 1
    else:
        for ours, theirs in zip(got, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
        ours, theirs = evaluations
        assert ours == pytest.approx(theirs, rel=1e-6)


def runs_on_the_recording_machine() -> bool:
    return json.loads((RECORDED / "machine.json").read_text()) == describe_machine()


def describe_machine() -> dict[str, str]:
    """What decides the order in which a CPU adds: its instructions, and the version of torch."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    names = ("vendor_id", "cpu family", "model", "flags")
    text = "; ".join(processor.get(name, "unknown") for name in names)
    return {"processor": hashlib.sha256(text.encode()).hexdigest(), "torch": torch.__version__}


def test_the_recorded_corpus_is_ready(capsys):
    """Its settings and its source are still the same: the storybook writes the stories that it wrote then."""
    config = RECORDED / "config.yaml"
    assert prepare(["--config", str(config), f"data.dir={RECORDED / 'corpus'}"]) == 0
    assert "ready" in capsys.readouterr().out


def test_the_recorded_checkpoint_loads_in_one_process():
    model, tokenizer, config = load_model(RECORDED / "run")
    assert config.train.steps == 10 and tokenizer.vocab_size == 320
    assert all(parameter.isfinite().all() for parameter in model.parameters())
