"""Saving and loading: speed against plain files, memory, what a save beside the training costs it, and a resume."""

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
from parallel import fsdp
from tests.bench.harness import Figure, figure
from tests.pool import Pool
from trainer import checkpoint
from trainer.config import CheckpointConfig, TrainConfig
from trainer.machine import keep_freed_memory
from trainer.optimizer import make_optimizer
from trainer.saver import Saver

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(dim=512, n_layers=2, n_heads=8, expert_dim=320, n_experts=31)  # 440 MB with its optimizer
VOCAB, BATCH, LENGTH = 4096, 4, 256
BLOCK = 1 << 24


def measure(repeats: int) -> list[Figure]:
    pool = Pool()
    try:
        numbers = pool.run(1, "tests.bench.checkpoint:all_but_a_resume", timeout=3600, repeats=max(3, repeats // 2))[0]
    finally:
        pool.close()
    size = f"{numbers['MB']:,.0f} MB"
    sync, read = numbers["save"], "speed of plain reading with the same checksum"
    return [
        figure(f"save of {size}", sync, numbers["plain write"], "speed of a plain flushed file", "0.40", True),
        figure(f"load of {size}", numbers["load"], numbers["plain read"], read, "0.60", True),
        figure("memory that a save takes besides", numbers["memory"], [512.0], "share of 512 MiB", "1", unit="MiB"),
        figure("delay of the steps beside a save", numbers["delay"], sync, "share of a save that waits", "0.10"),
        resume(repeats),
    ]


def all_but_a_resume(repeats: int) -> dict[str, list[float]]:
    keep_freed_memory()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = fsdp.build(MODEL, VOCAB, 0, torch.device("cpu"), torch.float32, None).train()
    optimizer = make_optimizer(model, TrainConfig(steps=1))
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        (folder / "tokenizer.model").write_bytes(b"a tokenizer" * 10_000)
        found = save_and_load(folder, model, optimizer, repeats)
        return {**found, **beside(folder, model, optimizer, repeats)}


def saver(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer, beside: bool) -> Saver:
    config = CheckpointConfig(keep=1, async_save=beside)
    return Saver(folder / "checkpoints", checkpoint.tensors(model, optimizer), folder / "tokenizer.model", config)


@contextmanager
def timed(seconds: list[float], counts: bool) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if counts:
        seconds.append(time.perf_counter() - start)


def save_and_load(
    folder: Path, model: Transformer, optimizer: torch.optim.Optimizer, repeats: int
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {"save": [], "plain write": [], "load": [], "plain read": [], "memory": []}
    ours, plain, name = saver(folder, model, optimizer, False), folder / "plain", "step-{:08d}"
    everything = [t.detach().flatten() for t in checkpoint.tensors(model, optimizer).values()]
    content = torch.cat(everything).view(torch.uint8).numpy().data
    for number in range(repeats + 1):
        before = reset_peak()
        with timed(seconds["save"], number > 0):
            ours.save(number, {})
        seconds["memory"].append((peak() - before) / 2**20)
        with timed(seconds["plain write"], number > 0), open(plain, "wb", buffering=0) as file:
            for start in range(0, len(content), BLOCK):
                file.write(content[start : start + BLOCK])
            os.fsync(file.fileno())
        path = folder / "checkpoints" / name.format(number)
        for file_ in (plain, *path.iterdir()):
            forget(file_)
        with timed(seconds["load"], number > 0):
            checkpoint.load(checkpoint.open_checkpoint(path), model, optimizer)
        buffer = bytearray(BLOCK)
        with timed(seconds["plain read"], number > 0), open(plain, "rb", buffering=0) as file:
            while got := file.readinto(buffer):
                zlib.crc32(memoryview(buffer)[:got])
        plain.unlink()
    ours.close()
    return {**seconds, "MB": len(content) / 1e6}  # type: ignore[dict-item]


def beside(
    folder: Path, model: Transformer, optimizer: torch.optim.Optimizer, repeats: int
) -> dict[str, list[float]]:
    """Seconds by which a save in the background makes the steps until it is published take longer."""
    ours = saver(folder, model, optimizer, True)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH))

    def steps(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            output = model(tokens, tokens)
            assert output.loss is not None
            (output.loss / tokens.numel()).backward()
            if ours.ready:
                ours.advance()
            ours.before_change()
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - start

    steps(3)
    ours.save(10**6, {})
    start, count = time.perf_counter(), 0
    while ours.pending is not None:
        steps(1)
        count += 1
    print(f"{count} steps of {(time.perf_counter() - start) / count:.2f} s until a save is published", file=sys.stderr)
    count += count // 2 + 1
    delays = []
    for number in range(repeats):
        alone = steps(count)
        ours.save(10**6 + 1 + number, {})
        with_save = steps(count)
        ours.finish()
        delays.append(with_save - (alone + steps(count)) / 2)
    ours.close()
    print([round(d, 3) for d in delays], file=sys.stderr)
    return {"delay": delays}


def reset_peak() -> int:
    """Forget the largest size that this process had; returns the present one."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def resume(repeats: int) -> Figure:
    """From the command to the end of the first step, of a run that resumes against a fresh one."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        words = ["--config", "launch/tiny.yaml", f"data.dir={folder}/corpus"]
        words += ["data.stories=3000", "data.vocab_size=512"]
        subprocess.run([sys.executable, "-m", "data.prepare", *words], cwd=ROOT, check=True, capture_output=True)
        words += [f"model.{key}={getattr(MODEL, key)}" for key in ("dim", "n_layers", "n_heads", "expert_dim")]
        words += ["log.wandb=disabled", "eval.final=none", f"run.dir={folder}/runs", "train.dtype=float32"]
        times: dict[str, list[float]] = {"fresh": [], "resumed": []}
        for number in range(max(3, repeats // 3)):
            run = Path(folder, "runs", f"r{number}")
            for kind in times:
                began = time.perf_counter()
                start = [sys.executable, "-m", "trainer.main", *words, f"run.name={run.name}"]
                with subprocess.Popen(start, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                    wait_for_step(run / "metrics.jsonl", 1 if kind == "fresh" else 2, process.poll)
                    times[kind].append(time.perf_counter() - began)
                    process.terminate()
            shutil.rmtree(run)
    return figure("start to the first step, resumed", times["resumed"], times["fresh"], "time over a fresh one", "")


def wait_for_step(metrics: Path, starts: int, alive: Callable[[], int | None]) -> None:
    """Until a step follows the start of this number."""
    while True:
        content = metrics.read_text() if metrics.exists() else ""
        parts = content.split('"event": "start"')
        if len(parts) > starts and '"kind": "train"' in parts[starts]:
            return
        assert alive() is None
        time.sleep(0.02)
