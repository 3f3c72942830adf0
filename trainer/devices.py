"""The device of a process: which one a run or a command computes on, why not another, and its peak speed."""

import functools
import os
import re
import warnings

import torch

from data.settings import ConfigError, UserError
from parallel.mesh import World
from trainer.machine import free_memory, inference_dtype
from trainer.terminal import log_stderr, plural

# Peak TFLOP/s of (bf16, fp16) by NVIDIA's data sheets and architecture papers: dense matrix multiplications, sums in
# fp32, without sparsity; None if a card has no tensor cores for the dtype. A pattern has to match the whole name of a
# card after the maker, as torch.cuda.get_device_name() has it: variants, such as those of laptops, have other peaks.
PEAK_TFLOPS: dict[str, tuple[float | None, float | None]] = {
    r"GB200": (2500, 2500),
    r"B200": (2250, 2250),
    r"(H100|H800) \d+GB HBM3|H800|H200|GH200 \d+GB": (989.4, 989.4),
    r"(H100|H200) NVL": (835.5, 835.5),
    r"(H100|H800) PCIe": (756.5, 756.5),
    r"H20": (148, 148),
    r"(A100|A800)-(SXM4|PCIE)-\d+GB|(A100|A800) 80GB PCIe": (312, 312),
    r"A30": (165, 165),
    r"A40": (149.7, 149.7),
    r"A10": (125, 125),
    r"A10G": (70, 70),
    r"L40S": (362, 362),
    r"L40": (181, 181),
    r"L4": (121, 121),
    r"T4": (None, 65),
    r"V100-SXM2-\d+GB": (None, 125),
    r"V100-PCIE-\d+GB": (None, 112),
    r"GeForce RTX 5090": (209.5, 209.5),
    r"GeForce RTX 4090": (165.2, 165.2),
    r"GeForce RTX 3090 Ti": (80, 80),
    r"GeForce RTX 3090": (71, 71),
    r"RTX 6000 Ada Generation": (364.2, 364.2),
    r"RTX A6000": (154.8, 154.8),
}


def choose_device(requested: str, world: World, option: str = "run.device=") -> torch.device:
    """The device of this process; `auto` is CUDA if there is a CUDA device for each process of this machine.

    requested: `auto`, `cpu` or `cuda`, as the user set it by `option`. If `auto` does not use the GPUs of a machine,
    one of its ranks logs why. Raises ConfigError if the requested device cannot be used.
    """
    count, problem = (0, None) if requested == "cpu" else cuda_devices()
    if count:
        check_card(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.cuda.get_arch_list(), option)
    kind, line = choose_device_type(requested, world.local_size, count, problem, option)
    if line is not None:
        log_stderr(line, by=world.rank - world.local_rank)
    return torch.device("cuda", world.local_rank) if kind == "cuda" else torch.device("cpu")


def choose_device_type(
    requested: str, processes: int, count: int, problem: str | None, option: str = "run.device="
) -> tuple[str, str | None]:
    """`cuda` or `cpu` for `processes` on a machine with `count` CUDA devices, and a line if `auto` leaves GPUs unused.

    problem: why torch finds no device, from `cuda_devices`. Raises ConfigError if cuda is requested and cannot be used.
    """
    if requested == "cpu":
        return "cpu", None
    if count >= processes:
        return "cuda", None
    found = f"{plural(processes, 'process')} on this machine, {plural(count, 'CUDA device')}"
    if requested == "cuda":
        if count:
            problem = f"start at most {plural(count, 'process')} here"
        fix = f"use {option}cpu" if problem is None else f"{problem}; or use {option}cpu"
        raise ConfigError(f"{option}cuda: {found}; {fix}")
    if count:
        gpus = "the GPU" if count == 1 else "the GPUs"
        fix = f"start {plural(count, 'process')} (--nproc_per_node={count}) to use {gpus}"
        return "cpu", f"{option}auto: {found}: using the CPU; {fix}"
    return "cpu", None if problem is None else f"{option}auto: using the CPU; {problem}"


def device_with_room(requested: str, weights: int) -> torch.device:
    """The device for a model of `weights` weights, as `--device` requests it.

    `auto` is the CPU if the model does not fit the free memory of the GPU. Raises UserError if `cuda` cannot be used.
    """
    device = choose_device(requested, World(), "--device ")
    if device.type == "cpu":
        return device
    needed_bytes = weights * inference_dtype(device).itemsize
    free_bytes = free_memory(device)
    if free_bytes is None or needed_bytes < 0.9 * free_bytes:
        return device
    problem = (
        f"the model's weights need {needed_bytes / 2**30:.1f} GiB, and "
        f"{free_bytes / 2**30:.1f} GiB of GPU memory are free"
    )
    if requested == "cuda":
        raise UserError(f"--device cuda: {problem}; use --device cpu")
    log_stderr(f"--device auto: using the CPU; {problem}")
    return torch.device("cpu")


@functools.cache
def cuda_devices() -> tuple[int, str | None]:
    """The number of CUDA devices that torch finds; and if a torch built for CUDA finds none, why, and what to do.

    torch prints the reason once per process as a warning of many lines, which this line replaces.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count or torch.version.cuda is None:
        return count, None
    return 0, explain_no_device(str(caught[0].message) if caught else "", torch.__version__, torch.version.cuda)


def explain_no_device(warning: str, version: str, cuda_version: str) -> str | None:
    """Why a torch of `version`, built for `cuda_version`, finds no device, by the text of its warning.

    None if the user hides the devices. CUDA works with newer drivers, and within one major version with older ones:
    13.x needs driver 580, 12.x needs driver 525 (https://docs.nvidia.com/deploy/cuda-compatibility). PyTorch has builds
    for CUDA 12.6 besides those for 13.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    if not warning:
        return f"torch {version} is built for CUDA {cuda_version} and finds no NVIDIA driver or GPU on this machine"
    found = re.search(r"found version (\d+)", warning)
    if found is None:
        return f"torch {version}: {' '.join(warning.split())}"
    supported = f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}"
    needed = f"{cuda_version.partition('.')[0]}.0"
    driver = 580 if cuda_version.startswith("13") else 525
    line = (
        f"the NVIDIA driver supports CUDA {supported}, and torch {version} needs {needed} or newer; "
        f"install driver {driver} or newer"
    )
    if cuda_version.startswith("13") and supported.startswith("12"):
        index = "--index-url https://download.pytorch.org/whl/cu126"
        line += f", or the torch for this driver: pip install torch=={version.partition('+')[0]} {index}"
    return line


def check_card(name: str, capability: tuple[int, int], built_for: list[str], option: str = "run.device=") -> None:
    """Raises ConfigError for a card that is older than any this torch has kernels for: its first kernel would fail.

    built_for is torch.cuda.get_arch_list(), such as [sm_75, sm_90a, compute_120].
    """
    numbers = [int(digits) for arch in built_for if (digits := re.sub(r"\D", "", arch))]
    mine = 10 * capability[0] + capability[1]
    if numbers and mine < min(numbers):
        raise ConfigError(
            f"{option[:-1]}: {name} is sm_{mine}, torch {torch.__version__} has kernels from sm_{min(numbers)} on; "
            f"install a torch built for it, choose another card (on Kaggle: GPU T4 x2), or use {option}cpu"
        )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of this device in `dtype` by its data sheet; None if it is not known, as for a CPU."""
    return peak_flops_of(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


@functools.cache
def peak_flops_of(name: str, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of a card by its torch.cuda.get_device_name(). None in fp32, for which torch may use TF32 or not."""
    card = re.sub(r"^(NVIDIA|Tesla) ", "", name)
    for pattern, (bf16, fp16) in PEAK_TFLOPS.items():
        if re.fullmatch(pattern, card):
            peak = {torch.bfloat16: bf16, torch.float16: fp16}.get(dtype)
            return None if peak is None else peak * 1e12
    return None
