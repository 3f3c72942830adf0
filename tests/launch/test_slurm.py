"""launch/slurm/ on a real SLURM: how jobs end, which are requeued, and that their runs keep the same losses.

Each scenario below is a function that submits a job and interrupts it. All scenarios run at the same time, because each
waits most of the time.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from data.settings import load_file
from tests.support import run_cases as cases
from tests.support.slurm import ROOT, NoSlurm, Slurm, cluster
from trainer.metrics import read_lines

pytestmark = pytest.mark.slow
TRAIN = "launch/slurm/train.sbatch"
STEPS = 60
PROMPT = 'Tom\'s "big" dog  & 5%'  # quotes, spaces, and characters that shells and SLURM interpret


class Jobs:
    """Submits short runs, and reads their folders."""

    def __init__(self, slurm: Slurm) -> None:
        self.slurm = slurm
        self.runs = slurm.folder / "runs & more"
        self.corpus = slurm.folder / "corpus"
        self.ids: dict[str | None, str] = {}  # by run name
        self.time_limit_job_started = threading.Event()
        setup = slurm.folder / "set up.sh"
        python = shlex.quote(str(Path(sys.executable).parent))
        setup.write_text(f'PATH={python}:$PATH; echo "$SLURMD_NODENAME: $SLURM_GPUS_ON_NODE GPUs"\n')
        self.environment = {"ENV_SETUP": str(setup), "NPROC": "1", "OMP_NUM_THREADS": "1"}

    def words(self, name: str | None, *more: str) -> list[str]:
        settings = cases.run_arguments(
            self.corpus, self.runs, f"train.steps={STEPS}", f"sample.prompts={PROMPT}", *more
        )
        return ["--config", "launch/tiny.yaml", *settings, *([f"run.name={name}"] if name else [])]

    def submit(self, name: str | None, *flags: str, nodes: int = 2, more: tuple[str, ...] = (), **env: str) -> str:
        flags = flags or ("--oversubscribe",)  # all jobs share n1 and n2
        words = [f"--nodes={nodes}", *flags, TRAIN, *self.words(name, *more)]
        self.ids[name] = self.slurm.submit(*words, **(self.environment | env))
        return self.ids[name]

    def losses(self, name: str) -> list[float]:
        return cases.losses(self.runs / name)

    def suspend(self, name: str) -> int:
        """Wait until a run has done five steps, and suspend its rank 0. Returns the rank's process id."""
        metrics = self.runs / name / "metrics.jsonl"
        end = time.monotonic() + 200
        while sum(line["kind"] == "train" for line in read_lines(metrics)) < 5:
            assert time.monotonic() < end, f"{name}: fewer than five steps"
            time.sleep(0.05)
        process = rank_0(name)
        os.kill(process, signal.SIGSTOP)
        return process

    def wait_for_log(self, text: str, job: str) -> None:
        """Wait until the log of a job contains a text."""
        end = time.monotonic() + 200
        while text not in self.slurm.log(job):
            assert time.monotonic() < end, self.slurm.log(job)
            time.sleep(0.1)


def rank_0(name: str) -> int:
    """The process id of a run's rank 0."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
            if f"run.name={name}".encode() in words and b"RANK=0" in environment:
                return int(process.name)
    raise AssertionError(f"{name}: no process of rank 0")


def is_pending(process: int, number: signal.Signals) -> bool:
    """Whether the signal is pending for a suspended process. True, too, if the process has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text().splitlines()
    except FileNotFoundError:
        return True
    return any(int(line.split()[1], 16) >> (number - 1) & 1 for line in status if "Pnd:" in line)


def resume(process: int) -> None:
    """Continue a suspended process."""
    with contextlib.suppress(ProcessLookupError):  # SLURM may have sent SIGCONT already
        os.kill(process, signal.SIGCONT)


def undisturbed(jobs: Jobs) -> None:
    """An array of two tasks. The second receives the signal of a time limit, and it alone is requeued."""
    jobs.time_limit_job_started.wait()
    job = jobs.submit(None, "--oversubscribe", "--array=1-2", more=("eval.batches=%a",))
    suspended = jobs.suspend("tiny-2")
    jobs.slurm.call("scancel", "--signal=USR1", f"{job}_2")
    resume(suspended)
    ends = [jobs.slurm.wait(f"{job}_{task}", "COMPLETED") for task in (1, 2)]
    assert [end["Restarts"] for end in ends] == ["0", "1"]
    assert len(jobs.losses("tiny-1")) == STEPS
    assert jobs.losses("tiny-2") == jobs.losses("tiny-1")
    config = load_file(jobs.runs / "tiny-2" / "config.yaml")
    assert config["sample"]["prompts"] == [PROMPT] and str(config["eval"]["batches"]) == "2"


def time_limit(jobs: Jobs) -> None:
    """Starts before the other scenarios, because SLURM checks time limits only twice a minute."""
    job = jobs.submit("limit", "--oversubscribe", "--signal=USR1@5")
    try:
        suspended = jobs.suspend("limit")
    finally:
        jobs.time_limit_job_started.set()
    hours, minutes, seconds = map(int, jobs.slurm.job(job)["RunTime"].split(":"))
    jobs.slurm.call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 1 + (seconds > 25)}")
    end = time.monotonic() + 150
    while not is_pending(suspended, signal.SIGUSR1):
        assert time.monotonic() < end, "no SIGUSR1"
        time.sleep(0.2)
    resume(suspended)
    jobs.slurm.wait(job, "PENDING")
    jobs.slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")
    assert jobs.slurm.wait(job, "COMPLETED")["Restarts"] == "1"
    log = jobs.slurm.log(job)
    assert (
        "stopped before its last step, requeueing it" in log and "resumed from step" in log and "Traceback" not in log
    )


def requeued(jobs: Jobs) -> None:
    """A rank is killed and torchrun restarts all; then an administrator requeues the job, with KillWait (30 s)."""
    jobs.time_limit_job_started.wait()
    job = jobs.submit("requeued", more=("checkpoint.every=2",), MAX_RESTARTS="1")
    os.kill(jobs.suspend("requeued"), signal.SIGKILL)
    jobs.wait_for_log("resumed from step", job)
    jobs.suspend("requeued")
    jobs.slurm.call("scontrol", "requeue", job)  # SLURM also sends SIGCONT
    assert jobs.slurm.wait(job, "COMPLETED")["Restarts"] == "1"
    assert jobs.slurm.log(job).count("resumed from step") == 2


def preempted(jobs: Jobs) -> None:
    """A job of a partition with a higher priority preempts it, with GraceTime: the script requeues it."""
    jobs.time_limit_job_started.wait()
    job = jobs.submit("preempted", "--partition=spare")
    jobs.suspend("preempted")
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 1")
    other = jobs.slurm.submit(*urgent)
    jobs.slurm.wait(other, "COMPLETED")
    assert jobs.slurm.wait(job, "COMPLETED")["Restarts"] == "1"
    assert "stopped before its last step, requeueing it" in jobs.slurm.log(job)


def preempted_before_training(jobs: Jobs) -> None:
    """SIGTERM arrives before the trainer runs: the script requeues the job."""
    jobs.time_limit_job_started.wait()
    job = jobs.submit("early", nodes=1)
    jobs.wait_for_log("rendezvous at", job)
    jobs.slurm.call("scancel", "--signal=TERM", job)
    assert jobs.slurm.wait(job, "PENDING")["Restarts"] == "1"
    jobs.slurm.call("scancel", job)


def stopped_by_the_user(jobs: Jobs) -> None:
    """The command from the log stops the job: it saves and is not requeued."""
    jobs.time_limit_job_started.wait()
    job = jobs.submit("stopped", nodes=1)
    suspended = jobs.suspend("stopped")
    (line,) = [line for line in jobs.slurm.log(job).splitlines() if line.startswith("stop and save: ")]
    jobs.slurm.call(*line.removeprefix("stop and save: ").split())
    resume(suspended)
    end = jobs.slurm.wait(job, "FAILED")
    log = jobs.slurm.log(job)
    assert end["ExitCode"] == "130:0", log
    step = len(jobs.losses("stopped"))
    command = f"sbatch --nodes=1 {TRAIN} {shlex.join(jobs.words('stopped'))}"
    assert f"stopped at step {step} of {STEPS}, saved at {step}; to resume: {command}" in log


def cancelled(jobs: Jobs) -> None:
    """scancel without a signal gives KillWait: the job saves and is not requeued."""
    jobs.time_limit_job_started.wait()
    job = jobs.submit("cancelled", nodes=1)
    jobs.suspend("cancelled")
    jobs.slurm.call("scancel", job)
    jobs.slurm.wait(job, "CANCELLED")
    step = len(jobs.losses("cancelled"))
    assert (jobs.runs / "cancelled" / "checkpoints" / f"step-{step:08d}").is_dir()
    assert jobs.slurm.job(job)["Restarts"] == "0"


def failing(jobs: Jobs) -> None:
    """A user error: torchrun does not restart it and the job is not requeued, despite an old `requeue` file."""
    jobs.time_limit_job_started.wait()
    (jobs.runs / "failing").mkdir(parents=True)
    (jobs.runs / "failing" / "requeue").touch()
    job = jobs.submit("failing", nodes=1, more=(f"data.dir={jobs.slurm.folder}/nowhere",), MAX_RESTARTS="1")
    end = jobs.slurm.wait(job, "FAILED")
    log = jobs.slurm.log(job)
    assert (end["ExitCode"], end["Restarts"]) == ("1:0", "0"), log
    assert "nowhere: " in log and "Traceback" not in log


def mistaken(jobs: Jobs) -> None:
    """An error in the settings ends the job before any process of the run starts."""
    job = jobs.submit("mistaken", more=("train.stps=3",))
    end = jobs.slurm.wait(job, "FAILED")
    assert end["ExitCode"] == "2:0"
    log = [line for line in jobs.slurm.log(job).splitlines() if "GPUs" not in line]
    assert log == ["train.stps: unknown key; did you mean train.steps?"]


def wrong_address(jobs: Jobs) -> None:
    """A first node at a loopback address, or at no address, is reported at once; torchrun would wait for minutes."""
    jobs.time_limit_job_started.wait()
    loopback = jobs.submit(None, HEAD_ADDR="127.0.1.1")
    unused = jobs.submit(None, HEAD_ADDR="10.77.0.9")
    for job in (loopback, unused):
        assert jobs.slurm.wait(job, "FAILED")["Restarts"] == "0"
    assert ": 127.0.1.1 is 127.0.1.1, which is this node; set HEAD_ADDR" in jobs.slurm.log(loopback)
    assert "n2: 10.77.0.9 (10.77.0.9): " in jobs.slurm.log(unused)


SCENARIOS = [
    mistaken,
    wrong_address,
    preempted_before_training,
    failing,
    cancelled,
    stopped_by_the_user,
    preempted,
    requeued,
    undisturbed,
    time_limit,
]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    folder = tmp_path_factory.mktemp("slurm")
    try:
        with cluster(folder) as slurm:
            yield Jobs(slurm)
    except NoSlurm as why:
        pytest.skip(f"a real SLURM cannot be started: {why}")
    setting = f"SLURM_CONF={folder}/slurm.conf".encode()  # no process of this SLURM may be left
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            assert setting not in (process / "environ").read_bytes(), (process / "cmdline").read_bytes()


@pytest.fixture(scope="module")
def scenarios(jobs: Jobs) -> Iterator[dict[str, Future[None]]]:
    """All scenarios, started at the same time after the corpus is prepared."""
    words = [word for word in jobs.words(None) if word.startswith("data.")]
    script = ["launch/slurm/prepare.sbatch", "--config", "launch/tiny.yaml"]
    prepared = jobs.slurm.submit(*script, *words, **jobs.environment)
    jobs.slurm.wait(prepared, "COMPLETED")
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        yield {scenario.__name__: pool.submit(scenario, jobs) for scenario in SCENARIOS}
        jobs.time_limit_job_started.set()


@pytest.mark.parametrize("name", [scenario.__name__ for scenario in SCENARIOS])
def test_scenario(scenarios: dict[str, Future[None]], name: str) -> None:
    scenarios[name].result()


@pytest.mark.parametrize("name", ["limit", "preempted", "requeued"])
def test_interrupted_runs_equal_the_undisturbed_run(jobs: Jobs, scenarios: dict[str, Future[None]], name: str) -> None:
    assert jobs.losses(name) == jobs.losses("tiny-1")


def test_the_log_has_folder_commands_and_addresses(jobs: Jobs, scenarios: dict[str, Future[None]]) -> None:
    scenarios["preempted"].result()
    job, run = jobs.ids["preempted"], jobs.runs / "preempted"
    log = jobs.slurm.log(job).splitlines()
    for start in (0, 1):
        first = log.index(f"job {job}, start {start}; nodes: 2 (n3 n4); ranks: 2, 1 per node")
        assert log[first + 1] == f"run folder:    {run}, with a log for each node in logs/"
        assert log[first + 2] == f"stop and save: scancel --signal=INT {job}"
        resume = shlex.split(log[first + 3])
        assert resume == ["resume:", "sbatch", "--nodes=2", TRAIN, *jobs.words("preempted")]
        for node in ("n3", "n4"):
            lines = (run / "logs" / f"{job}-{start}-{node}.log").read_text().splitlines()
            assert lines[0] == f"{node}: 2 GPUs"  # all GPUs of the node, because of --exclusive
            assert lines[1].startswith(f"{node}: address {jobs.slurm.address(node)} on ")


def test_shellcheck_finds_no_fault_in_the_scripts() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    scripts = [str(path) for path in sorted([*(ROOT / "launch" / "slurm").iterdir(), ROOT / "launch" / "install.sh"])]
    result = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout
