"""Training steps over a slow link, with and without overlap, in turns: how much of each leg's transfer is hidden.

Started on two hosts by test_overlap.py. Prints one JSON object: for each leg the medians over layers and steps of
`transfer` (the wait without overlap), `beside` (the compute placed beside it), `exposed` (what is still waited for with
overlap, at the start or the finish), in seconds; and the step times of both ways.
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=64, help="of 128 tokens each: 8,192 a rank")
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
    told: dict[str, dict[str, list[float]]] = {}
    begun: dict[int, tuple[str, float, float]] = {}

    def timed_start(transfer: Transfer, rows: torch.Tensor, backward: bool = False) -> None:
        before = time.perf_counter()
        start(transfer, rows, backward)
        after = time.perf_counter()
        begun[id(transfer)] = ("backward " if backward else "") + transfer.name, before, after

    def timed_finish(transfer: Transfer) -> torch.Tensor:
        name, before, after = begun.pop(id(transfer))
        now = time.perf_counter()
        rows = finish(transfer)
        end = time.perf_counter()
        way = told.setdefault(name, {"transfer": [], "beside": [], "exposed": []})
        if transfer.overlap:
            way["beside"].append(now - after)
            way["exposed"].append(after - before + end - now)
        else:
            way["transfer"].append(after - before)
        return rows

    setattr(Transfer, "start", timed_start)  # noqa: B010
    setattr(Transfer, "finish", timed_finish)  # noqa: B010
    tokens = torch.randint(0, VOCAB, (args.rows, 128), generator=torch.Generator().manual_seed(world.rank))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * args.steps + 2):
        for exchange in exchanges:
            exchange.overlap = number % 2 == 0
        began = time.perf_counter()
        fsdp.reduce_gradients(model, True)
        output = model(tokens, tokens)
        assert output.loss is not None
        output.loss.backward()
        for p in model.parameters():
            p.grad = None
        if number >= 2:
            seconds[number % 2 == 0].append(time.perf_counter() - began)
        else:
            told.clear()  # warming up
    legs = {name: {k: statistics.median(v) for k, v in way.items()} for name, way in told.items()}
    steps = {"with": statistics.median(seconds[True]), "without": statistics.median(seconds[False])}
    print(json.dumps({"legs": legs, **steps}))
    rendezvous.disconnect()
    exit_now(0)  # Python would take itself apart under gloo's threads, and may abort


if __name__ == "__main__":
    main()
