"""One run, one writer: the file `lock` in a run's folder, held by its rank 0.

On one host an flock decides, which the kernel releases when its process ends, however it ends; on file systems without,
whether the process lives. Between hosts a lease does: the file's time, renewed while the run lives. The file holds a
random id, and a checkpoint is published only while that is still ours, so a writer that was thought dead does no harm.
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
LEASE = 60.0  # seconds without renewal after which another host's run counts as dead
PATIENCE = 3.0  # seconds that a killed process may take to be gone


class LockLost(UserError):
    """Another run has taken the folder over."""


class RunLock:
    """Held from creation to `release`. Raises UserError in one line where another run lives, or nothing can be written.

    Another host's run is waited for: for less than a minute, until its lease ends or is renewed.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.id = secrets.token_hex(8)
        self._handle, self._ended = -1, threading.Event()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            self._wait_for_the_living(self._flock())
            self._write({"id": self.id, "host": _host(), "name": socket.gethostname(), "process": os.getpid()})
        except (OSError, UserError) as error:
            if self._handle >= 0:
                os.close(self._handle)
            if isinstance(error, UserError):
                raise
            why = f"the run folder cannot be written ({error.strerror})"
            raise UserError(f"{folder}: {why}; free space or fix its permissions, or set run.dir= to another") from None
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def _flock(self) -> bool:
        """Whether the file system knows flocks; then this is ours. Raises UserError where another process has it."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > end:
                    raise UserError(self._living()) from None
                time.sleep(0.1)
            except OSError:
                return False

    def _wait_for_the_living(self, flocked: bool) -> None:
        holder = read(self.path)
        if not holder:
            return
        if holder.get("host") == _host():
            if not flocked and process_alive(int(holder["process"])):
                raise UserError(self._living())
            return
        renewed = os.stat(self.path).st_mtime
        while (left := renewed + LEASE - self._now()) > 0:
            time.sleep(min(1.0, left))
            if os.stat(self.path).st_mtime != renewed:
                raise UserError(self._living())

    def _living(self) -> str:
        holder = read(self.path)
        who = f"process {holder.get('process')} on {holder.get('name')}" if holder else "another process"
        return f"{self.path.parent}: {who} is training in this folder; stop that process, or choose another run.name="

    def _now(self) -> float:
        """The file server's time, which need not be ours."""
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
        while not self._ended.wait(LEASE / 4):
            try:
                os.utime(self._handle)
            except OSError:  # the folder is out of reach: nobody else sees it renewed, and so it shall be
                pass

    def check(self) -> None:
        """Raises LockLost unless the folder is still this run's."""
        if read(self.path).get("id") != self.id:
            raise LockLost(
                f"{self.path}: another run took this lock over, or the file was removed; this run ends without saving"
            )

    def release(self) -> None:
        """Leave the folder to the next run, of any host."""
        if self._ended.is_set():
            return
        self._ended.set()
        try:
            if read(self.path).get("id") == self.id:
                self._write({})
        except OSError:
            pass
        os.close(self._handle)


def read(path: Path) -> dict[str, str | int]:
    """What a lock file says of its holder; empty where there is none."""
    try:
        holder = json.loads(path.read_text())
        return holder if isinstance(holder, dict) else {}
    except (OSError, ValueError):
        return {}


def sees(folder: Path, lock_id: str, patience: float) -> bool:
    """Whether a lock with this id can be read here, soon: whether the folder is the same as rank 0's."""
    end = time.monotonic() + patience
    while read(folder / NAME).get("id") != lock_id:
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _host() -> str:
    """Names this machine since it was started: containers may share a host name, and a host its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
