"""A SLURM for tests: munged, slurmctld and slurmd from Debian's packages, as root, without systemd.

Nodes n1 and n2 are separate machines as far as the network is concerned: each has its name, its address, and an
/etc/hosts that maps its name to 127.0.1.1, as Debian's installer writes it. If network namespaces cannot be created,
both are this host.

    with cluster(folder) as slurm:
        job = slurm.submit("--nodes=2", "launch/slurm/train.sbatch", "--config", "launch/tiny.yaml")
        slurm.wait(job, "COMPLETED")

Key, sockets, state and logs are in `folder`. No other SLURM of the machine is used.
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
from dataclasses import dataclass
from pathlib import Path

from tests.support import two_hosts as hosts

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
NODES = {"n1": 0, "n2": 1, "n3": 0, "n4": 1}  # the index of each node's machine; n3 and n4 are for preemption
FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY")


class NoSlurm(Exception):
    """No SLURM can be started here; the message says why."""


@dataclass(frozen=True)
class Machine:
    name: str
    address: str
    enter: list[str]  # prefix of a command that runs on this machine


@dataclass
class Slurm:
    folder: Path
    machines: list[Machine]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of this SLURM's commands, without variables of a job in which this test itself may run."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def call(self, *words: str, **env: str) -> str:
        """Run a command on the first node, in the project's folder. Returns its stdout."""
        command = [*self.machines[0].enter, *words]
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=self.environment | env, timeout=60
        )
        assert result.returncode == 0, f"{' '.join(words)}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def submit(self, *words: str, **env: str) -> str:
        """Submit a script with its arguments. Returns the job's id."""
        output = f"--output={self.folder}/%j.out"
        return self.call("sbatch", "--parsable", output, *words, **env)

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`: JobState, Restarts, ..."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, job: str, *states: str, timeout: float = 300) -> dict[str, str]:
        """Wait until a job is in one of the states, and return its fields.

        Raises AssertionError with its log if it ends in another state, or after `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while (fields := self.job(job))["JobState"] not in states:
            is_over = fields["JobState"] in FINAL_STATES or time.monotonic() > end
            assert not is_over, f"job {job} is {fields['JobState']}, {fields['ExitCode']}\n{self.log(job)}"
            time.sleep(0.5)
        return fields

    def address(self, node: str) -> str:
        return self.machines[NODES[node]].address

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.out"
        return path.read_text() if path.exists() else ""


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """A SLURM with four idle nodes. Raises NoSlurm if it cannot be started here."""
    if os.geteuid() != 0:
        raise NoSlurm("root is required")
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        raise NoSlurm(f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)")
    daemons: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        slurm = Slurm(folder, _machines(folder, stack))
        _configure(slurm)
        try:
            _start(slurm, daemons)
            yield slurm
        finally:
            _stop(slurm, daemons)


def _machines(folder: Path, stack: contextlib.ExitStack) -> list[Machine]:
    """Two network namespaces with separate host names; if they cannot be created, this host twice."""
    try:
        spaces = stack.enter_context(hosts.two_hosts())
    except hosts.NamespacesUnavailable:
        return 2 * [Machine(socket.gethostname().partition(".")[0], "127.0.0.1", [])]
    # The mount over /sys/fs/cgroup hides the cgroups of this host, which slurmd would use.
    mounts = 'mount --bind "$2" /etc/hosts && mount -t tmpfs none /sys/fs/cgroup'
    script = f'hostname "$1" && {mounts} && shift 2 && exec "$@"'
    machines = []
    for space, name, address, other in zip(
        spaces, ("n1", "n2"), ("10.77.0.1", "10.77.0.2"), ("10.77.0.2 n2", "10.77.0.1 n1"), strict=True
    ):
        table = folder / f"hosts-{name}"
        table.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{address} {name}-own\n{other}\n")
        enter = ["nsenter", f"--net=/run/netns/{space}", "unshare", "--uts", "--mount"]
        machines.append(Machine(name, address, [*enter, "sh", "-c", script, "sh", name, str(table)]))
    return machines


def _configure(slurm: Slurm) -> None:
    (slurm.folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (slurm.folder / "munge.key").chmod(0o400)
    (slurm.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    gpus = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"  # any devices do: GPUs are only counted
    (slurm.folder / "gres.conf").write_text(gpus)
    controller, *ports = _free_ports(1 + len(NODES))
    first = slurm.machines[0]
    nodes = [
        f"NodeName={name} NodeHostname={slurm.machines[index].name} NodeAddr={slurm.machines[index].address} "
        f"Port={port} CPUs=6 Gres=gpu:2"
        for (name, index), port in zip(NODES.items(), ports, strict=True)
    ]
    lines = [
        "ClusterName=scout",
        f"SlurmctldHost={first.name}({first.address})",
        f"SlurmctldPort={controller}",
        "SlurmUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={slurm.folder}/munge.socket,cred_expire=5",  # a requeued job waits for that time
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
        "GresTypes=gpu",
        *nodes,
        "PartitionName=main Nodes=n1,n2 Default=YES PreemptMode=OFF",
        "PartitionName=spare Nodes=n3,n4 PriorityTier=1 GraceTime=60",
        "PartitionName=urgent Nodes=n3,n4 PriorityTier=2",
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
    munge = [f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
    munge += [f"--{kind}-file={folder}/munge.{kind}" for kind in ("pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", "--force", *munge],
        [*slurm.machines[0].enter, "slurmctld", "-D", "-i"],
        *([*slurm.machines[i].enter, "slurmd", "-D", "-N", name] for name, i in NODES.items()),
    ]
    for command in commands:
        with open(folder / "daemons.log", "ab") as log:
            environment = slurm.environment
            daemons.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment))
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(AssertionError):
            if slurm.call("sinfo", "--noheader", "--format=%D %T").split() == [str(len(NODES)), "idle"]:
                return
        dead = [command for command, daemon in zip(commands, daemons, strict=True) if daemon.poll() is not None]
        logs = "\n".join(path.read_text()[-1000:] for path in sorted(folder.glob("*.log")))
        assert not dead and time.monotonic() < end, f"SLURM did not start (ended: {dead})\n{logs}"
        time.sleep(0.2)


def _stop(slurm: Slurm, daemons: list[subprocess.Popen[bytes]]) -> None:
    """End all jobs, then the daemons, and then remaining processes of either, which all have this SLURM_CONF."""
    with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
        slurm.call("scancel", "--user=root", "--signal=KILL", "--full")
        slurm.call("scancel", "--user=root")
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in daemons:
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(10)
    setting = f"SLURM_CONF={slurm.folder}/slurm.conf".encode()
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and setting in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
    for daemon in daemons:
        daemon.wait()
