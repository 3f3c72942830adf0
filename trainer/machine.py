"""This computer: device, dtype, threads, and the memory allocator. Everything a run decides by looking at it."""

import ctypes
import functools
import os
import platform
import re
import resource
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from data.settings import ConfigError, UserError
from model.loss import Loss, liger_cross_entropy
from model.segments import c_compiler as c_compiler
from model.segments import flex_supported, triton_lacks
from parallel.mesh import World
from trainer.terminal import log_stderr

# What the data sheets and architecture papers of NVIDIA give for dense products with sums in fp32, without sparsity, in
# TFLOP/s of (bf16, fp16); None where a card has no tensor cores for it. A pattern has to match all that follows the
# maker in torch.cuda.get_device_name(): variants of a card, such as those of laptops, have other peaks.
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
    """`auto` is CUDA where there is a device for each local rank. Raises ConfigError; `option` is what the user set.

    One rank of each machine logs why `auto` does not use the GPUs of that machine.
    """
    count, problem = cuda_devices() if requested != "cpu" else (0, None)
    if count:
        check_card(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.cuda.get_arch_list(), option)
    kind, line = device_for(requested, world.local_size, count, problem, option)
    if line is not None:
        log_stderr(line, by=world.rank - world.local_rank)
    return torch.device("cuda", world.local_rank) if kind == "cuda" else torch.device("cpu")


def device_for(
    requested: str, processes: int, count: int, problem: str | None, option: str = "run.device="
) -> tuple[str, str | None]:
    """`cuda` or `cpu` for the processes of a machine with `count` devices, and a line if `auto` leaves GPUs unused.

    problem: why torch sees no device, from `cuda_devices`. Raises ConfigError where cuda is requested and cannot be.
    """
    if requested == "cpu":
        return "cpu", None
    if count >= processes:
        return "cuda", None
    here = f"{_number(processes, 'process')} on this machine, {_number(count, 'CUDA device')}"
    if requested == "cuda":
        why = f"start at most {_number(count, 'process')} here" if count else problem
        raise ConfigError(f"{option}cuda: {here}; {why + '; ' if why else ''}or use {option}cpu")
    if count:
        fix = f"start {_number(count, 'process')} (--nproc_per_node={count}) to use the GPU{'s' * (count > 1)}"
        return "cpu", f"{option}auto: {here}: using the CPU; {fix}"
    return "cpu", problem and f"{option}auto: using the CPU; {problem}"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun if count == 1 else noun + ('es' if noun.endswith('s') else 's')}"


@functools.cache
def cuda_devices() -> tuple[int, str | None]:
    """The CUDA devices that torch sees, and if a torch built for CUDA sees none, why, and what to do.

    torch says it in a warning of many lines, once a process, which is replaced here.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count or torch.version.cuda is None:
        return count, None
    return 0, no_device(str(caught[0].message) if caught else "", torch.__version__, torch.version.cuda)


def no_device(warning: str, version: str, needs: str) -> str | None:
    """Why a torch of `version`, built for the CUDA version `needs`, sees no device, by the words of its warning.

    CUDA works with newer drivers, and within one major version with older ones: 13.x needs driver 580, 12.x 525
    (https://docs.nvidia.com/deploy/cuda-compatibility). PyTorch has builds for CUDA 12.6 beside those for 13.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):  # the user hides them
        return None
    if not warning:
        return f"torch {version} is built for CUDA {needs} and finds no NVIDIA driver or GPU on this machine"
    found = re.search(r"found version (\d+)", warning)
    if found is None:
        return f"torch {version}: {' '.join(warning.split())}"
    has = f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}"
    line = f"the NVIDIA driver supports CUDA {has}, and torch {version} needs {needs.partition('.')[0]}.0 or newer; "
    line += f"install driver {580 if needs.startswith('13') else 525} or newer"
    if needs.startswith("13") and has.startswith("12"):
        index = "--index-url https://download.pytorch.org/whl/cu126"
        line += f", or the torch for this driver: pip install torch=={version.partition('+')[0]} {index}"
    return line


def check_card(name: str, capability: tuple[int, int], built_for: list[str], option: str = "run.device=") -> None:
    """Raises ConfigError for a card that this torch has no kernels for: an older one than any it was built for.

    built_for is torch.cuda.get_arch_list(): sm_75, sm_90a, compute_120. Otherwise the first kernel would fail.
    """
    numbers = [int(digits) for arch in built_for if (digits := re.sub(r"\D", "", arch))]
    mine = 10 * capability[0] + capability[1]
    if numbers and mine < min(numbers):
        raise ConfigError(
            f"{option[:-1]}: {name} is sm_{mine}, torch {torch.__version__} has kernels from sm_{min(numbers)} on; "
            f"install a torch built for it, choose another card (on Kaggle: GPU T4 x2), or give {option}cpu"
        )


def choose_dtype(requested: str, device: torch.device, dim: int, before: str | None = None) -> torch.dtype:
    """`auto` is bf16 on CUDA from sm80, fp16 below; on a CPU fp32, unless a short trial shows that bf16 is faster for a
    model of width `dim`.

    A trial may end otherwise next time: a run that goes on keeps what it had `before`, unless this CPU has no bf16.
    """
    if requested != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[requested]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if before == "bfloat16":
        return torch.bfloat16 if _has_bf16() else torch.float32
    return torch.bfloat16 if before is None and bf16_pays(dim) else torch.float32


def inference_dtype(device: torch.device) -> torch.dtype:
    """What evaluation and generation of a checkpoint compute in: bf16 on CUDA from sm80, else fp32.

    Not fp16 on older cards: a forward that leaves its range gives a loss of NaN, and here no loss scale reacts to that.
    """
    bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if bf16 else torch.float32


@contextmanager
def attention_of_any_length() -> Iterator[None]:
    """Keeps scaled_dot_product_attention from cuDNN, which makes a plan for each shape that it has not met before.

    torch prefers cuDNN on H100 and newer. Training has one shape; evaluation has many, and generation a new one for
    each token. A plan takes a few tenths of a second, so here the flash and memory-efficient kernels are used.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def device_with_room(requested: str, weights: int) -> torch.device:
    """The device for a model of so many weights, from `--device`; with `auto` the CPU if they do not fit the GPU.

    Raises UserError where `cuda` cannot be.
    """
    device = choose_device(requested, World(), "--device ")
    if device.type == "cpu":
        return device
    need, free = weights * inference_dtype(device).itemsize, free_memory(device)
    if free is None or need < 0.9 * free:
        return device
    here = f"the model's weights take {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of GPU memory are free"
    if requested == "cuda":
        raise UserError(f"--device cuda: {here}; use --device cpu")
    log_stderr(f"--device auto: using the CPU; {here}")
    return torch.device("cpu")


def bf16_pays(dim: int) -> bool:
    """Whether a product of that size is at least 1.3 times faster in bf16: small ones are slower on any CPU."""
    size = min(dim, 512)
    return _has_bf16() and 1.3 * _seconds(torch.bfloat16, size) < _seconds(torch.float32, size)


def _has_bf16() -> bool:
    """Without AVX512-BF16 or AMX a product takes 100 times as long as in fp32."""
    return _seconds(torch.bfloat16, 128) < 4 * _seconds(torch.float32, 128)


def _seconds(dtype: torch.dtype, size: int) -> float:
    """Of a square product, the best of some: others may be busy here."""
    a, times = torch.ones(size, size, dtype=dtype), []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return min(times)


def choose_loss(liger: bool, device: torch.device) -> tuple[Loss | None, str | None]:
    """The loss that train.liger brings, None for the model's own; and a line to say where the request cannot be met."""
    if not liger:
        return None, None
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None, "train.liger=true: its kernels want CUDA; the built-in loss is used"
    if device.type == "cuda" and (lacks := triton_lacks()):
        return None, f"train.liger=true: Triton compiles its kernels and needs {lacks}; the built-in loss is used"
    try:
        return liger_cross_entropy(), None
    except ImportError as error:
        return None, f"train.liger=true: {error}; the built-in loss is used (pip install liger-kernel)"


def without_flex(device: torch.device) -> str | None:
    """The line for a run with data.mask_documents on a GPU that could use FlexAttention and cannot compile it."""
    if not flex_supported(device) or (lacks := triton_lacks()) is None:
        return None
    return f"data.mask_documents=true: Triton compiles FlexAttention and needs {lacks}; a slower attention is used"


def choose_compile(requested: bool | str, device: torch.device) -> tuple[bool, str | None]:
    """Whether parts are compiled, and a line where `auto` would compile them and cannot. Raises ConfigError."""
    if requested != "auto":
        if requested:
            check_compiler(device)
        return bool(requested), None
    if device.type != "cuda":  # at the sizes that a CPU trains, compiled parts are no faster
        return False, None
    if lacks := compiler_lacks(device):
        return False, f"train.compile=auto: {lacks}; training uncompiled, which is slower"
    return True, None


def check_compiler(device: torch.device) -> None:
    """Raises ConfigError where torch.compile would find no compiler."""
    if lacks := compiler_lacks(device):
        raise ConfigError(f"train.compile=true: {lacks}; install it, or set train.compile=false")


def compiler_lacks(device: torch.device) -> str | None:
    """What torch.compile needs and does not find: a C++ compiler on any device, a C compiler for Triton on a GPU."""
    if device.type == "cuda" and (lacks := triton_lacks()):
        return f"Triton needs {lacks}"
    name = os.environ.get("CXX") or ("clang++" if platform.system() == "Darwin" else "g++")
    if shutil.which(name) is None:
        return f"torch.compile needs a C++ compiler, and there is no {name} (CXX= names another)"
    return None


def set_threads(requested: int | str, world: World) -> int:
    """Threads of this rank: the request, else the user's OMP_NUM_THREADS, else cores / local ranks. Returns them.

    torchrun sets OMP_NUM_THREADS=1 for its workers, so what the user said stands in the parent's environment.
    """
    if requested == "auto":
        said = os.environ.get("OMP_NUM_THREADS") if world.size == 1 else _parents_environment().get("OMP_NUM_THREADS")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        requested = int(said) if said and said.isdigit() else max(1, cores // world.local_size)
    torch.set_num_threads(int(requested))
    return int(requested)


def _parents_environment() -> dict[str, str]:
    try:
        raw = Path(f"/proc/{os.getppid()}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(item.partition("=")[::2] for item in raw.split("\0") if "=" in item)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the data sheet of this device promises in `dtype`; None where it is not known, as on a CPU."""
    return peak_of(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


@functools.cache
def peak_of(name: str, dtype: torch.dtype) -> float | None:
    """The same for a name of torch.cuda.get_device_name(). fp32 is not in the table: torch may use TF32 or not."""
    card = re.sub(r"^(NVIDIA|Tesla) ", "", name)
    for pattern, (bf16, fp16) in PEAK_TFLOPS.items():
        if re.fullmatch(pattern, card):
            peak = {torch.bfloat16: bf16, torch.float16: fp16}.get(dtype)
            return None if peak is None else peak * 1e12
    return None


def memory_used(device: torch.device) -> dict[str, float]:
    """Fields of metrics.jsonl, in GiB, without a wait for the device.

    On CUDA the most that torch's allocator handed out, and held of the device, since the last call; on a CPU the most
    that this process ever had in memory.
    """
    if device.type != "cuda":
        return {"memory_gib": peak_resident() / 2**30}
    # one call, as those for a single number collect all of them, too
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    torch.cuda.reset_peak_memory_stats(device)
    peaks = {"memory_gib": "allocated_bytes", "memory_reserved_gib": "reserved_bytes"}
    return {field: stats[name]["all"]["peak"] / 2**30 for field, name in peaks.items()}


def peak_resident() -> int:
    """Bytes, of this process."""
    try:  # where there is a /proc: getrusage also counts what the parent had when it started this process
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def be_deterministic() -> None:
    """Only kernels whose results do not depend on chance, an error where there is none. Call it before CUDA is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS may add in another order each time
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it is never read
    torch.backends.cudnn.benchmark = False


def keep_freed_memory() -> None:
    """Tell glibc to keep the pages of freed tensors: it would hand out fresh ones each step, at 1/3 of the time."""
    if platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_MAX_" not in os.environ:
        trim_threshold, mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def describe(device: torch.device) -> str:
    """The machine in a few words, for logs and tables."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def free_memory(device: torch.device) -> int | None:
    """Bytes available, None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")
