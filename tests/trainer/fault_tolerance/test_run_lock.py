"""One run, one writer, whatever kills the first."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.settings import UserError
from tests.support import run_cases as cases
from trainer.fault_tolerance import run_lock as lock
from trainer.fault_tolerance.run_lock import LockLost, RunLock

HOLD = "import sys, time; from pathlib import Path; from trainer.fault_tolerance.run_lock import RunLock; "
HOLD += "held = RunLock(Path(sys.argv[1])); "
HOLD += "print(held.id, flush=True); time.sleep(600)"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path / "run"."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and len(process.stdout.readline().strip()) == 16
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_refused_while_the_first_lives_and_may_start_when_it_was_killed(
    corpus_dir, tmp_path, holder, monkeypatch
):
    monkeypatch.setattr(lock, "PATIENCE", 0.2)
    with pytest.raises(UserError, match=f"run: process {holder.pid} on .* is training in it") as error:
        cases.run(corpus_dir, tmp_path, "run.name=run", "train.steps=2")
    assert "\n" not in str(error.value) and {p.name for p in (tmp_path / "run").iterdir()} == {"lock"}
    monkeypatch.setattr(lock, "PATIENCE", 30.0)
    os.kill(holder.pid, signal.SIGKILL)
    assert cases.run(corpus_dir, tmp_path, "run.name=run", "train.steps=2") == 0
    assert (tmp_path / "run" / "lock").read_text() == ""  # left to whoever comes


def test_without_flocks_it_is_asked_whether_the_process_lives(tmp_path, holder, monkeypatch):
    """As on a Lustre that was mounted without them."""

    def unknown(handle, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", unknown)
    with pytest.raises(UserError, match=f"process {holder.pid} on .* is training in it"):
        RunLock(tmp_path / "run")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    RunLock(tmp_path / "run").release()


def foreign(folder: Path, age: float) -> Path:
    """A lock that a run on another host has left, or holds."""
    folder.mkdir()
    path = folder / "lock"
    path.write_text(json.dumps({"id": "a", "host": "elsewhere", "name": "node7", "process": 1}))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_lease_of_another_host_is_waited_for_and_then_over(tmp_path):
    foreign(tmp_path / "run", lock.LEASE - 1.5)
    began = time.monotonic()
    held = RunLock(tmp_path / "run")
    assert time.monotonic() - began > 0.5
    assert lock.read(tmp_path / "run" / "lock")["id"] == held.id
    held.release()


def test_a_lease_that_is_renewed_is_respected(tmp_path):
    path = foreign(tmp_path / "run", 5)
    renew = f"import os, time; time.sleep(1); os.utime({str(path)!r})"
    with (
        subprocess.Popen([sys.executable, "-c", renew]),
        pytest.raises(UserError, match="process 1 on node7 is training"),
    ):
        RunLock(tmp_path / "run")


def test_it_is_renewed_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LEASE", 0.2)
    held = RunLock(tmp_path / "run")
    os.utime(held.path, (0, 0))
    for _ in range(100):
        if held.path.stat().st_mtime > 0:
            break
        time.sleep(0.1)
    assert held.path.stat().st_mtime > 0
    held.release()
    held.release()  # twice does no harm


def test_who_lost_it_learns_and_leaves_the_others_alone(tmp_path):
    held = RunLock(tmp_path / "run")
    held.check()
    other = {"id": "b", "host": "elsewhere", "name": "node7", "process": 2}
    held.path.write_text(json.dumps(other))
    with pytest.raises(LockLost, match="no longer this run's"):
        held.check()
    held.release()
    assert lock.read(held.path) == other


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory; the run folder cannot be written, .* set run.dir="):
        RunLock(tmp_path / "file" / "run")


def test_a_rank_that_sees_another_folder_is_named(pool, corpus_dir, tmp_path):
    """As on nodes without a shared file system: a relative run.dir, from two places."""
    found = pool.run(2, "tests.support.run_cases:run_in_separate_folders", corpus=str(corpus_dir), folder=str(tmp_path))
    for text in found:
        assert "does not see the folder that rank 0 writes to; set run.dir=" in text and "\n" not in text
