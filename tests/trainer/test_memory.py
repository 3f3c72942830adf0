"""The memory that `--dry-run` estimates."""

import pytest
import torch

from data.loader import Share
from parallel import mesh
from parallel.mesh import World
from tests.gpu.memory import CASES
from trainer import dryrun, machine
from trainer.config import read_config
from trainer.memory import Memory, kept_bytes, memory_needed

# GiB that torch's allocator handed out at the peak of a step, exact, on the simulated CUDA runtime: what
# `python -m tests.gpu.memory` printed there. No GPU has confirmed them yet.
EXACT = {
    "scout": 28.478,
    "scout x 2": 18.370,
    "scout x 2 selective": 13.884,
    "scout x 2 full": 12.117,
    "scout x 4": 13.009,
    "scout x 4 expert 2": 13.692,
    "scout x 4 expert 1": 15.938,
    "scout x 2 every": 18.173,
    "scout float32": 30.664,
    "scout top 2": 30.154,
    "kaggle x 2": 6.971,
    "17b x 4": 39.395,
    "17b x 8": 27.335,
    "17b x 4 none": 44.402,
    "tiny": 0.0756,
    "tiny x 2": 0.0623,
}


def need(processes: int, words: list[str], dtype: torch.dtype = torch.bfloat16) -> Memory:
    config = read_config(words[1], words[2:])
    p = config.parallel
    degrees = mesh.degrees(World(0, processes, 0, processes), config.model, p.replicate, p.shard, p.expert)
    share = Share(config.train.global_batch_size, config.train.micro_batch_size, processes)
    return memory_needed(config, config.data.vocab_size, dtype, degrees, share)


@pytest.mark.parametrize("label", EXACT)
def test_the_estimate_is_within_5_percent_of_the_allocators_peak(label):
    processes, words = CASES[label]
    dtypes = {"kaggle x 2": torch.float16, "scout float32": torch.float32}
    found = need(processes, words, dtypes.get(label, torch.bfloat16))
    assert found.total / 2**30 == pytest.approx(EXACT[label], rel=0.05)


def test_the_parts_add_up_and_follow_the_settings():
    scout = ["--config", "launch/scout.yaml"]
    one, two = need(1, scout), need(2, scout)
    assert one.total == sum(one.parts().values())
    assert one.state == 12 * 1_276_189_440 and one.state / 2 < two.state < 0.52 * one.state  # 31 experts on 2: 16, 15
    modes = [need(2, [*scout, f"train.recompute={mode}"]) for mode in ("none", "selective", "full")]
    assert modes[0].activations > modes[1].activations > modes[2].activations
    assert modes[0].state == modes[2].state
    half = need(2, [*scout, "train.micro_batch_size=8"])
    assert half.activations == pytest.approx(two.activations / 2) and half.state == two.state
    every = need(2, [*scout, "train.reduce=every"])
    assert every.gradients < two.gradients  # which then need not be kept whole


def test_bf16_keeps_less_than_fp32_though_norms_keep_their_input_wide():
    model = read_config("launch/scout.yaml").model
    for mode in ("none", "selective", "full"):
        numbers = kept_bytes(model, 0, mode, 4)
        assert numbers / 2 < kept_bytes(model, 0, mode, 2) < numbers


def test_the_plan_lists_the_parts_and_the_peak_of_a_gpu(monkeypatch):
    gpu, bf16 = torch.device("cuda", 0), torch.bfloat16
    words = ["--config", "launch/scout.yaml"]
    found = need(2, words)
    lines = dryrun.memory_table(found, gpu, bf16)
    gib = sum(float(line.split()[-2]) for line in lines[:-1])
    assert gib == pytest.approx(found.total / 2**30, abs=0.03)
    assert lines[-1].startswith("besides, not counted by torch's allocator: about 1 to 1.5 GiB")
    assert len(dryrun.memory_table(found, torch.device("cpu"), bf16)) == len(lines) - 1
    monkeypatch.setattr(machine, "describe", lambda device: "NVIDIA L4")
    monkeypatch.setattr(machine, "peak_flops", lambda device, dtype: machine.peak_of("NVIDIA L4", dtype))
    config = read_config(words[1])
    step = dryrun.compute(config, 32000, 262144, gpu, bf16)
    assert step == "197.3 TFLOP a step; MFU is the part of 121 TFLOP/s, the peak of NVIDIA L4 in bfloat16"
    unknown = dryrun.compute(config, 32000, 262144, gpu, torch.float32)
    assert unknown.endswith("no MFU, since the peak of NVIDIA L4 in float32 is not known")
    assert dryrun.compute(config, 32000, 262144, torch.device("cpu"), bf16) == "197.3 TFLOP a step"
