"""Two simulated hosts on one machine: network namespaces, a link between them, and one rank on each."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PORT = 29400


class NamespacesUnavailable(Exception):
    """Network namespaces cannot be created on this machine. The message says why."""


def _call(*command: str) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise NamespacesUnavailable(f"the command {command[0]} (Debian: iproute2) is not installed") from None
    if result.returncode:
        raise NamespacesUnavailable(f"{' '.join(command)}: {result.stderr.strip()}")


@contextlib.contextmanager
def two_hosts(rate: str | None = None) -> Iterator[list[str]]:
    """The names of two namespaces, removed at the end. Raises NamespacesUnavailable.

    `rate` limits the link in each direction, as `tc` writes it (400mbit); None leaves it unlimited.
    """
    names = [f"scout-{os.getpid()}-{i}" for i in (0, 1)]
    links = [f"sc{os.getpid() % 100000}-{i}" for i in (0, 1)]
    try:
        for name in names:
            _call("ip", "netns", "add", name)
        _call("ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for i, (name, link) in enumerate(zip(names, links, strict=True)):
            _call("ip", "link", "set", link, "netns", name, "name", "veth0")
            in_namespace = ("ip", "netns", "exec", name)
            _call(*in_namespace, "ip", "addr", "add", f"10.77.0.{i + 1}/24", "dev", "veth0")
            _call(*in_namespace, "ip", "link", "set", "veth0", "up")
            _call(*in_namespace, "ip", "link", "set", "lo", "up")
            if rate is not None:
                limits = ("rate", rate, "burst", "256kb", "latency", "500ms")
                _call(*in_namespace, "tc", "qdisc", "add", "dev", "veth0", "root", "tbf", *limits)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def run(hosts: list[str], module: str, *arguments: str, timeout: float = 120) -> list[str]:
    """Run `python -m module arguments` as one rank with one thread on each host. Returns the ranks' stdout."""
    processes = []
    for rank, host in enumerate(hosts):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(hosts)),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": "veth0",
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, stderr) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, stderr
    return [stdout for stdout, _ in outputs]
