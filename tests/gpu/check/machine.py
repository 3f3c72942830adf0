"""Describes this machine: a report of a fault starts with these lines."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tests.gpu.check.runner import Check


def run(check: Check) -> None:
    figures: dict[str, object] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "compiler": _compiler(),
        "triton": _version("triton"),
        "liger": _version("liger-kernel"),
    }
    if check.on_gpu:
        figures |= _gpu(check.device)
    check.report.measure(str(figures.get("device", "CPU")), **figures)


def _gpu(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "device": properties.name,
        "devices": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver_version() or "unknown",
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "cudnn": torch.backends.cudnn.version(),
        "free_gib": free / 2**30,
        "memory_gib": total / 2**30,
    }


def why_no_cuda() -> str | None:
    """Why torch sees no CUDA device, in one line; None if it sees one. It initializes CUDA: do not fork afterwards."""
    if torch.version.cuda is None:
        fix = "install a CUDA build, or set PYTHON to a Python that has one"
        return f"torch {torch.__version__} was built without CUDA; {fix}"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides all devices; unset it"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        driver = driver_version()
        has = f"the driver is {driver}" if driver else "no NVIDIA driver was found"
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no device; {has}: {first}"
    return None


def driver_version() -> str | None:
    """The version of the NVIDIA driver; None if there is no driver."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    try:
        words = Path("/proc/driver/nvidia/version").read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), None)


def _compiler() -> str:
    """A text on the C and C++ compilers and Python's header: Triton and torch.compile need them to build launchers."""
    c = shutil.which(os.environ.get("CC", "")) or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    cxx = shutil.which(os.environ.get("CXX", "g++"))
    header = (Path(sysconfig.get_path("include")) / "Python.h").exists()
    return f"{c or 'no C compiler'}, {cxx or 'no C++ compiler'}, Python.h {'found' if header else 'missing'}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":  # cli.py runs this in another process, so that it does not initialize CUDA itself
    why = why_no_cuda()
    print(why or "")
    sys.exit(2 if why else 0)
