"""The watchdog of a rank: it notices that a rank hangs, fails or dies, and ends the run with a line that names it.

The main thread marks where it is (`Watchdog.mark`). A second thread writes that to the key-value store of the run's
processes, and reads what the other ranks wrote. It uses no collective, because collectives are what hangs, and it never
waits for a key. The keys are `rank/R`, the progress of rank R; `failed`, the first error of any rank; and `stop`,
`ready/R` and `end`, by which all ranks end together before the first step.
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
from typing import TYPE_CHECKING, Any, NamedTuple

from data.settings import UserError
from trainer.fault_tolerance.errors import RankFailed, RunEnded, Stopped, memory_error
from trainer.fault_tolerance.launcher import end_launcher
from trainer.fault_tolerance.processes import process_alive, transferred_mib
from trainer.fault_tolerance.signals import StopFlag, write_requeue_file
from trainer.terminal import log_stderr

if TYPE_CHECKING:
    from torch.distributed import Store

ROOT = Path(__file__).parents[2]
CHECK_INTERVAL_S = 1.0  # between two checks of the watchdog's thread; a fifth of it before the first step
UNRESPONSIVE_AFTER_S = 3.0  # without a new heartbeat, a rank is dead or suspended
GRACE_PERIOD_S = 10.0  # that the main thread has to end by itself, before the watchdog ends the process
HANG_FRACTION = 0.8  # of run.timeout without progress is a hang, so that all ranks have ended before run.timeout
READ_FRACTION = 0.3  # of run.timeout without progress: from then on, a rank reads the progress of the others
CONNECTION_WORDS = ("gloo", "NCCL", "Connection", "connection", "Timed out", "timed out")


@dataclass
class Progress:
    """How far a rank is. This is the value of its key in the store."""

    step: int = 0  # 0 before the first step
    phase: str = "starting"
    marks: int = 0  # calls of `mark` so far; all ranks make the same calls, so the rank with fewer marks is behind
    activity: int = 0  # MiB read and written, and before the first step checks at which the CPU was busy
    heartbeats: int = 0  # checks of the watchdog's thread so far
    source_line: str = ""  # of the project's code, where the main thread is; set when it makes no progress
    host: str = ""
    pid: int = 0

    @property
    def counters(self) -> tuple[int, int]:
        """These change as long as the main thread makes progress. A long load or build is no hang."""
        return self.marks, self.activity

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}" if self.step else f"{self.phase}, before the first step"


@dataclass
class Peer:
    """The last known progress of another rank, and when it last changed, by this rank's clock."""

    progress: Progress
    last_progress: float
    last_heartbeat: float


class Deadline(NamedTuple):
    """When the watchdog ends the process, with which line on stderr (none if empty) and exit code."""

    time: float  # time.monotonic()
    line: str
    code: int


@dataclass
class Watchdog:
    """The watchdog of one rank.

    Before `start` it only records the progress. Without a store it only handles signals before the first step.
    """

    rank: int = 0
    world_size: int = 1
    stop: StopFlag = field(default_factory=StopFlag)
    timeout: float = 600  # run.timeout, in seconds
    folder: Path = Path()  # of the run

    def __post_init__(self) -> None:
        self.progress = Progress(host=socket.gethostname(), pid=os.getpid())
        self._store: Store | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._in_steps = False  # from the first step on, each step's message carries the request to stop
        self._ended: Stopped | None = None  # set if the run ends before the first step
        self._clock = 0.0  # seconds watched so far
        self._idle = 0.0  # seconds since the main thread last made progress
        self._read_at = 0.0  # value of _clock when the other ranks were last read
        self._peers: dict[int, Peer] = {}
        self._deadline: Deadline | None = None

    # called by the main thread

    def mark(self, phase: str, step: int | None = None) -> None:
        """Record that the main thread enters `phase`. Raises Stopped if the run was ended before its first step."""
        self.progress.phase = phase
        self.progress.marks += 1
        if step is not None:
            self.progress.step = step
        if self._ended is not None:
            raise self._ended

    def start(self, store: "Store | None") -> None:
        """Start to watch, through a store that only the ranks of this launch of the workers use."""
        self._store = store
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter_steps(self) -> None:
        """The first step begins. Rank 0 decides that, the others follow. Raises Stopped if the run was ended before."""
        with self._lock:
            if self._ended is not None:
                raise self._ended
            self._in_steps = True

    def close(self) -> None:
        """Stop to watch, because the main thread ends."""
        self._closed.set()

    # the watchdog's thread

    def _cpu_time_is_progress(self) -> bool:
        """Whether CPU time shows that the main thread makes progress: it may build or load a model for minutes.

        It does not while the thread waits for other ranks, as in any step, because a thread that waits for NCCL or for
        the GPU spins and uses a whole core. Before the first step, those are the phases that connect the processes.
        """
        return self.progress.step == 0 and self.progress.phase not in ("connecting", "waiting for all ranks")

    def _watch(self) -> None:
        last_time, last_cpu_time = time.monotonic(), time.process_time()
        last_counters = (0, 0)
        busy_checks = 0
        while not self._closed.wait(CHECK_INTERVAL_S if self._in_steps else CHECK_INTERVAL_S / 5):
            now, cpu_time = time.monotonic(), time.process_time()
            # If more time has passed, this process or the whole machine was suspended.
            passed = min(now - last_time, 5 * CHECK_INTERVAL_S)
            cpu_used = cpu_time - last_cpu_time
            last_time, last_cpu_time = now, cpu_time
            self._clock += passed
            if self._cpu_time_is_progress() and cpu_used > passed / 5:
                busy_checks += 1
            self.progress.activity = transferred_mib() + busy_checks
            counters = self.progress.counters
            self._idle = self._idle + passed if counters == last_counters else 0.0
            last_counters = counters
            self.progress.heartbeats += 1
            if self._deadline is not None and now >= self._deadline.time:
                self._end_process(self._deadline.line, self._deadline.code)
            try:
                self._check()
            except RuntimeError:
                self._store = None  # its server has ended: torchrun ends this process, or the collectives time out

    def _check(self) -> None:
        if not self._in_steps and self._ended is None:
            self._end_before_first_step()
        store = self._store
        if store is None:
            return
        self.progress.source_line = self._source_line() if self._idle > 2 * CHECK_INTERVAL_S else ""
        store.set(f"rank/{self.rank}", json.dumps(vars(self.progress)))
        if self._deadline is not None:
            return
        if store.check(["failed"]):
            line, code = self._describe_failure(json.loads(store.get("failed")))
            self._deadline = Deadline(time.monotonic() + GRACE_PERIOD_S, line, code)
        elif self._idle > READ_FRACTION * self.timeout and self._clock - self._read_at >= self._read_interval:
            self._read_peers(store)
            if self._idle > HANG_FRACTION * self.timeout:
                hang = self._describe_hang()
                if hang is not None:
                    self._end_process(hang, 1)

    def _end_before_first_step(self) -> None:
        """End the run if some rank was asked to stop, and all ranks have confirmed it.

        Before the first step no message of a step carries the request. If a rank has died it cannot confirm, so that
        no rank ends as if it was stopped.
        """
        store = self._store
        if store is None:
            if self.world_size == 1 and self.stop.requested:
                self._end_run(self.stop.requeue)
            return
        if self.stop.requested:
            store.set("stop", str(int(self.stop.requeue)))
        if not store.check(["stop"]):
            return
        store.set(f"ready/{self.rank}", "")
        if self.rank > 0:
            if store.check(["end"]):
                self._end_run(False)
        elif store.check([f"ready/{rank}" for rank in range(self.world_size)]):
            with self._lock:
                if not self._in_steps:
                    self._end_run(store.get("stop") == b"1")
                    store.set("end", "")

    def _end_run(self, requeue: bool) -> None:
        """Make the main thread raise Stopped at its next mark; if it reaches none, end the process."""
        if self.rank == 0:
            if requeue:
                write_requeue_file(self.folder, 0)
            log_stderr("stopped before the first step")
        self._ended = Stopped(requeue)
        self._deadline = Deadline(time.monotonic() + GRACE_PERIOD_S, "", 0)

    def _end_process(self, line: str, code: int) -> None:
        if line:
            log_stderr(line, self.rank)
        if code == 2:
            end_launcher()
        sys.stdout.flush()
        os._exit(code)

    @property
    def _read_interval(self) -> float:
        """Seconds between two reads of all other ranks. Over all ranks such a read returns world_size^2 values."""
        return max(CHECK_INTERVAL_S, self.timeout / 20)

    def _read_peers(self, store: "Store") -> None:
        self._read_at = self._clock
        others = (rank for rank in range(self.world_size) if rank != self.rank)
        present = [rank for rank in others if rank in self._peers or store.check([f"rank/{rank}"])]
        for rank, value in zip(present, store.multi_get([f"rank/{rank}" for rank in present]), strict=True):
            progress = Progress(**json.loads(value))
            peer = self._peers.setdefault(rank, Peer(progress, self._clock, self._clock))
            if progress.counters != peer.progress.counters:
                peer.last_progress = self._clock
            if progress.heartbeats != peer.progress.heartbeats:
                peer.last_heartbeat = self._clock
            peer.progress = progress

    def _describe_hang(self) -> str | None:
        """The line that says which rank is behind. None while any rank makes progress: it may only be slow."""
        # The news of progress needs a check and a read to arrive.
        without_news = max(
            (HANG_FRACTION - READ_FRACTION) * self.timeout - 2 * self._read_interval,
            self._read_interval + 2 * CHECK_INTERVAL_S,
        )
        if any(self._clock - peer.last_progress < without_news for peer in self._peers.values()):
            return None
        limit = max(UNRESPONSIVE_AFTER_S, 1.5 * self._read_interval)
        unresponsive = [rank for rank, peer in self._peers.items() if self._clock - peer.last_heartbeat > limit]
        ranks = {rank: peer.progress for rank, peer in self._peers.items()}
        ranks[self.rank] = self.progress
        absent = [rank for rank in range(self.world_size) if rank not in ranks]
        idle = f"no rank has made progress for {self._idle:.0f} s (run.timeout={self.timeout:.0f})"
        return f"{self.progress}: {idle}; {describe_ranks(ranks, unresponsive, absent)}"

    def _source_line(self) -> str:
        """The innermost line of the project's code at which the main thread is."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and not path.is_relative_to(sys.prefix):
                return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
            frame = frame.f_back
        return ""

    def _describe_failure(self, failure: dict[str, Any]) -> tuple[str, int]:
        """The line and the exit code for a failure that another rank wrote to the store."""
        if failure["code"] == 2:  # a UserError: rank 0 prints it, once
            return (f"rank {failure['rank']}: {failure['error']}" if self.rank == 0 else ""), 2
        return f"rank {failure['rank']} failed: {failure['error']} ({failure['place']})", failure["code"]

    # called by the main thread when it ends with an error

    def final_error(self, error: Exception) -> Exception:
        """The error with which this rank ends: `error` itself, or one that names another rank that failed before it."""
        if self._store is None or isinstance(error, Stopped):
            return error
        try:
            return self._final_error(error, self._store)
        except RuntimeError:  # the process that serves the store has ended
            server = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
            problem = f"lost the connection to {server} on the first machine: it ended, or the network failed"
            return RankFailed(f"{self.progress}: {problem}") if may_be_lost_connection(error) else error

    def _final_error(self, error: Exception, store: "Store") -> Exception:
        code = 2 if isinstance(error, UserError) else 1
        if code == 1 and not store.check(["failed"]):
            timeout = UNRESPONSIVE_AFTER_S + 2 * CHECK_INTERVAL_S if may_be_lost_connection(error) else 0
            lost = self._find_lost_rank(store, timeout)
            if lost is not None:
                self._deadline = Deadline(time.monotonic() + 2 * GRACE_PERIOD_S, "", 1)
                last = f"last seen in {self._peers[lost].progress}"
                return RankFailed(
                    f"{self.progress}: rank {lost} is gone: it was killed, or its machine failed ({last})"
                )
        if not self._in_steps and store.check(["end"]):
            return Stopped(False)
        text = str(error) if code == 2 else " ".join(f"{type(error).__name__}: {error}".split())
        mine = {"rank": self.rank, "error": text[:1000], "code": code, "place": str(self.progress)}
        first = json.loads(store.compare_set("failed", "", json.dumps(mine)))
        self._deadline = Deadline(time.monotonic() + 2 * GRACE_PERIOD_S, "", code)  # in case the cleanup hangs
        if first["rank"] == self.rank or code == 2:
            return error
        return RankFailed(*self._describe_failure(first))

    def _find_lost_rank(self, store: "Store", timeout: float) -> int | None:
        """Look for a rank that has died, at least once and for up to `timeout` seconds.

        None if there is none, or as soon as a rank has written an error or the end to the store. If `timeout` is 0, a
        rank that does not respond does not count.
        """
        end = time.monotonic() + timeout
        while True:
            self._read_peers(store)
            for rank, peer in self._peers.items():
                if timeout and self._clock - peer.last_heartbeat > UNRESPONSIVE_AFTER_S:
                    return rank
                same_host = peer.progress.host == self.progress.host
                if same_host and not process_alive(peer.progress.pid):
                    return rank
            if time.monotonic() >= end or store.check(["failed"]) or store.check(["end"]):
                return None
            time.sleep(CHECK_INTERVAL_S / 5)


@contextmanager
def report_failures(watchdog: Watchdog, micro_batch_size: int, seq_len: int) -> Iterator[None]:
    """Report an error inside the context to the other ranks, before the connections to them close.

    Raises the error with which this rank ends: the error itself, or one that names another rank that failed before. If
    memory ran out, that is a UserError that names the sizes to lower.
    """
    try:
        yield
    except RunEnded:
        raise
    except Exception as error:
        progress = watchdog.progress
        out_of_memory = memory_error(error, progress.phase, progress.step, micro_batch_size, seq_len)
        final = watchdog.final_error(error if out_of_memory is None else out_of_memory)
        if final is error:
            raise
        raise final from error


def describe_ranks(ranks: dict[int, Progress], unresponsive: list[int], absent: list[int]) -> str:
    """Which ranks are behind, and where the others wait for them. Ranks in the same place are grouped.

    ranks: the progress of each rank; unresponsive: those of them without a heartbeat; absent: ranks that never started.
    """
    fewest = min(progress.marks for progress in ranks.values())
    with_fewest = [rank for rank, progress in ranks.items() if progress.marks == fewest]
    behind = set(unresponsive)
    if len(with_fewest) < len(ranks):
        behind.update(with_fewest)
    groups: dict[tuple[str, str], list[int]] = {}
    if absent:
        groups["behind", "never started"] = absent
    for rank, progress in sorted(ranks.items()):
        place = str(progress)
        if progress.source_line:
            place += f", {progress.source_line}"
        if rank in unresponsive:
            place += ", not responding"
        groups.setdefault(("behind" if rank in behind else "waiting", place), []).append(rank)
    lines = [f"{state}: {_format_ranks(group)} ({place})" for (state, place), group in sorted(groups.items())]
    if not behind and not absent:
        lines.insert(0, "no rank is behind")
    return "; ".join(lines)


def _format_ranks(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 0, 2-5`."""
    ranges: list[list[int]] = []  # first and last
    for rank in sorted(ranks):
        if ranges and ranges[-1][-1] == rank - 1:
            ranges[-1] = [ranges[-1][0], rank]
        else:
            ranges.append([rank])
    return f"rank{'s' * (len(ranks) > 1)} " + ", ".join("-".join(map(str, each)) for each in ranges)


def may_be_lost_connection(error: BaseException) -> bool:
    """Whether another rank may have caused this error by ending: an error of torch.distributed or of a connection."""
    if any(kind.__name__.startswith("Dist") for kind in type(error).__mro__):
        return True
    return any(word in str(error) for word in CONNECTION_WORDS)
