"""Each rank's watch over itself and the others: who hangs, who failed, who is gone.

The main thread marks where it is; a thread leaves that in the processes' store and reads what others left. It uses no
collective, since those are what hangs, and never waits for a key. The keys: `rank/R`, where R is; `failed`, the first
error of any rank; and for an end before the first step `stop`, `ready/R` and `end`.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.settings import UserError
from trainer.fault_tolerance.errors import RankFailed, RunEnded, Stopped, memory_error
from trainer.fault_tolerance.launcher import end_launcher
from trainer.fault_tolerance.processes import process_alive, transferred_mib
from trainer.fault_tolerance.signals import StopFlag, leave_mark
from trainer.terminal import log_stderr

if TYPE_CHECKING:
    from torch.distributed import Store

ROOT = Path(__file__).parents[1]
TICK = 1.0  # seconds between two looks; a fifth of it before the first step
SILENT = 3.0  # a rank whose thread leaves nothing new for so long is gone, or stopped
GRACE = 10.0  # for the main thread, to end by itself
FIRES = 0.8  # of run.timeout without a mark, so that all is over before run.timeout is
READS = 0.3  # of run.timeout without a mark: from then on it looks what the others do


@dataclass
class Place:
    """Where a rank is, as it stands in the store."""

    step: int = 0  # 0: before the first
    phase: str = "starting"
    marks: int = 0  # passed so far: of ranks that do the same, the one with fewer is behind
    moved: int = 0  # MiB to and from disks, and before the first step times at work: long loads, builds are no hang
    ticks: int = 0  # of its thread
    line: str = ""  # of our code, once it stands still
    host: str = ""
    pid: int = 0

    @property
    def signs(self) -> tuple[int, int]:
        """Something that changes as long as the main thread gets on."""
        return self.marks, self.moved

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}" if self.step else f"{self.phase}, before the first step"


@dataclass
class Seen:
    """What this rank saw of another: its place, and when (by our clock) it last moved or showed life."""

    place: Place
    moved: float
    alive: float


@dataclass
class Watchdog:
    """Of one rank. Before `begin` it only remembers the place; without a store it sees to signals at the start."""

    rank: int = 0
    size: int = 1
    stop: StopFlag = field(default_factory=StopFlag)
    timeout: float = 600  # run.timeout
    folder: Path = Path()  # of the run

    def __post_init__(self) -> None:
        self.place = Place(host=socket.gethostname(), pid=os.getpid())
        self._store: Store | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._running = False  # from the first step on, steps carry the request to stop
        self._ended: Stopped | None = None  # before the first step
        self._clock = self._idle = self._read_at = 0.0  # seconds: watched, without a mark, at the last reading
        self._seen: dict[int, Seen] = {}
        self._deadline: tuple[float, str, int] | None = None  # when to end, with which line and exit code

    def mark(self, phase: str, step: int | None = None) -> None:
        """The main thread is here. Raises Stopped if the run was ended before its first step."""
        self.place.phase = phase
        self.place.marks += 1
        if step is not None:
            self.place.step = step
        if self._ended is not None:
            raise self._ended

    def begin(self, store: "Store | None") -> None:
        """Start to watch, by a store of all ranks of this life and nobody else."""
        self._store = store
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def enter(self) -> None:
        """The first step begins, says rank 0, and then the others. Raises Stopped if the run was ended before."""
        with self._lock:
            if self._ended is not None:
                raise self._ended
            self._running = True

    def close(self) -> None:
        """The main thread ends, and needs no watch any more."""
        self._closed.set()

    def works_alone(self) -> bool:
        """Whether CPU time shows that the main thread gets on: a model that is built or loaded for minutes is no hang.

        Not where it waits for others, as in any step: one that waits for NCCL or for the GPU spins, and uses a whole
        core. New machines hang in their first messages.
        """
        return self.place.step == 0 and self.place.phase not in ("connecting", "waiting for all ranks")

    # the thread

    def _watch(self) -> None:
        before, cpu, busy, last = time.monotonic(), time.process_time(), 0, (0, 0)
        while not self._closed.wait(TICK if self._running else TICK / 5):
            now = time.monotonic()
            passed = min(now - before, 5 * TICK)  # if more, this process or the whole machine was suspended
            before = now
            self._clock += passed
            used, cpu = time.process_time() - cpu, time.process_time()
            busy += self.works_alone() and used > passed / 5
            self.place.moved = transferred_mib() + busy
            self._idle = self._idle + passed if self.place.signs == last else 0.0
            last = self.place.signs
            self.place.ticks += 1
            if self._deadline is not None and now >= self._deadline[0]:
                self._end(*self._deadline[1:])
            try:
                self._look()
            except RuntimeError:
                self._store = None  # its server is gone: torchrun ends us, or else the collectives' timeout

    def _look(self) -> None:
        if not self._running and self._ended is None:
            self._end_before_first_step()
        store = self._store
        if store is None:
            return
        self.place.line = self._line() if self._idle > 2 * TICK else ""
        store.set(f"rank/{self.rank}", json.dumps(vars(self.place)))
        if self._deadline is not None:
            return
        if store.check(["failed"]):
            self._deadline = time.monotonic() + GRACE, *self._told(json.loads(store.get("failed")))
        elif self._idle > READS * self.timeout and self._clock - self._read_at >= self._every:
            self._read_others(store)
            if self._idle > FIRES * self.timeout and (line := self._hang()):
                self._end(line, 1)

    def _end_before_first_step(self) -> None:
        """All threads agree on an end here, where no step's message tells of it; a dead rank cannot, and so no one."""
        store = self._store
        if store is None:
            if self.size == 1 and self.stop.asked:
                self._end_soon(self.stop.requeue)
            return
        if self.stop.asked:
            store.set("stop", str(int(self.stop.requeue)))
        if not store.check(["stop"]):
            return
        store.set(f"ready/{self.rank}", "")
        if self.rank > 0:
            if store.check(["end"]):
                self._end_soon(False)
        elif store.check([f"ready/{rank}" for rank in range(self.size)]):
            with self._lock:
                if not self._running:
                    self._end_soon(store.get("stop") == b"1")
                    store.set("end", "")

    def _end_soon(self, requeue: bool) -> None:
        if self.rank == 0:
            if requeue:
                leave_mark(self.folder, 0)
            log_stderr("stopped before the first step")
        self._ended = Stopped(requeue)
        self._deadline = time.monotonic() + GRACE, "", 0

    def _end(self, line: str, code: int) -> None:
        if line:
            log_stderr(line, self.rank)
        if code == 2:
            end_launcher()
        sys.stdout.flush()
        os._exit(code)

    # the others

    @property
    def _every(self) -> float:
        """Seconds between two readings of all: that is size^2 values, over all ranks."""
        return max(TICK, self.timeout / 20)

    def _read_others(self, store: "Store") -> None:
        self._read_at = self._clock
        others = (rank for rank in range(self.size) if rank != self.rank)
        there = [rank for rank in others if rank in self._seen or store.check([f"rank/{rank}"])]
        for rank, value in zip(there, store.multi_get([f"rank/{rank}" for rank in there]), strict=True):
            place = Place(**json.loads(value))
            seen = self._seen.setdefault(rank, Seen(place, self._clock, self._clock))
            if place.signs != seen.place.signs:
                seen.moved = self._clock
            if place.ticks != seen.place.ticks:
                seen.alive = self._clock
            seen.place = place

    def _hang(self) -> str | None:
        """The line that says who is behind, if nobody moves any more: who is slow alone keeps no one from waiting."""
        # news take a tick each way
        quiet = max((FIRES - READS) * self.timeout - 2 * self._every, self._every + 2 * TICK)
        if any(self._clock - seen.moved < quiet for seen in self._seen.values()):
            return None
        silent = [r for r, seen in self._seen.items() if self._clock - seen.alive > max(SILENT, 1.5 * self._every)]
        places = {rank: seen.place for rank, seen in self._seen.items()} | {self.rank: self.place}
        return f"{self.place}: no rank has moved for {self._idle:.0f} s (run.timeout={self.timeout:.0f}); " + compare(
            places, silent, [rank for rank in range(self.size) if rank not in places]
        )

    def _line(self) -> str:
        """Where in our code the main thread stands."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and not path.is_relative_to(sys.prefix):
                return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
            frame = frame.f_back
        return ""

    def _told(self, failure: dict[str, Any]) -> tuple[str, int]:
        """The line and the exit code for what another rank said of its end."""
        if failure["code"] == 2:  # a line for the user, from one rank
            return (f"rank {failure['rank']}: {failure['error']}" if self.rank == 0 else ""), 2
        return f"rank {failure['rank']} failed: {failure['error']} ({failure['place']})", failure["code"]

    # the main thread, when it cannot go on

    def verdict(self, error: Exception) -> Exception:
        """What to end with, for an error of the main thread: itself, or what another rank had before it."""
        if self._store is None or isinstance(error, Stopped):
            return error
        try:
            return self._verdict(error, self._store)
        except RuntimeError:  # the store is gone, and who kept it
            keeper = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
            lost = RankFailed(f"{self.place}: {keeper} of the first machine is gone, or the way to it")
            return lost if _of_the_network(error) else error

    def _verdict(self, error: Exception, store: "Store") -> Exception:
        code = 2 if isinstance(error, UserError) else 1
        if code == 1 and not store.check(["failed"]):
            patience = SILENT + 2 * TICK if _of_the_network(error) else 0
            if (gone := self._wait_for_a_reason(store, patience)) is not None:
                self._deadline = time.monotonic() + 2 * GRACE, "", 1
                seen = f"last seen in {self._seen[gone].place}"
                return RankFailed(f"{self.place}: rank {gone} is gone, killed or with its machine ({seen})")
        if not self._running and store.check(["end"]):
            return Stopped(False)
        text = str(error) if code == 2 else " ".join(f"{type(error).__name__}: {error}".split())
        mine = {"rank": self.rank, "error": text[:1000], "code": code, "place": str(self.place)}
        first = json.loads(store.compare_set("failed", "", json.dumps(mine)))
        self._deadline = time.monotonic() + 2 * GRACE, "", code  # should the clearing up hang
        return error if first["rank"] == self.rank or code == 2 else RankFailed(*self._told(first))

    def _wait_for_a_reason(self, store: "Store", patience: float) -> int | None:
        """A rank that is gone, looked for so long; None too once some rank says that it failed."""
        end = time.monotonic() + patience
        while True:
            self._read_others(store)
            for rank, seen in self._seen.items():
                silent = patience and self._clock - seen.alive > SILENT
                if silent or (seen.place.host == self.place.host and not process_alive(seen.place.pid)):
                    return rank
            if time.monotonic() >= end or store.check(["failed"]) or store.check(["end"]):
                return None
            time.sleep(TICK / 5)


@contextmanager
def report_failures(watchdog: Watchdog, micro_batch_size: int, seq_len: int) -> Iterator[None]:
    """Report an error in here to the other ranks, before the connections to them close.

    Raises what this rank ends with: the error, or what another rank had reported before it. Memory that ran out becomes
    a line that names the sizes to lower.
    """
    try:
        yield
    except RunEnded:
        raise
    except Exception as error:
        place = watchdog.place
        verdict = watchdog.verdict(memory_error(error, place.phase, place.step, micro_batch_size, seq_len) or error)
        if verdict is error:
            raise
        raise verdict from error


def compare(places: dict[int, Place], silent: list[int], absent: list[int]) -> str:
    """Which ranks are behind, and where the others wait for them."""
    fewest = min(place.marks for place in places.values())
    late = [rank for rank, place in places.items() if place.marks == fewest]
    behind = {*silent, *(late if len(late) < len(places) else [])}
    groups: dict[tuple[bool, str], list[int]] = {(False, "never started"): absent} if absent else {}
    for rank, place in sorted(places.items()):
        words = ", ".join([str(place), *([place.line] if place.line else [])])
        words += ", no sign of life" if rank in silent else ""
        groups.setdefault((rank not in behind, words), []).append(rank)
    none = "" if behind or absent else "none is behind; "
    return none + "; ".join(
        f"{'waiting' if waits else 'behind'}: {_ranks(group)} ({words})"
        for (waits, words), group in sorted(groups.items())
    )


def _ranks(group: list[int]) -> str:
    """`rank 3`, or `ranks 0, 2-5`."""
    parts: list[list[int]] = []
    for rank in sorted(group):
        if parts and parts[-1][-1] == rank - 1:
            parts[-1] = [parts[-1][0], rank]
        else:
            parts.append([rank])
    return f"rank{'s' * (len(group) > 1)} " + ", ".join("-".join(map(str, part)) for part in parts)


def _of_the_network(error: BaseException) -> bool:
    """Whether an error may be another rank's end, as seen from here."""
    words = ("gloo", "NCCL", "Connection", "connection", "Timed out", "timed out")
    return any(kind.__name__.startswith("Dist") for kind in type(error).__mro__) or any(w in str(error) for w in words)
