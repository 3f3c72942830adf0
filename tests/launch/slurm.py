"""A SLURM for tests: munged, slurmctld and two slurmd of Debian's packages, as root, without systemd.

Each node is a machine to itself as far as the network goes: its own name, its own addresses, and an /etc/hosts that
maps its own name to 127.0.1.1, as Debian's installer writes it. Where namespaces cannot be made, both are this host.

    with cluster(folder) as slurm:
        job = slurm.submit("--nodes=2", "launch/slurm/train.sbatch", "--config", "launch/tiny.yaml")
        slurm.wait(job, "COMPLETED")

Key, sockets, state and logs lie in `folder`, and no SLURM that the machine may have is asked or touched.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.parallel import hosts

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
NODES = ("n1", "n2")
CPUS = 64  # each node says it has: jobs lie side by side


class NoSlurm(Exception):
    """No SLURM can be started here: why."""


@dataclass
class Slurm:
    folder: Path
    machines: list[list[str]] = field(default_factory=list)  # words before a command that is to run on a node
    addresses: list[str] = field(default_factory=list)  # of the nodes

    @property
    def environment(self) -> dict[str, str]:
        """For commands: of this SLURM and no other, and without what a job around this test may have set."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def call(self, *words: str, **env: str) -> str:
        """stdout of a command on the first node, in the project's folder."""
        command = [*self.machines[0], *words]
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=self.environment | env, timeout=60
        )
        assert result.returncode == 0, f"{' '.join(words)}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def submit(self, *words: str, **env: str) -> str:
        """Submits a script with its arguments. Returns the job's id."""
        output = f"--output={self.folder}/%j.out"
        return self.call("sbatch", "--parsable", output, *words, **env)

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by name: JobState, Restarts, ..."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, job: str, *states: str, timeout: float = 300) -> dict[str, str]:
        """Waits until the job is in one of the states. Raises AssertionError with its log."""
        end = time.monotonic() + timeout
        while (now := self.job(job))["JobState"] not in states:
            assert time.monotonic() < end, f"job {job} is {now['JobState']}\n{self.log(job)}"
            time.sleep(0.5)
        return now

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.out"
        return path.read_text() if path.exists() else ""


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """A SLURM with the idle nodes n1 and n2. Raises NoSlurm."""
    if os.geteuid() != 0:
        raise NoSlurm("it takes root")
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        raise NoSlurm(f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)")
    slurm = Slurm(folder)
    daemons: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        _make_machines(slurm, stack)
        _configure(slurm)
        try:
            _start(slurm, daemons)
            yield slurm
        finally:
            _stop(slurm, daemons)


def _make_machines(slurm: Slurm, stack: contextlib.ExitStack) -> None:
    """Two network namespaces with names of their own, or twice this host."""
    try:
        names = stack.enter_context(hosts.two_hosts())
    except hosts.NoHosts:
        slurm.machines, slurm.addresses = [[], []], ["127.0.0.1", "127.0.0.1"]
        return
    slurm.addresses = ["10.77.0.1", "10.77.0.2"]
    script = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
    for i, name in enumerate(names):
        own, other = NODES[i], NODES[1 - i]
        table = slurm.folder / f"hosts-{own}"
        table.write_text(f"127.0.0.1 localhost\n127.0.1.1 {own}\n{slurm.addresses[1 - i]} {other}\n")
        inside = ["nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "--mount", "sh", "-c", script, "sh", own, str(table)]
        slurm.machines.append(inside)


def _configure(slurm: Slurm) -> None:
    (slurm.folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (slurm.folder / "munge.key").chmod(0o400)
    controller, *ports = _free_ports(3)
    lines = [
        "ClusterName=scout",
        f"SlurmctldHost={NODES[0]}({slurm.addresses[0]})",
        f"SlurmctldPort={controller}",
        "SlurmUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={slurm.folder}/munge.socket,cred_expire=5",  # a job is requeued after that time
        f"StateSaveLocation={slurm.folder}/state",
        f"SlurmdSpoolDir={slurm.folder}/spool-%n",
        f"SlurmctldPidFile={slurm.folder}/slurmctld.pid",
        f"SlurmdPidFile={slurm.folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={slurm.folder}/slurmctld.log",
        f"SlurmdLogFile={slurm.folder}/slurmd-%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "SchedulerParameters=sched_interval=1,batch_sched_delay=0",
        "SlurmdParameters=config_overrides",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "ReturnToService=2",
        "MailProg=/bin/true",
        *(f"NodeName={n} NodeAddr={a} Port={p} CPUs={CPUS}" for n, a, p in zip(NODES, slurm.addresses, ports)),
        "PartitionName=main Nodes=ALL Default=YES OverSubscribe=FORCE:8 PriorityTier=1 PreemptMode=OFF",
        "PartitionName=spare Nodes=ALL PriorityTier=1 GraceTime=60",
        "PartitionName=urgent Nodes=ALL PriorityTier=2",
    ]
    (slurm.folder / "slurm.conf").write_text("\n".join(lines) + "\n")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _start(slurm: Slurm, daemons: list[subprocess.Popen[bytes]]) -> None:
    folder = slurm.folder
    munge = [f"--{what}={folder}/munge.{end}" for what, end in [("socket", "socket"), ("key-file", "key")]]
    munge += [f"--{what}-file={folder}/munge.{what}" for what in ("pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", "--force", *munge],
        [*slurm.machines[0], "slurmctld", "-D", "-i"],
        *([*inside, "slurmd", "-D", "-N", node] for inside, node in zip(slurm.machines, NODES, strict=True)),
    ]
    for command in commands:
        with open(folder / "daemons.log", "ab") as log:
            environment = slurm.environment
            daemons.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
            )
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(AssertionError):
            if slurm.call("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split() == ["idle"] * len(NODES):
                return
        dead = [daemon.args[-1] for daemon in daemons if daemon.poll() is not None]
        logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.log")))
        assert not dead and time.monotonic() < end, f"SLURM did not come up ({dead})\n{logs}"
        time.sleep(0.2)


def _stop(slurm: Slurm, daemons: list[subprocess.Popen[bytes]]) -> None:
    """Ends all jobs, then the daemons, then what may be left of either: all have our SLURM_CONF."""
    with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
        slurm.call("scancel", "--user=root", "--signal=KILL", "--full")
        slurm.call("scancel", "--user=root")
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in daemons:
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(10)
    mark = f"SLURM_CONF={slurm.folder}/slurm.conf".encode()
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and mark in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
    for daemon in daemons:
        daemon.wait()


