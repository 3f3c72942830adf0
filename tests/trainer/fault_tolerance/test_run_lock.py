"""Only one run trains in a folder, and a run that was killed does not block the next one."""

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
from tests.support.fault_cases import wait_for
from trainer.fault_tolerance import run_lock
from trainer.fault_tolerance.run_lock import LockLost, RunLock

HOLD_LOCK = """
import sys, time
from pathlib import Path
from trainer.fault_tolerance.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print(lock.id, flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path / "run"."""
    command = [sys.executable, "-c", HOLD_LOCK, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and len(process.stdout.readline().strip()) == 16
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_refused_until_the_first_is_killed(corpus_dir, tmp_path, holder, monkeypatch):
    monkeypatch.setattr(run_lock, "FLOCK_TIMEOUT_S", 0.2)
    with pytest.raises(UserError, match=f"run: process {holder.pid} on .* is training in this folder") as error:
        cases.run(corpus_dir, tmp_path, "run.name=run", "train.steps=2")
    assert "\n" not in str(error.value) and {p.name for p in (tmp_path / "run").iterdir()} == {"lock"}
    monkeypatch.setattr(run_lock, "FLOCK_TIMEOUT_S", 30.0)
    os.kill(holder.pid, signal.SIGKILL)
    assert cases.run(corpus_dir, tmp_path, "run.name=run", "train.steps=2") == 0
    assert (tmp_path / "run" / "lock").read_text() == ""  # released


def test_without_flock_a_living_process_keeps_the_lock(tmp_path, holder, monkeypatch):
    """As on a Lustre file system that was mounted without flock."""

    def not_implemented(handle, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "flock", not_implemented)
    with pytest.raises(UserError, match=f"process {holder.pid} on .* is training in this folder"):
        RunLock(tmp_path / "run")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    RunLock(tmp_path / "run").release()


def lock_of_another_host(folder: Path, age: float) -> Path:
    """The lock file of a run on another host, which renewed it `age` seconds ago."""
    folder.mkdir()
    path = folder / "lock"
    path.write_text(json.dumps({"id": "a", "host": "elsewhere", "name": "node7", "process": 1}))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_run_waits_for_the_end_of_another_hosts_lease(tmp_path):
    path = lock_of_another_host(tmp_path / "run", run_lock.LEASE_S - 1.5)
    start = time.monotonic()
    lock = RunLock(tmp_path / "run")
    assert time.monotonic() - start > 0.5
    assert run_lock.read_holder(path)["id"] == lock.id
    lock.release()


def test_a_run_is_refused_if_another_host_renews_its_lease(tmp_path):
    path = lock_of_another_host(tmp_path / "run", 5)
    renew = f"import os, time; time.sleep(1); os.utime({str(path)!r})"
    with (
        subprocess.Popen([sys.executable, "-c", renew]),
        pytest.raises(UserError, match="process 1 on node7 is training"),
    ):
        RunLock(tmp_path / "run")


def test_the_lease_is_renewed_while_the_lock_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "LEASE_S", 0.2)
    lock = RunLock(tmp_path / "run")
    os.utime(lock.path, (0, 0))
    assert wait_for(lambda: lock.path.stat().st_mtime > 0, 10)
    lock.release()
    lock.release()  # a second call does nothing


def test_a_run_that_lost_its_lock_leaves_the_new_one_alone(tmp_path):
    lock = RunLock(tmp_path / "run")
    lock.check()
    other = {"id": "b", "host": "elsewhere", "name": "node7", "process": 2}
    lock.path.write_text(json.dumps(other))
    with pytest.raises(LockLost, match="another run took this lock over"):
        lock.check()
    lock.release()
    assert run_lock.read_holder(lock.path) == other


def test_an_unwritable_folder_ends_the_run_in_one_line(corpus_dir, tmp_path):
    (tmp_path / "file").write_text("")
    message = r"the run folder cannot be written \(Not a directory\); .* set run.dir="
    with pytest.raises(UserError, match=message) as error:
        cases.run(corpus_dir, tmp_path / "file", "run.name=run")
    assert "\n" not in str(error.value)


def test_ranks_that_see_different_folders_are_reported(pool, corpus_dir, tmp_path):
    """As on nodes without a shared file system: a relative run.dir in two working directories."""
    errors = pool.run(
        2, "tests.support.run_cases:run_in_separate_folders", corpus=str(corpus_dir), folder=str(tmp_path)
    )
    for text in errors:
        assert "does not see the folder that rank 0 writes to; set run.dir to a folder" in text and "\n" not in text
