"""Saving and loading: speed compared with plain files, memory, the delay of training by a save, and resuming."""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from model.config import ModelConfig
from model.transformer import Transformer
from parallel import collectives, gradients, mesh
from parallel.build import build_model
from parallel.mesh import World
from tests.bench.harness import Figure, figure, peak, reset_peak
from tests.support.pool import Pool
from trainer.checkpoint.folder import open_checkpoint
from trainer.checkpoint.load import checkpoint_tensors, load_checkpoint
from trainer.checkpoint.saver import Saver
from trainer.config import CheckpointConfig, TrainConfig
from trainer.machine import keep_freed_memory
from trainer.optimizer import make_optimizer

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(dim=512, n_layers=2, n_heads=8, expert_dim=320, n_experts=31)  # 440 MB with its optimizer
VOCAB, BATCH, LENGTH = 4096, 2, 256
BLOCK_BYTES = 1 << 24


def measure(repeats: int) -> list[Figure]:
    """All figures of checkpoints.

    One process measures all figures except the delay. Two processes measure the delay, because they keep two cores
    busy: on an idle core, a save would delay nothing.
    """
    pool, repeats = Pool(), max(3, repeats // 2)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        Path(folder, "tokenizer.model").write_bytes(b"a tokenizer" * 10_000)
        one = pool.run(1, "tests.bench.checkpoint:save_and_load", timeout=3600, folder=folder, repeats=repeats)[0]
        two = pool.run(2, "tests.bench.checkpoint:train_during_save", timeout=3600, folder=folder, repeats=repeats)[0]
    pool.close()
    size = f"{one['MB'][0]:,.0f} MB"
    plain_read = "speed of plain reading with the same checksum"
    delay = "delay of two ranks' steps by a save in the background"
    return [
        figure(f"save of {size}", one["save"], one["plain write"], "speed of a plain flushed file", "0.40", True),
        figure(f"load of {size}", one["load"], one["plain read"], plain_read, "0.60", True),
        figure("additional memory of a save", one["memory"], [512.0], "share of 512 MiB", "1", unit="MiB"),
        figure(delay, two["delay"], two["save"], "share of a save that waits", "0.10"),
        resume(repeats),
    ]


def build(folder: str, async_save: bool, threads: int) -> tuple[Transformer, torch.optim.Optimizer, Saver]:
    """A model on all ranks, its optimizer, and their saver."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    world, cpu = World.from_environment(), torch.device("cpu")
    layout = mesh.make_mesh(mesh.resolve_degrees(world, MODEL, 1, "auto", world.size), cpu)
    model = build_model(MODEL, VOCAB, 0, cpu, torch.float32, layout).train()
    optimizer = make_optimizer(model, TrainConfig(steps=1))
    config, path = CheckpointConfig(keep=1, async_save=async_save), Path(folder)
    tensors = checkpoint_tensors(model, optimizer)
    return model, optimizer, Saver(path / f"{world.size}", tensors, path / "tokenizer.model", config)


def save_and_load(folder: str, repeats: int) -> dict[str, list[float]]:
    """Measure saves and loads in one process.

    Returns seconds of saving ("save") and loading ("load") a checkpoint, and of writing and reading the same bytes as a
    plain file ("plain write", "plain read"); MiB that a save adds to the memory ("memory"); and the size in MB ("MB").
    """
    model, optimizer, saver = build(folder, False, len(os.sched_getaffinity(0)))
    seconds: dict[str, list[float]] = {"save": [], "plain write": [], "load": [], "plain read": [], "memory": []}
    everything = [t.detach().flatten() for t in checkpoint_tensors(model, optimizer).values()]
    content, plain = torch.cat(everything).view(torch.uint8).numpy().data, Path(folder, "plain")
    for number in range(repeats + 1):
        before = reset_peak()
        with timed(seconds["save"], number > 0):
            saver.save(number, {})
        if number == 0:  # the first save also allocates the memory that later saves use again
            seconds["memory"].append((peak() - before) / 2**20)
        with timed(seconds["plain write"], number > 0), open(plain, "wb", buffering=0) as file:
            for start in range(0, len(content), BLOCK_BYTES):
                file.write(content[start : start + BLOCK_BYTES])
            os.fsync(file.fileno())
        path = saver.folder / f"step-{number:08d}"
        for each in (plain, *path.iterdir()):
            drop_from_page_cache(each)
        with timed(seconds["load"], number > 0):
            load_checkpoint(open_checkpoint(path), model, optimizer)
        buffer = bytearray(BLOCK_BYTES)
        with timed(seconds["plain read"], number > 0), open(plain, "rb", buffering=0) as file:
            while got := file.readinto(buffer):
                zlib.crc32(memoryview(buffer)[:got])
        plain.unlink()
    saver.close()
    return {**seconds, "MB": [len(content) / 1e6]}


@contextmanager
def timed(seconds: list[float], is_counted: bool) -> Iterator[None]:
    """Append the seconds of the `with` block to `seconds`, unless it is a warm-up."""
    start = time.perf_counter()
    yield
    if is_counted:
        seconds.append(time.perf_counter() - start)


def train_during_save(folder: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of a save that waits, and seconds by which a save in the background delays the steps during it."""
    model, optimizer, saver = build(folder, True, 1)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(collectives.rank()))

    def step() -> None:
        output = model(tokens, tokens)
        assert output.loss is not None
        (output.loss / tokens.numel()).backward()
        _, written = collectives.sum_over_ranks(gradients.sum_of_squares(model), torch.tensor(float(saver.ready)))
        saver.wait_for_staging()
        optimizer.step()
        optimizer.zero_grad()
        if int(written) == World.from_environment().size:
            saver.poll()

    def steps(count: int, save: bool = False) -> float:
        start = time.perf_counter()
        if save:
            saver.save(next(number), {})
        for _ in range(count):
            step()
        return time.perf_counter() - start

    number, seconds = itertools.count(1), dict[str, list[float]](save=[], delay=[])
    for _ in range(3):  # warm-up
        step()
        saver.save(next(number), {}, wait=True)
    saver.save(next(number), {})
    count = 2  # two steps more than a save in the background needs
    while saver.pending is not None:
        step()
        count += 1
    for _ in range(repeats):
        with timed(seconds["save"], True):
            saver.save(next(number), {}, wait=True)
        before = steps(count)
        during = steps(count, save=True)
        seconds["delay"].append(during - (before + steps(count)) / 2)
        saver.finish()
    saver.close()
    return seconds


def drop_from_page_cache(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def resume(repeats: int) -> Figure:
    """Seconds from the command to the end of the first step: of a run that resumes, compared with a new run."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        arguments = ["--config", "launch/tiny.yaml", f"data.dir={folder}/corpus"]
        arguments += ["data.stories=3000", "data.vocab_size=512"]
        subprocess.run([sys.executable, "-m", "data.prepare", *arguments], cwd=ROOT, check=True, capture_output=True)
        arguments += [f"model.{key}={getattr(MODEL, key)}" for key in ("dim", "n_layers", "n_heads", "expert_dim")]
        arguments += ["log.wandb=disabled", "eval.final=none", f"run.dir={folder}/runs", "train.dtype=float32"]
        times: dict[str, list[float]] = {"fresh": [], "resumed": []}
        for number in range(max(3, repeats // 3)):
            run = Path(folder, "runs", f"r{number}")
            for kind in times:
                start = time.perf_counter()
                command = [sys.executable, "-m", "trainer.main", *arguments, f"run.name={run.name}"]
                with subprocess.Popen(
                    command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                ) as process:
                    wait_for_step(run / "metrics.jsonl", 1 if kind == "fresh" else 2, process.poll)
                    times[kind].append(time.perf_counter() - start)
                    process.terminate()
            shutil.rmtree(run)
    name = "start to the first step, resumed"
    return figure(name, times["resumed"], times["fresh"], "time over a fresh one", "10 s more")


def wait_for_step(metrics: Path, start: int, poll: Callable[[], int | None]) -> None:
    """Wait until a training step follows start number `start` (from 1) in metrics.jsonl.

    `poll` returns the exit code of the run, which must still be running.
    """
    while True:
        content = metrics.read_text() if metrics.exists() else ""
        starts = content.split('"event": "start"')
        if len(starts) > start and '"kind": "train"' in starts[start]:
            return
        assert poll() is None
        time.sleep(0.02)
