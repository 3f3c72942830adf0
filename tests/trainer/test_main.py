"""The commands as a user starts them, in new processes."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from data.settings import SECTIONS, key_table
from tests.support import run_cases as cases
from tests.support.settings_page import PAGE, tables
from trainer.config import SECTION_TYPES, Config
from trainer.metrics import read_lines

ROOT = Path(__file__).parents[2]


def call(*words, cwd=ROOT, **env):
    command = [sys.executable, "-m", "trainer.main", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env})


def test_help_lists_every_setting():
    out = call("--help").stdout
    for key, default, meaning in key_table(SECTION_TYPES):
        assert f"{key}={default}" in out and meaning in out


def test_the_settings_page_lists_the_same_keys_as_help():
    """If this fails, run `python -m tests.support.settings_page`."""
    assert PAGE.read_text(encoding="utf-8").endswith(tables())


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config", "launch/nothing.yaml"], "launch/nothing.yaml: no such config file; that folder holds"),
        (["train.stps=3"], "train.stps: unknown key; did you mean train.steps?"),
        (["train.steps=many"], "train.steps=many: should be an integer"),
        (["train.steps=3", "model.n_heads=5"], "n_heads=5: does not divide dim=768"),
        (["train.steps=3", "data.seq_len=4096"], "data.seq_len=4096: longer than model.max_seq_len=1024"),
        ([], "give exactly one of train.steps, train.epochs"),
    ],
)
def test_mistakes_are_one_line_before_torch_is_imported(tmp_path, words, message):
    """A `torch` that fails on import hides the real one."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    result = call(*words, PYTHONPATH=str(tmp_path))
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and not result.stdout


COMMANDS = ["data.prepare", "trainer.main", "trainer.evaluate", "trainer.generate", "trainer.play"]
COMMANDS += ["trainer.hub", "trainer.hub export", "trainer.hub import"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_flag_is_one_line_and_exit_code_2(command):
    done = subprocess.run(
        [sys.executable, "-m", *command.split(), "--wrong=1"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and f"; see python -m {command.split()[0]}" in done.stderr


def test_sections_of_the_config_are_those_of_the_reader():
    assert tuple(SECTION_TYPES) == SECTIONS == tuple(field.name for field in fields(Config))


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["--list", "run.dir=nowhere"]])
def test_information_flags_need_no_torch(tmp_path, words):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    assert call(*words, PYTHONPATH=str(tmp_path)).returncode == 0


def test_only_rank_0_prints_a_mistake():
    assert call("train.stps=3", RANK="1", WORLD_SIZE="2").stderr == ""


def test_another_package_named_data_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import data, trainer"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and "the package `data` was imported from" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "scout", "scout-17b-16e"])
def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, name):
    words = ["--config", str(ROOT / "launch" / f"{name}.yaml"), "--dry-run", f"run.dir={tmp_path}/runs"]
    result = call(*words, f"data.dir={tmp_path}/none", WORLD_SIZE="8", LOCAL_WORLD_SIZE="8")
    assert result.returncode == 0, result.stderr
    for word in ("max_lr:", "mesh", "parameters", "memory", "filler rows", "steps", "tokens"):
        assert word in result.stdout
    for word in ("TFLOP per step", "optimizer state", "activations"):
        assert word in result.stdout
    if name == "scout":
        assert "1,276," in result.stdout  # about 1.2 billion parameters
        assert "262,144 tokens: 2 micro-batches of 16 rows per rank, 0 filler rows" in result.stdout
    if name == "scout-17b-16e":  # the counts of transformers' Llama4ForCausalLM for the published config
        assert "107,769,861,120 in all, 17,172,894,720 active per token" in result.stdout
    assert not list(tmp_path.iterdir())


def torchrun(words):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*launch, "-m", "trainer.main", *words]


def start(corpus, runs):
    """A long run on processes that torchrun starts, after its first steps."""
    command = torchrun(cases.run_arguments(corpus, runs, "run.name=live", "train.steps=100000"))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    metrics = Path(runs) / "live" / "metrics.jsonl"
    for _ in range(600):
        if sum(x["kind"] == "train" for x in read_lines(metrics)) >= 3:
            return process, metrics
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("no step in 60 s")


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_and_saves_all(corpus_dir, tmp_path):
    process, metrics = start(corpus_dir, tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("/proc/PID/task/*/children, which lists the workers, does not exist")
    worker = int(children.read_text().split()[-1])
    os.kill(worker, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in out + err
    last = out.strip().splitlines()[-1]
    step = len(cases.losses(metrics.parent))
    assert last.startswith(f"stopped at step {step} of 100000, saved at {step}; to resume: torchrun --nproc_per_node=2")
    assert out.splitlines()[0] == "new run" and "live:" in out.splitlines()[1]
    listed = call("--list", f"run.dir={tmp_path}").stdout.splitlines()
    assert listed[1].split()[:2] == ["live", f"{step}/100000"] and listed[1].endswith("not finished")


@pytest.mark.slow
def test_two_runs_with_torchrun_have_the_same_losses(corpus_dir, tmp_path):
    for number in "12":
        subprocess.run(torchrun(cases.run_arguments(corpus_dir, tmp_path / number, "run.name=r")), check=True, cwd=ROOT)
    losses = [cases.losses(tmp_path / number / "r") for number in "12"]
    assert losses[0] == losses[1] and len(losses[0]) == 20
