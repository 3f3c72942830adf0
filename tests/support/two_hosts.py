"""Two hosts on one machine: network namespaces with a link between them, and torch ranks on them."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PORT = 29400


class NoHosts(Exception):
    """Namespaces cannot be made here: why."""


def _call(*words: str) -> None:
    try:
        result = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        raise NoHosts(f"the command {words[0]} (Debian: iproute2) is not installed") from None
    if result.returncode:
        raise NoHosts(f"{' '.join(words)}: {result.stderr.strip()}")


@contextlib.contextmanager
def two_hosts(rate: str | None = None) -> Iterator[list[str]]:
    """Names of two namespaces whose link takes `rate` (as of tc: 400mbit; None: all) each way. Raises NoHosts."""
    names = [f"scout-{os.getpid()}-{i}" for i in (0, 1)]
    links = [f"sc{os.getpid() % 100000}-{i}" for i in (0, 1)]
    try:
        for name in names:
            _call("ip", "netns", "add", name)
        _call("ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for i, (name, link) in enumerate(zip(names, links, strict=True)):
            _call("ip", "link", "set", link, "netns", name, "name", "veth0")
            inside = ("ip", "netns", "exec", name)
            _call(*inside, "ip", "addr", "add", f"10.77.0.{i + 1}/24", "dev", "veth0")
            _call(*inside, "ip", "link", "set", "veth0", "up")
            _call(*inside, "ip", "link", "set", "lo", "up")
            if rate is not None:
                shape = ("rate", rate, "burst", "256kb", "latency", "500ms")
                _call(*inside, "tc", "qdisc", "add", "dev", "veth0", "root", "tbf", *shape)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def run(hosts: list[str], module: str, *words: str, timeout: float = 120) -> list[str]:
    """stdout of `python -m module words`, one rank with one thread on each host."""
    ranks = []
    for number, host in enumerate(hosts):
        place = {"RANK": number, "WORLD_SIZE": len(hosts), "MASTER_PORT": PORT, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        env = {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "veth0", "OMP_NUM_THREADS": "1"}
        env |= {name: str(value) for name, value in place.items()}
        command = ["ip", "netns", "exec", host, sys.executable, "-m", module, *words]
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=pipe, stderr=pipe, text=True))
    try:
        outputs = [rank.communicate(timeout=timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, err) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, err
    return [out for out, _ in outputs]
