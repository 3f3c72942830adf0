"""The lock of a run folder: only one run at a time trains in it. Rank 0 holds the file `lock` in the folder.

On one host the lock is an flock, which the kernel releases when the process ends, however it ends. On a file system
without flock the lock is held while the process that the file names is alive. Between hosts the lock is a lease: the
file's modification time, which the run renews while it is alive. The file contains a random id, and a run publishes a
checkpoint only while the id is its own. So a run that was wrongly considered dead does no harm.
"""

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path

from data.settings import UserError
from trainer.fault_tolerance.processes import process_alive

NAME = "lock"
LEASE_S = 60.0  # without renewal, after which a run on another host counts as dead
FLOCK_TIMEOUT_S = 3.0  # a killed process has ended, and has released its flock, by then


class LockLost(UserError):
    """Another run has taken over the lock, or its file was removed."""


class RunLock:
    """The lock, held from creation until `release`.

    Raises UserError if another run holds it, or if the folder cannot be written. If the lock belongs to another host,
    waits for less than a minute, until the lease ends or is renewed.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.id = secrets.token_hex(8)
        self._handle = -1
        self._released = threading.Event()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            self._wait_for_holder(has_flock=self._acquire_flock())
            self._write({"id": self.id, "host": _host(), "name": socket.gethostname(), "process": os.getpid()})
        except (OSError, UserError) as error:
            if self._handle >= 0:
                os.close(self._handle)
            if isinstance(error, UserError):
                raise
            why = f"the run folder cannot be written ({error.strerror})"
            raise UserError(f"{folder}: {why}; free space or fix its permissions, or set run.dir= to another") from None
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def _acquire_flock(self) -> bool:
        """Acquire the flock. False if the file system has none. Raises UserError if another process holds it."""
        end = time.monotonic() + FLOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > end:
                    raise UserError(self._held_by_another()) from None
                time.sleep(0.1)
            except OSError:
                return False

    def _wait_for_holder(self, has_flock: bool) -> None:
        """Wait until the run that the file names has ended. Raises UserError if it is alive."""
        holder = read_holder(self.path)
        if not holder:
            return
        if holder.get("host") == _host():
            if not has_flock and process_alive(int(holder["process"])):
                raise UserError(self._held_by_another())
            return
        renewed = os.stat(self.path).st_mtime
        while (remaining := renewed + LEASE_S - self._now()) > 0:
            time.sleep(min(1.0, remaining))
            if os.stat(self.path).st_mtime != renewed:
                raise UserError(self._held_by_another())

    def _held_by_another(self) -> str:
        """The error message for a folder that another run holds."""
        holder = read_holder(self.path)
        process = f"process {holder.get('process')} on {holder.get('name')}" if holder else "another process"
        return (
            f"{self.path.parent}: {process} is training in this folder; stop that process, or choose another run.name="
        )

    def _now(self) -> float:
        """The time of the file server, which may differ from this host's."""
        probe = self.path.with_name(f".{NAME}-{self.id}")
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _write(self, holder: dict[str, str | int]) -> None:
        content = json.dumps(holder).encode() if holder else b""
        os.pwrite(self._handle, content, 0)
        os.ftruncate(self._handle, len(content))
        os.fsync(self._handle)

    def _renew(self) -> None:
        while not self._released.wait(LEASE_S / 4):
            try:
                os.utime(self._handle)
            except OSError:  # this host cannot reach the folder; then the lease may well end
                pass

    def check(self) -> None:
        """Raises LockLost unless the file still contains this run's id."""
        if read_holder(self.path).get("id") != self.id:
            raise LockLost(
                f"{self.path}: another run took this lock over, or the file was removed; this run ends without saving"
            )

    def release(self) -> None:
        """Release the lock, so that a run on any host can take it at once. May be called twice."""
        if self._released.is_set():
            return
        self._released.set()
        try:
            if read_holder(self.path).get("id") == self.id:
                self._write({})
        except OSError:
            pass
        os.close(self._handle)


def read_holder(path: Path) -> dict[str, str | int]:
    """The holder that a lock file names: its id, host, name and process. Empty if there is none."""
    try:
        holder = json.loads(path.read_text())
        return holder if isinstance(holder, dict) else {}
    except (OSError, ValueError):
        return {}


def lock_is_visible(folder: Path, lock_id: str, timeout: float) -> bool:
    """Whether this rank sees rank 0's lock in its own folder, within `timeout` seconds: they share the folder."""
    end = time.monotonic() + timeout
    while read_holder(folder / NAME).get("id") != lock_id:
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _host() -> str:
    """The id of this host's boot, which its containers share. Containers of different hosts may share a host name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
