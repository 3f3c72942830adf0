"""How the processes of a run find each other, and avoid the processes of an earlier launch.

A launch is one start of all workers by torchrun. torchrun keeps its key-value store when it launches the workers again,
with every key that the workers of the earlier launch wrote. torch's own rendezvous then reads the addresses of
processes that have exited, and waits for them until it times out. Therefore the ranks first agree on a prefix for their
keys that no earlier launch can know.
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

LAUNCHER_STORE_TIMEOUT_S = 30.0  # torchrun's store exists before the workers start, or it never will
CONNECT_ATTEMPT_TIMEOUT_S = 5.0
POLL_INTERVAL_S = 0.1
RECONNECT_INTERVAL_S = 0.2


def join_store(world: World, timeout: float, give_up: Callable[[], bool] = lambda: False) -> dist.Store | None:
    """A store to which only the ranks of this launch write.

    If a process group exists, this is its store. Returns None for a single process, or if MASTER_ADDR is not set.
    Raises TimeoutError after `timeout` seconds, or as soon as `give_up` returns True; the message names the ranks that
    did not start.
    """
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if world.size == 1 or "MASTER_ADDR" not in os.environ:
        return None
    store = _connect_to_store(world, timeout)
    start = time.monotonic()
    process_id = uuid.uuid4().hex  # unlike a pid, it is never used again
    while True:
        if world.rank == 0:
            launch = _announce_launch(store, world, process_id)
        else:
            launch = _find_launch(store, world, process_id)
        if launch is not None:
            return dist.PrefixStore(launch, store)
        waited = time.monotonic() - start
        if waited > timeout or give_up():
            raise TimeoutError(
                f"rank {world.rank} waited {waited:.0f} s for {_missing_ranks(store, world)} to start; "
                "check the output of the other processes"
            )
        time.sleep(POLL_INTERVAL_S)


def _connect_to_store(world: World, timeout: float) -> dist.TCPStore:
    """torchrun's store, or the store that rank 0 serves if torchrun has none."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    launcher_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_server = world.rank == 0 and not launcher_serves
    if not is_server:
        _wait_for_server(world, host, port, min(timeout, LAUNCHER_STORE_TIMEOUT_S) if launcher_serves else timeout)
    limit = datetime.timedelta(seconds=timeout)
    return dist.TCPStore(host, port, world.size, is_server, limit, wait_for_workers=False, multi_tenant=True)


def _wait_for_server(world: World, host: str, port: int, timeout: float) -> None:
    """Wait until something accepts connections at the address. Raises TimeoutError.

    TCPStore would wait, too, but it waits longer after each attempt, and prints a stack trace for each.
    """
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=CONNECT_ATTEMPT_TIMEOUT_S).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"rank {world.rank} cannot connect to the rendezvous at {host}:{port} ({error}); "
                    "check MASTER_ADDR, MASTER_PORT and the network"
                ) from None
            time.sleep(RECONNECT_INTERVAL_S)


def connect(world: World, device: torch.device, timeout: float, store: dist.Store | None = None) -> None:
    """Join the process group of the run, whose collectives time out after `timeout` seconds.

    Does nothing in a single process, or if the process group exists.
    """
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
    """The same store for another thread, with its own connection and its own prefix of keys."""
    return dist.PrefixStore(prefix, store.clone())  # type: ignore[attr-defined]


def _announce_launch(store: dist.Store, world: World, process_id: str) -> str | None:
    """Rank 0: publish the name of this launch with the process ids of all other ranks, and wait for their answers.

    Returns the name once all ranks have answered, else None: call it again.
    """
    names = [f"here/{rank}" for rank in range(1, world.size)]
    if not store.check(names):
        return None
    store.set("launch", json.dumps([process_id, *(value.decode() for value in store.multi_get(names))]))
    all_answered = store.check([f"{process_id}/{name}" for name in names])
    return process_id if all_answered else None


def _find_launch(store: dist.Store, world: World, process_id: str) -> str | None:
    """Another rank: publish this process's id, and answer to a launch that lists it.

    A launch that lists another process for this rank is an earlier one. Returns the name of the launch, or None if
    there is none yet: call it again.
    """
    store.set(f"here/{world.rank}", process_id)
    if not store.check(["launch"]):
        return None
    launch, *process_ids = json.loads(store.get("launch"))
    if process_ids[world.rank - 1] != process_id:
        return None
    store.set(f"{launch}/here/{world.rank}", "")
    return launch


def _missing_ranks(store: dist.Store, world: World) -> str:
    """The ranks that have not written to the store, in words."""
    if world.rank > 0:
        return "other ranks" if store.check(["launch"]) else "rank 0"
    missing = [str(rank) for rank in range(1, world.size) if not store.check([f"here/{rank}"])]
    if not missing:  # all keys exist, but those of some ranks are from an earlier launch
        return "the processes of other ranks that were restarted"
    return f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
