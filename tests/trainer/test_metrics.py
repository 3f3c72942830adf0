"""metrics.jsonl, log lines, the progress bar, wandb, the plot of the loss and the table of runs."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from trainer.config import LogConfig
from trainer.metrics import MetricsFile, Reporter, read_lines
from trainer.report import list_runs, plot_loss

STEP = {"tokens": 10, "loss": 1.5, "lr": 1e-3, "tokens_per_second": 1234.5, "step_seconds": 2.0}


def test_resume_removes_torn_and_later_lines(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        file.write({"kind": "train", "step": step})
    with file.path.open("a") as f:
        f.write('{"kind": "tr')
    file.cut(3)
    assert [x["step"] for x in read_lines(file.path)] == [1, 2, 3]
    file.write({"kind": "train", "step": 4})
    assert [x["step"] for x in read_lines(file.path)] == [1, 2, 3, 4]


def test_log_lines_without_a_terminal(tmp_path, capsys):
    reporter = Reporter(tmp_path, LogConfig(every=2, wandb="disabled"), "r", enabled=True)
    reporter.start(0, 5, {})
    for step in range(1, 6):
        reporter.train(step, STEP)
    reporter.close()
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out] == ["step 2/5", "step 4/5", "step 5/5"]
    assert out[0] == "step 2/5: loss 1.500, 1,234 tokens/s, lr 1.00e-03, 0:06 left"
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 6


@pytest.mark.parametrize(
    ("speed", "shown"), [({"tflops": 306.7, "mfu": 0.31}, "31% MFU"), ({"tflops": 12.34}, "12.3 TFLOP/s")]
)
def test_log_line_on_a_gpu_has_speed_and_memory(tmp_path, capsys, speed, shown):
    reporter = Reporter(tmp_path, LogConfig(every=1, wandb="disabled"), "r", enabled=True)
    reporter.start(0, 5, {})
    reporter.train(1, {**STEP, **speed, "memory_gib": 28.54, "memory_reserved_gib": 30.1})
    reporter.train(2, {**STEP, "tflops": 0.01, "memory_gib": 0.4})
    on_gpu, on_cpu = capsys.readouterr().out.splitlines()
    assert on_gpu == f"step 1/5: loss 1.500, 1,234 tokens/s, {shown}, 28.5 GiB, lr 1.00e-03, 0:08 left"
    assert on_cpu == "step 2/5: loss 1.500, 1,234 tokens/s, lr 1.00e-03, 0:06 left"


def test_disabled_reporter_writes_and_prints_nothing(tmp_path, capsys):
    reporter = Reporter(tmp_path, LogConfig(), "r", enabled=False)
    reporter.start(0, 5, {})
    reporter.train(1, STEP)
    reporter.event(1, "x")
    reporter.log("hello")
    reporter.close()
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


SHOW = """
import sys
from pathlib import Path
from trainer.config import LogConfig
from trainer.metrics import Reporter
r = Reporter(Path(sys.argv[1]), LogConfig(wandb="disabled"), "r", True)
r.start(0, 3, {})
for step in (1, 2, 3):
    r.train(step, dict(tokens=10, loss=1.5, lr=1e-3, tokens_per_second=1234.5, step_seconds=2.0))
r.close()
"""


@pytest.mark.parametrize("no_color", [True, False])
def test_progress_bar_on_a_terminal(tmp_path, no_color):
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"}
    env |= {"NO_COLOR": "1"} if no_color else {}
    subprocess.run([sys.executable, "-c", SHOW, str(tmp_path)], stderr=other, stdout=other, env=env, check=True)
    os.close(other)
    shown = b""
    try:
        while part := os.read(main, 65536):
            shown += part
    except OSError:  # the end of the pseudo terminal
        pass
    os.close(main)
    text = shown.decode()
    assert "3/3" in text and "loss 1.500" in text and "1,234 tokens/s" in text and "left" in text
    assert ("\x1b[32m" in text) != no_color


def test_wandb_without_a_key_logs_offline_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    reporter = Reporter(tmp_path, LogConfig(every=1, wandb="online"), "r", enabled=True)
    reporter.start(0, 2, {"a": {"b": 1}})
    reporter.train(1, STEP)
    reporter.close()
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].startswith("log.wandb=online: WANDB_API_KEY is not set")
    assert list(tmp_path.glob("wandb/offline-run-*")) and "wandb" not in captured.err


def test_loss_plot_and_table_of_runs(tmp_path):
    assert "no runs in" in list_runs(tmp_path)
    run = tmp_path / "one"
    run.mkdir()
    (run / "config.yaml").write_text("")
    (tmp_path / "not a run").mkdir()
    reporter = Reporter(run, LogConfig(wandb="disabled"), "one", enabled=True)
    reporter.start(0, 3, {})
    for step in (1, 2, 3):
        reporter.train(step, STEP | {"tokens": 10 * step})
    reporter.write("eval", 3, loss=1.25, floor=1.0)
    assert list_runs(tmp_path).splitlines()[1].split() == ["one", "3/3", "1.5000", "1.2500", "not", "finished"]
    reporter.event(3, "finished")
    assert list_runs(tmp_path).splitlines()[1].endswith("  finished")
    assert plot_loss(run).read_bytes()[:4] == b"\x89PNG"
    assert Path(run / "loss.png").stat().st_size > 5000
