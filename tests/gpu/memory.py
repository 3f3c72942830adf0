"""What `--dry-run` estimates against what torch's allocator hands out in training steps, for a list of settings.

    python -m tests.gpu.memory [LABEL ...]

For a machine with GPUs, or the simulated CUDA runtime, in which memory is exact and numbers are not; the labels of
`CASES` say how many GPUs they take. kaggle.yaml is for T4s, all others for a card with bf16. A run's corpus, initial
values and saves are left out, which have no part in the peak. Ends with 1 if an estimate is more than 5% off.
"""

import json
import subprocess
import sys
from collections.abc import Sequence

import torch

from data.loader import Batch, Share, Step
from model.transformer import Transformer
from parallel import mesh
from parallel.mesh import World
from trainer import machine
from trainer.config import Config, read_config
from trainer.faults import StopFlag
from trainer.memory import memory_needed
from trainer.metrics import Reporter
from trainer.optimizer import LossScale, make_optimizer
from trainer.start import Run, build, degrees
from trainer.step import train_step

STEPS, MICRO_BATCHES = 3, 3  # the most of each: more have the same peak
TIMEOUT_S = 600
CUT = ["model.n_layers=2", "train.global_batch_size=64"]

# label: processes, settings
CASES: dict[str, tuple[int, list[str]]] = {
    "scout": (1, ["--config", "launch/scout.yaml"]),
    "scout x 2": (2, ["--config", "launch/scout.yaml"]),
    "scout x 2 selective": (2, ["--config", "launch/scout.yaml", "train.recompute=selective"]),
    "scout x 2 full": (2, ["--config", "launch/scout.yaml", "train.recompute=full"]),
    "scout x 4": (4, ["--config", "launch/scout.yaml"]),
    "scout x 4 expert 2": (4, ["--config", "launch/scout.yaml", "parallel.expert=2"]),
    "scout x 4 expert 1": (4, ["--config", "launch/scout.yaml", "parallel.expert=1"]),
    "2 layers x 4 replicate 2": (4, ["--config", "launch/scout.yaml", "model.n_layers=2", "parallel.replicate=2"]),
    "scout x 2 every": (2, ["--config", "launch/scout.yaml", "train.reduce=every"]),
    "scout float32": (1, ["--config", "launch/scout.yaml", "train.dtype=float32"]),
    "scout top 2": (1, ["--config", "launch/scout.yaml", "model.top_k=2", "model.dropout=0"]),
    "kaggle x 2": (2, ["--config", "launch/kaggle.yaml"]),
    "17b x 4": (4, ["--config", "launch/scout-17b-16e.yaml", *CUT]),
    "17b x 8": (8, ["--config", "launch/scout-17b-16e.yaml", *CUT]),
    "17b x 4 none": (4, ["--config", "launch/scout-17b-16e.yaml", *CUT, "train.recompute=none"]),
    "tiny": (1, ["--config", "launch/tiny.yaml"]),
    "tiny x 2": (2, ["--config", "launch/tiny.yaml"]),
}


def compare(processes: int, words: Sequence[str]) -> tuple[int, int]:
    """Bytes of rank 0 of a run with the settings `words`: the estimate, and the exact peak."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launch, "-m", "tests.gpu.memory", "--worker", *words]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no result after {TIMEOUT_S} s") from None
    found = [line for line in result.stdout.splitlines() if line.startswith('{"estimate"')]
    if result.returncode or not found:
        raise RuntimeError(result.stdout[-2000:] + result.stderr[-4000:])
    numbers = json.loads(found[0])
    return numbers["estimate"], numbers["exact"]


def worker(words: Sequence[str]) -> None:
    """One rank's steps; rank 0 prints what they took."""
    path, settings = (words[1], words[2:]) if words[:1] == ["--config"] else (None, words)
    config = read_config(path, settings)
    run = prepare(config)
    share = Share(config.train.global_batch_size, config.train.micro_batch_size, run.world.size)
    exact = max(steps(run, share))
    estimate = memory_needed(config, config.data.vocab_size, run.dtype, run.degrees, share)
    if run.world.rank == 0:
        print(json.dumps({"estimate": estimate.total, "exact": exact}), flush=True)
    mesh.disconnect()


def prepare(config: Config) -> Run:
    """A run without a corpus, whose weights are left as the allocator gives them."""
    world = World.from_environment()
    device = machine.choose_device("cuda", world)
    mesh.connect(world, device, 600)
    Transformer.init_weights = lambda *args: None  # type: ignore[method-assign]
    vocab_size = config.data.vocab_size
    model, dtype = build(config, world, device, vocab_size, None)
    loss, _ = machine.choose_loss(config.train.liger, device)
    model.head.loss = loss or model.head.loss
    report = Reporter(config.run.folder, config.log, "memory", speaks=False)
    nothing: object = None
    return Run(
        config, world, device, dtype, nothing, nothing, nothing, 10**6, model, make_optimizer(model, config.train),  # type: ignore[arg-type]
        degrees(config, world), LossScale.of(dtype), report, StopFlag(),
    )  # fmt: skip


def steps(run: Run, share: Share) -> list[int]:
    """The peak of each step."""
    data, peaks = run.config.data, []
    run.model.train()
    for _ in range(STEPS):
        batches = [batch(run, share.rows) for _ in range(min(share.micro_batches, MICRO_BATCHES))]
        torch.cuda.reset_peak_memory_stats()
        train_step(run, Step(batches, share.global_batch_size * data.seq_len))
        peaks.append(torch.cuda.max_memory_allocated())
    return peaks


def batch(run: Run, rows: int) -> Batch:
    """Rows of random tokens, in stories of 200 where the config keeps stories apart."""
    data = run.config.data
    tokens = torch.randint(0, data.vocab_size, (rows, data.seq_len)).pin_memory()
    made = Batch(tokens, tokens.clone().pin_memory(), torch.arange(rows).pin_memory())
    if data.mask_documents:
        place = torch.arange(data.seq_len).expand(rows, -1)
        made.positions, made.documents = (place % 200).pin_memory(), (place // 200).contiguous().pin_memory()
    return made


def main(labels: Sequence[str]) -> int:
    worst = 0.0
    for label in labels or CASES:
        try:
            estimate, exact = compare(*CASES[label])
        except RuntimeError as error:  # such as too few GPUs: the other cases still say something
            worst = 1.0
            print(f"{label:24} failed: {str(error).strip().splitlines()[-1]}", flush=True)
            continue
        worst = max(worst, abs(estimate / exact - 1))
        gib = f"exact {exact / 2**30:6.3f} GiB, estimate {estimate / 2**30:6.3f}"
        print(f"{label:24} {gib}: {estimate / exact - 1:+.1%}", flush=True)
    print(f"worst: {worst:.1%}")
    return int(worst > 0.05)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
    else:
        sys.exit(main(sys.argv[1:]))
