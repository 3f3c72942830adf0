"""The environment variables that the commands set for torch and NCCL."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.environment import compile_processes, supports_expandable_segments

ROOT = Path(__file__).parents[2]
NAMES = ["NCCL_LAUNCH_ORDER_IMPLICIT", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_CPP_LOG_LEVEL"]
SHOW = """
import os, sys
from {module} import main
from trainer.cli import guarded
assert "torch" not in sys.modules  # it would have read the variables already
guarded(lambda: print([os.environ.get(name) for name in {names}]))
import torch
torch.ones(2).sum()
"""


def environment_of(module, **user):
    env = {key: value for key, value in os.environ.items() if key not in NAMES} | user
    code = SHOW.format(module=module, names=NAMES)
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stderr  # torch prints no warning about them, on a CPU either
    return eval(done.stdout)


@pytest.mark.parametrize("module", ["trainer.main", "trainer.evaluate", "trainer.generate"])
def test_commands_set_the_variables_before_torch_is_imported(module):
    assert environment_of(module) == ["1", "expandable_segments:True", None, "ERROR"]


def test_variables_that_the_user_has_set_are_not_changed():
    user = {"NCCL_LAUNCH_ORDER_IMPLICIT": "0", "TORCH_CPP_LOG_LEVEL": "INFO"}
    user["PYTORCH_CUDA_ALLOC_CONF"] = "max_split_size_mb:64"
    assert environment_of("trainer.main", **user) == ["0", None, "max_split_size_mb:64", "INFO"]


@pytest.mark.parametrize("cores, ranks, processes", [(2, "1", 2), (2, "4", 1), (4, "2", 2), (224, "8", 8), (1, "x", 1)])
def test_ranks_share_the_cores_for_compilation(monkeypatch, cores, ranks, processes):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert compile_processes(cores) == processes


def test_expandable_segments_are_not_used_on_wsl():
    assert not supports_expandable_segments("5.15.153.1-microsoft-standard-WSL2")
    assert supports_expandable_segments("6.8.0-45-generic")
