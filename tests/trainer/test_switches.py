"""Every setting in the table of docs/switches.md has an effect, and the table names existing settings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.settings import ConfigError
from tests.support import run_cases as cases
from trainer import devices, machine
from trainer.config import SECTION_TYPES, read_config

ROOT = Path(__file__).resolve().parents[2]

CHANGES = [  # each of these values leads to other weights after five steps
    "model.n_experts=6",
    "model.top_k=2",
    "model.noisy_top_k=true",
    "model.shared_expert=false",
    "model.balance_rate=0.3",
    "model.dropout=0",
    "model.attention_dropout=0.2",
    "model.rope_theta=100",
    "model.n_kv_heads=1",
    "model.n_heads=4",
    "model.n_layers=3",
    "model.dim=32",
    "model.expert_dim=8",
    "train.clip=0.01",
    "train.beta1=0.5",
    "train.beta2=0.5",
    "train.eps=0.1",
    "train.weight_decay=0.5",
    "train.max_lr=1e-2",
    "train.min_lr=2e-3",
    "train.warmup_steps=4",
    "train.decay_steps=3",
    "train.schedule=constant",
    "train.global_batch_size=8",
    "train.seed=2",
    "data.seq_len=16",
    "data.pack=false",
]
MEMORY_SETTINGS = [  # these lead to the same weights
    "train.micro_batch_size=3",
    "train.recompute=selective",
    "train.recompute=full",
    "train.reduce=every",
]


@pytest.fixture(scope="module")
def plain(corpus_dir):
    return cases.steps(str(corpus_dir), "float64", [])


def largest_distance(weights, expected):
    """The largest relative distance of a weight; infinite if the weights have other names or shapes."""
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in expected.items()}:
        return float("inf")
    return max(np.linalg.norm(weights[k] - v) / (np.linalg.norm(v) + 1e-12) for k, v in expected.items())


@pytest.mark.parametrize("word", CHANGES)
def test_each_setting_changes_the_weights(corpus_dir, plain, word):
    _, weights, _ = cases.steps(str(corpus_dir), "float64", [word])
    assert largest_distance(weights, plain[1]) > 1e-7


@pytest.mark.parametrize("word", MEMORY_SETTINGS)
def test_settings_that_save_memory_change_no_result(corpus_dir, plain, word):
    fields, weights, _ = cases.steps(str(corpus_dir), "float64", [word])
    assert largest_distance(weights, plain[1]) < 1e-12
    assert [x["loss"] for x in fields] == pytest.approx([x["loss"] for x in plain[0]], rel=1e-12)


def test_biases_stay_zero_without_balancing(corpus_dir, plain):
    _, weights, _ = cases.steps(str(corpus_dir), "float64", ["model.balance_rate=0"])
    biases = [name for name in weights if name.endswith("router.bias")]
    assert biases and not any(weights[name].any() for name in biases)
    assert all(plain[1][name].any() for name in biases)


def test_table_of_switches_names_existing_settings():
    text = (ROOT / "docs" / "switches.md").read_text()
    keys = re.findall(r"`(data|model|train|eval|checkpoint|sample|run|log)\.(\w+)", text)
    assert len(keys) > 30
    for section, key in keys:
        assert key in SECTION_TYPES[section].model_fields, f"{section}.{key}"


# --- liger ---


def test_liger_without_cuda_falls_back_with_one_line(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    loss, line = machine.choose_loss(True, torch.device("cpu"))
    assert loss is None and "train.liger=true" in line and "built-in loss" in line
    assert machine.choose_loss(False, torch.device("cpu")) == (None, None)


LIGER = """
import torch
from trainer import machine
from model.loss import IGNORE, linear_cross_entropy
loss, line = machine.choose_loss(True, torch.device("cpu"))
assert loss is not None and line is None, line
torch.manual_seed(0)
targets = torch.randint(0, 300, (40,))
targets[::5] = IGNORE
for row_targets in (targets, torch.full_like(targets, IGNORE)):
    results = []
    for function in (loss, linear_cross_entropy):
        torch.manual_seed(1)
        hidden, weight = torch.randn(40, 32, requires_grad=True), torch.randn(300, 32, requires_grad=True)
        value = function(hidden, weight, row_targets)
        results.append((value, *torch.autograd.grad(value * 0.7, (hidden, weight))))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
"""


@pytest.mark.slow
def test_liger_kernels_give_the_same_loss_and_gradients():
    """With Triton's interpreter, which must be selected before triton is imported: hence in a new process."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed (it is for Linux only)")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", LIGER], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]


# --- kaggle ---


def test_a_card_that_is_too_old_for_torch_is_refused():
    built_for = ["sm_75", "sm_80", "sm_86", "sm_90a", "compute_120"]
    devices.check_card("Tesla T4", (7, 5), built_for)
    devices.check_card("one that is newer", (13, 0), built_for)
    devices.check_card("a torch without CUDA", (6, 0), [])
    with pytest.raises(ConfigError, match="P100.*is sm_60, torch .* from sm_75 on"):
        devices.check_card("Tesla P100-PCIE-16GB", (6, 0), built_for)


def test_fp16_is_used_on_the_cards_of_kaggle(monkeypatch):
    """A T4 emulates bf16, although torch reports it as supported."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert machine.choose_dtype("auto", torch.device("cuda", 0), 512) == torch.float16


def test_kaggle_config_is_valid_and_sets_fp16():
    config = read_config(ROOT / "launch" / "kaggle.yaml")
    assert config.train.dtype == "float16" and config.run.name == "kaggle"
