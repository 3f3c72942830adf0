"""Files of an earlier version can still be read, and a run that it started continues with the losses it recorded.

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
    """The lines of one kind in the metrics of the recorded run."""
    return [line for line in read_lines(RECORDED / "run" / "metrics.jsonl") if line["kind"] == kind]


def test_recorded_run_resumes_with_the_same_losses(pool, tmp_path):
    shutil.copytree(RECORDED / "run", tmp_path / "run")
    assert pool.run(2, "tests.compatibility.cases:resume", runs=str(tmp_path)) == [0, 0]
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 11))
    keys = ("loss", "grad_norm", "z_loss", "router_entropy", "tokens", "lr")
    values = [[line[key] for key in keys] for line in train]
    expected_values = [[line[key] for key in keys] for line in recorded("train")]
    evaluations = [line["loss"] for line in lines if line["kind"] == "eval"]
    expected_evaluations = [line["loss"] for line in recorded("eval")]
    if runs_on_the_recording_machine():
        assert values == expected_values
        assert evaluations == expected_evaluations
    else:
        for step_values, expected_step_values in zip(values, expected_values, strict=True):
            assert step_values == pytest.approx(expected_step_values, rel=1e-6)
        assert evaluations == pytest.approx(expected_evaluations, rel=1e-6)


def runs_on_the_recording_machine() -> bool:
    return json.loads((RECORDED / "machine.json").read_text()) == describe_machine()


def describe_machine() -> dict[str, str]:
    """The processor's instructions and the version of torch, which decide the order of a CPU's additions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    names = ("vendor_id", "cpu family", "model", "flags")
    text = "; ".join(processor.get(name, "unknown") for name in names)
    return {"processor": hashlib.sha256(text.encode()).hexdigest(), "torch": torch.__version__}


def test_recorded_corpus_is_up_to_date(capsys):
    """Its settings and its source have not changed: the storybook still writes the same stories."""
    config = RECORDED / "config.yaml"
    assert prepare(["--config", str(config), f"data.dir={RECORDED / 'corpus'}"]) == 0
    assert "ready" in capsys.readouterr().out


def test_recorded_checkpoint_loads_in_one_process():
    model, tokenizer, config = load_model(RECORDED / "run")
    assert config.train.steps == 10 and tokenizer.vocab_size == 320
    assert all(parameter.isfinite().all() for parameter in model.parameters())
