"""How the processes of one life of a run find one another, and only one another.

torchrun keeps its key-value store when it starts workers again, with all that the life before wrote there: torch's own
rendezvous then reads addresses of dead processes and waits for them until its timeout. So the ranks first agree on a
prefix that no life before knew.
"""

import datetime
import json
import os
import socket
import time
import uuid
from collections.abc import Callable

import torch
import torch.distributed as dist

from parallel.mesh import World


def find_others(world: World, timeout: float, timed_out: Callable[[], bool] = lambda: False) -> dist.Store | None:
    """A store that the ranks of this life alone write to; None for a process alone, or where there is no place for one.

    In a process group that is there already, its own. Raises TimeoutError, naming the ranks that did not come, also as
    soon as `timed_out` knows that they will not.
    """
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if world.size == 1 or "MASTER_ADDR" not in os.environ:
        return None
    store = _connect(world, timeout)
    end = time.monotonic() + timeout
    mine = uuid.uuid4().hex
    lead = _gather if world.rank == 0 else _follow
    while (life := lead(store, world, mine)) is None:
        if time.monotonic() > end or timed_out():
            raise TimeoutError(f"rank {world.rank} waited in vain for {_missing(store, world)} to start")
        time.sleep(0.1)
    return dist.PrefixStore(life, store)


def _connect(world: World, timeout: float) -> dist.TCPStore:
    """torchrun's store, which is there or never will be, or else the one that rank 0 serves once it has started."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    launcher_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = world.rank == 0 and not launcher_serves
    end = time.monotonic() + (min(timeout, 30) if launcher_serves else timeout)
    while not serves:  # torch waits ever longer between its own attempts, and prints a stack for each
        try:
            socket.create_connection((host, port), timeout=5).close()
            break
        except OSError as error:
            if time.monotonic() > end:
                where = f"{host}:{port}, where the processes meet"
                raise TimeoutError(f"rank {world.rank} cannot reach {where} ({error})") from None
            time.sleep(0.2)
    limit = datetime.timedelta(seconds=timeout)
    return dist.TCPStore(host, port, world.size, serves, limit, wait_for_workers=False, multi_tenant=True)


def connect(world: World, device: torch.device, timeout: float, store: dist.Store | None = None) -> None:
    """Join the process group of the run, whose collectives wait `timeout` seconds. Alone: nothing."""
    if world.size == 1 or dist.is_initialized():
        return
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cuda:nccl,cpu:gloo" if cuda else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=datetime.timedelta(seconds=timeout),
        device_id=device if cuda else None,
    )


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def second_connection(store: dist.Store, prefix: str) -> dist.Store:
    """The same store for another thread: its own connection, and its own keys."""
    return dist.PrefixStore(prefix, store.clone())  # type: ignore[attr-defined]


def _gather(store: dist.Store, world: World, mine: str) -> str | None:
    """Rank 0: name this life, and whom it saw, until all have answered to that name."""
    names = [f"here/{rank}" for rank in range(1, world.size)]
    if not store.check(names):
        return None
    store.set("life", json.dumps([mine, *(value.decode() for value in store.multi_get(names))]))
    return mine if store.check([f"{mine}/{name}" for name in names]) else None


def _follow(store: dist.Store, world: World, mine: str) -> str | None:
    """Another rank: be seen, and wait for a life in which this process, not one before it, was seen."""
    store.set(f"here/{world.rank}", mine)
    if not store.check(["life"]):
        return None
    life, *seen = json.loads(store.get("life"))
    if seen[world.rank - 1] != mine:
        return None
    store.set(f"{life}/here/{world.rank}", "")
    return life


def _missing(store: dist.Store, world: World) -> str:
    if world.rank > 0:
        return "rank 0" if not store.check(["life"]) else "other ranks"
    absent = [str(rank) for rank in range(1, world.size) if not store.check([f"here/{rank}"])]
    return f"rank{'s' * (len(absent) > 1)} {', '.join(absent)}" if absent else "ranks of a life before"
