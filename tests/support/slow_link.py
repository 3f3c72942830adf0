"""Measures how much of the time of the exchange's transfers is hidden by computation, over a slow link.

test_overlap.py starts it on two hosts. Steps with and without overlap alternate. It prints one JSON object. For each
transfer (dispatch and combine, in the forward and in the backward), `transfers` has medians over layers and steps, in
seconds: `transfer` is the wait without overlap; `computation` is the time of the computation that runs during the
transfer; `exposed` is the wait that remains with overlap, at the start or at the finish. `with` and `without` are the
seconds of a step with and without overlap.
"""

import argparse
import json
import statistics
import time

import torch

from model.config import ModelConfig
from model.moe import MoE
from parallel import fsdp, mesh, rendezvous
from parallel.build import build_model
from parallel.experts import AllToAllExchange, Transfer
from trainer.fault_tolerance.launcher import exit_now
from trainer.machine import keep_freed_memory

VOCAB = 64
WARM_UP_STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=64, help="rows of 128 tokens for each rank (64: 8,192 tokens)")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    world, cpu = mesh.World.from_environment(), torch.device("cpu")
    rendezvous.connect(world, cpu, 60)
    config = ModelConfig(
        dim=args.dim, n_layers=args.layers, n_heads=4, expert_dim=args.hidden, n_experts=8, max_seq_len=128
    )
    degrees = mesh.Degrees(1, 2, 2)
    model = build_model(config, VOCAB, 0, cpu, torch.float32, mesh.make_mesh(degrees, cpu))
    exchanges = [m.exchange for m in model.modules() if isinstance(m, MoE) and isinstance(m.exchange, AllToAllExchange)]
    start, finish = Transfer.start, Transfer.finish
    measured: dict[str, dict[str, list[float]]] = {}
    started: dict[int, tuple[str, float, float]] = {}  # by id: name, and the times before and after the start

    def timed_start(transfer: Transfer, rows: torch.Tensor, backward: bool = False) -> None:
        before = time.perf_counter()
        start(transfer, rows, backward)
        after = time.perf_counter()
        started[id(transfer)] = ("backward " if backward else "") + transfer.name, before, after

    def timed_finish(transfer: Transfer) -> torch.Tensor:
        name, before, after = started.pop(id(transfer))
        now = time.perf_counter()
        rows = finish(transfer)
        end = time.perf_counter()
        times = measured.setdefault(name, {"transfer": [], "computation": [], "exposed": []})
        if transfer.overlap:
            times["computation"].append(now - after)
            times["exposed"].append(after - before + end - now)
        else:
            times["transfer"].append(after - before)
        return rows

    setattr(Transfer, "start", timed_start)  # noqa: B010
    setattr(Transfer, "finish", timed_finish)  # noqa: B010
    tokens = torch.randint(0, VOCAB, (args.rows, 128), generator=torch.Generator().manual_seed(world.rank))
    seconds_with: list[float] = []
    seconds_without: list[float] = []
    for number in range(2 * args.steps + WARM_UP_STEPS):
        overlap = number % 2 == 0
        for exchange in exchanges:
            exchange.overlap = overlap
        start_of_step = time.perf_counter()
        fsdp.set_gradient_sync(model, True)
        output = model(tokens, tokens)
        assert output.loss is not None
        output.loss.backward()
        for p in model.parameters():
            p.grad = None
        seconds = time.perf_counter() - start_of_step
        if number < WARM_UP_STEPS:
            measured.clear()
        elif overlap:
            seconds_with.append(seconds)
        else:
            seconds_without.append(seconds)
    transfers = {name: _medians(times) for name, times in measured.items()}
    steps = {"with": statistics.median(seconds_with), "without": statistics.median(seconds_without)}
    print(json.dumps({"transfers": transfers, **steps}))
    rendezvous.disconnect()
    exit_now(0)  # a normal exit frees Python's objects while gloo's threads still run, and may abort


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {key: statistics.median(values) for key, values in times.items()}


if __name__ == "__main__":
    main()
