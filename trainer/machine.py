"""What a run decides by looking at this machine: dtype, kernels, compilers, threads, and the memory allocator.

`devices.py` chooses the device.
"""

import ctypes
import os
import platform
import resource
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from data.settings import ConfigError
from model.loss import Loss, liger_cross_entropy
from model.segments import c_compiler as c_compiler
from model.segments import flex_supported, triton_lacks
from parallel.mesh import World

BF16_MIN_SPEEDUP = 1.3  # over fp32 on a CPU, below which `auto` stays with fp32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(requested: str, device: torch.device, dim: int, previous: str | None = None) -> torch.dtype:
    """The dtype of matrix multiplications. `auto` is bf16 on CUDA from sm80 on, and fp16 below; on a CPU it is fp32,
    unless a short trial shows that bf16 is faster for a model of width `dim`.

    A repeated trial may have another result. So a resumed run keeps its `previous` dtype, unless this CPU has no bf16.
    """
    if requested != "auto":
        return DTYPES[requested]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if previous is None:
        return torch.bfloat16 if bf16_pays(dim) else torch.float32
    return torch.bfloat16 if previous == "bfloat16" and _has_bf16() else torch.float32


def inference_dtype(device: torch.device) -> torch.dtype:
    """The dtype of evaluation and generation from a checkpoint: bf16 on CUDA from sm80 on, else fp32.

    It is not fp16 on older cards: there is no loss scale here, and a forward that leaves the range of fp16 gives NaN.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if has_bf16 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def bf16_pays(dim: int) -> bool:
    """Whether this CPU multiplies matrices of width `dim` faster in bf16. Small matrices are slower on any CPU."""
    size = min(dim, 512)
    if not _has_bf16():
        return False
    return BF16_MIN_SPEEDUP * _matmul_seconds(torch.bfloat16, size) < _matmul_seconds(torch.float32, size)


def _has_bf16() -> bool:
    """Whether the CPU has AVX512-BF16 or AMX; without them a multiplication takes 100 times as long as in fp32."""
    return _matmul_seconds(torch.bfloat16, 128) < 4 * _matmul_seconds(torch.float32, 128)


def _matmul_seconds(dtype: torch.dtype, size: int) -> float:
    """Seconds of a multiplication of square matrices: the best of four, because other processes may be busy."""
    a = torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@contextmanager
def attention_of_any_length() -> Iterator[None]:
    """Keep scaled_dot_product_attention from cuDNN, which makes a plan for each new shape, a few tenths of a second.

    torch prefers cuDNN on H100 and newer. Training has one shape; evaluation has many, and generation a new one for
    each token. The flash and memory-efficient kernels are used instead.
    """
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def choose_loss(liger: bool, device: torch.device) -> tuple[Loss | None, str | None]:
    """The loss function of `train.liger`, None for the built-in one; and a line to log if Liger's cannot be used."""
    if not liger:
        return None, None
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None, "train.liger=true: Liger's kernels need CUDA; the built-in loss is used"
    if device.type == "cuda" and (lacks := triton_lacks()):
        return None, f"train.liger=true: Triton compiles its kernels and needs {lacks}; the built-in loss is used"
    try:
        return liger_cross_entropy(), None
    except ImportError as error:
        return None, f"train.liger=true: {error}; the built-in loss is used (pip install liger-kernel)"


def without_flex(device: torch.device) -> str | None:
    """A line to log if data.mask_documents would use FlexAttention on this GPU, but cannot compile it."""
    if not flex_supported(device):
        return None
    lacks = triton_lacks()
    if lacks is None:
        return None
    return f"data.mask_documents=true: Triton compiles FlexAttention and needs {lacks}; a slower attention is used"


def choose_compile(requested: bool | str, device: torch.device) -> tuple[bool, str | None]:
    """Whether parts of the model are compiled, and a line to log if `auto` would compile them but cannot.

    Raises ConfigError if they are to be compiled but cannot.
    """
    if requested is False:
        return False, None
    if requested == "auto" and device.type != "cuda":  # at the sizes that a CPU trains, compiled parts are no faster
        return False, None
    lacks = compiler_lacks(device)
    if lacks is None:
        return True, None
    if requested == "auto":
        return False, f"train.compile=auto: {lacks}; training without compilation, which is slower"
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
    """Set and return the CPU threads of this rank; `auto`: the user's OMP_NUM_THREADS, else cores / local ranks.

    torchrun sets OMP_NUM_THREADS=1 for its workers, so the user's value is read from the environment of the parent.
    """
    if requested == "auto":
        environment = os.environ if world.size == 1 else _environment_of_parent()
        user_threads = environment.get("OMP_NUM_THREADS", "")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        requested = int(user_threads) if user_threads.isdigit() else max(1, cores // world.local_size)
    torch.set_num_threads(int(requested))
    return int(requested)


def _environment_of_parent() -> Mapping[str, str]:
    try:
        content = Path(f"/proc/{os.getppid()}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    variables = {}
    for item in content.split("\0"):
        name, equals, value = item.partition("=")
        if equals:
            variables[name] = value
    return variables


def be_deterministic() -> None:
    """Use only kernels whose results are the same each time; torch raises an error if there is none for an operation.

    Call it before CUDA is used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS may add in another order each time
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it is never read
    torch.backends.cudnn.benchmark = False


def keep_freed_memory() -> None:
    """Make glibc keep the pages of freed tensors. It would request new ones in each step, for a third of its time."""
    if platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_MAX_" not in os.environ:
        trim_threshold, mmap_max = -1, -4  # parameters of mallopt, from malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def memory_used(device: torch.device) -> dict[str, float]:
    """Fields of metrics.jsonl, in GiB; the host does not wait for the device.

    On CUDA: the peak of what torch's allocator handed out, and of what it reserved on the device, since the last call.
    On a CPU: the peak resident memory of this process since its start.
    """
    if device.type != "cuda":
        return {"memory_gib": peak_resident_bytes() / 2**30}
    # a single call, because the functions for single numbers collect all statistics each time
    statistics = torch.cuda.memory_stats_as_nested_dict(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {
        "memory_gib": statistics["allocated_bytes"]["all"]["peak"] / 2**30,
        "memory_reserved_gib": statistics["reserved_bytes"]["all"]["peak"] / 2**30,
    }


def peak_resident_bytes() -> int:
    """The peak resident memory of this process."""
    try:  # preferred, because getrusage also counts the memory of the parent at the time of the fork
        return 1024 * _read_proc_number("/proc/self/status", "VmHWM")
    except (OSError, StopIteration):
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: torch.device) -> int | None:
    """Free bytes of the device's memory, or on a CPU of the machine's; None if they cannot be read."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * _read_proc_number("/proc/meminfo", "MemAvailable")
    except (OSError, StopIteration):
        return None


def _read_proc_number(path: str, key: str) -> int:
    """The number after `key` in a file of /proc. Raises OSError or StopIteration if there is none."""
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def describe_device(device: torch.device) -> str:
    """The model of the GPU, or of the CPU and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
