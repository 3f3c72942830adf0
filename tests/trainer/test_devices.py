"""The choice of the device, the lines that explain it, and the peak speed of cards."""

import subprocess
import sys

import pytest
import torch

from data.settings import ConfigError, UserError
from parallel.mesh import World
from trainer import devices


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_cuda_without_a_device_is_refused():
    expected = "run.device=cuda: 2 processes on this machine, 0 CUDA devices; use run.device=cpu$"
    with pytest.raises(ConfigError, match=expected):
        devices.choose_device("cuda", World(0, 2, 0, 2))
    assert devices.choose_device("auto", World()).type == "cpu"


DRIVER_WARNING = (  # the first line that a torch built for CUDA 13.0 prints with driver 570
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 12080). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)


def test_a_driver_that_is_too_old_is_one_line_with_the_fix(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    line = devices.explain_no_device(DRIVER_WARNING, "2.13.0+cu130", "13.0")
    assert line == (
        "the NVIDIA driver supports CUDA 12.8, and torch 2.13.0+cu130 needs 13.0 or newer; install driver 580 or newer"
        ", or the torch for this driver: pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"
    )
    older = devices.explain_no_device(DRIVER_WARNING.replace("12080", "11040"), "2.13.0+cu126", "12.6")
    assert older.startswith("the NVIDIA driver supports CUDA 11.4, and torch 2.13.0+cu126 needs 12.0 or newer")
    assert older.endswith("install driver 525 or newer")
    other = devices.explain_no_device("CUDA initialization: CUDA unknown error -\nset up", "2.13.0+cu130", "13.0")
    assert other == "torch 2.13.0+cu130: CUDA initialization: CUDA unknown error - set up"
    assert "finds no NVIDIA driver or GPU" in devices.explain_no_device("", "2.13.0+cu130", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the user hides the devices
    assert devices.explain_no_device("", "2.13.0+cu130", "13.0") is None


def test_auto_explains_why_it_does_not_use_gpus():
    assert devices.choose_device_type("auto", 2, 2, None) == ("cuda", None)
    assert devices.choose_device_type("auto", 2, 0, None) == ("cpu", None)  # without GPUs there is nothing to explain
    assert devices.choose_device_type("cpu", 2, 1, None) == ("cpu", None)
    assert devices.choose_device_type("auto", 2, 0, "driver") == ("cpu", "run.device=auto: using the CPU; driver")
    assert devices.choose_device_type("auto", 2, 1, None) == (
        "cpu",
        "run.device=auto: 2 processes on this machine, 1 CUDA device: using the CPU; start 1 process "
        "(--nproc_per_node=1) to use the GPU",
    )
    with pytest.raises(ConfigError, match="^run.device=cuda: 1 process on this machine, 0 CUDA devices; driver"):
        devices.choose_device_type("cuda", 1, 0, "driver")
    with pytest.raises(ConfigError, match="^--device cuda: 8 processes .*, 4 CUDA devices; start at most 4 processes"):
        devices.choose_device_type("cuda", 8, 4, None, "--device ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
@pytest.mark.parametrize("number, error", [("gpu", "on this machine"), ("gpus", "Unsupported nproc_per_node value")])
def test_torchrun_without_a_gpu_or_with_a_typo_is_one_line(number, error):
    command = [sys.executable, "-m", "launch.torchrun", f"--nproc_per_node={number}", "-m", "trainer.main"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and error in result.stderr
    assert result.stderr.startswith(f"torchrun: --nproc_per_node={number}: ") and result.stderr.count("\n") == 1


def test_a_model_too_large_for_the_gpu_uses_the_cpu(monkeypatch, capfd):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(devices, "choose_device", lambda requested, world, option: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(devices, "free_memory", lambda device: 10 << 30)
    assert devices.device_with_room("auto", 4 << 30) == gpu
    assert devices.device_with_room("auto", 5 << 30).type == "cpu"
    assert "--device auto: using the CPU; the model's weights need 10.0 GiB, and 10.0 GiB" in capfd.readouterr().err
    with pytest.raises(UserError, match="^--device cuda: the model's weights need 10.0 GiB.*; use --device cpu$"):
        devices.device_with_room("cuda", 5 << 30)


@pytest.mark.parametrize(
    ("name", "bf16", "fp16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 989.4),
        ("NVIDIA H100 PCIe", 756.5, 756.5),
        ("NVIDIA H100 NVL", 835.5, 835.5),
        ("NVIDIA H200", 989.4, 989.4),
        ("NVIDIA B200", 2250, 2250),
        ("NVIDIA A100-SXM4-40GB", 312, 312),
        ("NVIDIA A100-PCIE-40GB", 312, 312),
        ("NVIDIA A100 80GB PCIe", 312, 312),
        ("NVIDIA A10", 125, 125),
        ("NVIDIA A10G", 70, 70),
        ("NVIDIA L4", 121, 121),
        ("NVIDIA L40S", 362, 362),
        ("Tesla T4", None, 65),
        ("Tesla V100-SXM2-16GB", None, 125),
        ("NVIDIA GeForce RTX 3090", 71, 71),
        ("NVIDIA GeForce RTX 4090", 165.2, 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5, 209.5),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),  # a smaller chip than the desktop card
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),  # a part of a card
        ("AMD Instinct MI300X", None, None),
    ],
)
def test_peak_flops_by_the_name_of_a_card(name, bf16, fp16):
    for dtype, tflops in ((torch.bfloat16, bf16), (torch.float16, fp16), (torch.float32, None)):
        assert devices.peak_flops_of(name, dtype) == (None if tflops is None else pytest.approx(tflops * 1e12))
