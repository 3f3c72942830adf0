"""Builds the stand-in libraries from runtime/ for the torch of this Python: python -m tests.gpu.sim.build FOLDER

Each library has the name and every symbol of the real one (libnvidia-ml: the symbols that torch uses). A function that
runtime/ does not define is generated: it returns 0, and its calls are counted. The headers are part of the packages of
torch's CUDA build.
"""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

RUNTIME = Path(__file__).parent / "runtime"
DRIVER = "libcuda.so.1"
SOURCES = {
    "libcudart.so.13": "cudart",
    "libcublasLt.so.13": "cublaslt",
    "libcublas.so.13": "cublas",
    "libnccl.so.2": "nccl",
    DRIVER: "driver",
    "libnvidia-ml.so.1": "nvml",
}
PRELOADED = tuple(SOURCES)
PRODUCT = re.compile(r"gemm|gemv|ltmatmul$|trsm|axpy|scal|dot", re.IGNORECASE)  # functions that launch a kernel


def build(folder: Path) -> None:
    """Build the libraries in `folder`, unless all of them exist and are newer than their sources."""
    sources = [Path(__file__), *RUNTIME.rglob("*.*")]
    newest = max(source.stat().st_mtime for source in sources)
    if all((folder / name).exists() and (folder / name).stat().st_mtime > newest for name in PRELOADED):
        return
    folder.mkdir(parents=True, exist_ok=True)
    packages = nvidia_packages()
    for name in PRELOADED:
        real = next(packages.glob(f"*/lib/{name}"), None)
        symbols: dict[str, str] = {}
        if name == DRIVER:
            symbols = driver_symbols(packages)
        elif real is not None:
            symbols = exported(real)
        build_one(folder, name, symbols, [RUNTIME / "headers", *packages.glob("*/include")])


def nvidia_packages() -> Path:
    """The folder nvidia/ of the installed packages."""
    spec = importlib.util.find_spec("nvidia")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{sys.executable} has no CUDA build of torch, because the package nvidia/ is missing")
    return Path(next(iter(spec.submodule_search_locations)))


def build_one(folder: Path, name: str, symbols: dict[str, str], includes: Iterable[Path]) -> None:
    """Build the library `name` with `symbols`: their names, and the version of each ("" for none)."""
    source = SOURCES[name]
    object_file = folder / f"{source}.o"
    generated_source = folder / f"{source}_generated.c"
    script = folder / f"{source}.map"
    flags = ["-std=c++17", "-O1", "-fPIC", "-w", *(f"-I{path}" for path in includes)]
    run(["g++", *flags, "-c", RUNTIME / f"{source}.cpp", "-o", object_file])
    defined = set(exported(object_file, ()))
    generated_source.write_text(generated(sorted(symbols.keys() - defined)))
    command = ["g++", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", folder / name]
    command += [object_file, "-x", "c", generated_source, "-x", "none"]
    versions = sorted(set(symbols.values()) - {""})
    if versions:
        script.write_text(f"{versions[0]} {{ global: *; }};\n")
        command.append(f"-Wl,--version-script={script}")
    if name != PRELOADED[0]:
        command.append(folder / PRELOADED[0])
    run(command)


def generated(names: Iterable[str]) -> str:
    """C code of functions that only count their calls."""
    lines = ["void sim_count(const char*, long, long);"]
    for name in names:
        kind = "kernel" if name.startswith("cublas") and PRODUCT.search(name) else "call"
        lines.append(f'long {name}(void) {{ sim_count("{kind} {name}", 1, 0); return 0; }}')
    return "\n".join(lines) + "\n"


def exported(library: Path, flags: Iterable[str] = ("-D",)) -> dict[str, str]:
    """The functions that a library or object file defines, with their versions."""
    text = subprocess.run(["nm", *flags, "--defined-only", library], capture_output=True, text=True, check=True).stdout
    found = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[1] in "TtWi":
            name, _, version = words[2].partition("@")
            if re.fullmatch(r"[A-Za-z_]\w*", name) and name not in ("_init", "_fini"):
                found[name] = version.lstrip("@")
    return found


def driver_symbols(packages: Path) -> dict[str, str]:
    """The functions of libcuda, from its header: no package contains the library itself."""
    text = next(packages.glob("*/include/cuda.h")).read_text()
    names = set(re.findall(r"CUDAAPI\s+(cu[A-Z]\w+)\s*\(", text))
    names.update(re.findall(r"#define\s+cu\w+\s+(?:__CUDA_API_PTDS|__CUDA_API_PTSZ)?\(?(cu\w+_v\d)\)?", text))
    return dict.fromkeys(names, "")


def run(command: list[object]) -> None:
    try:
        subprocess.run([str(word) for word in command], check=True)
    except FileNotFoundError:
        sys.exit(f"{command[0]} was not found, but is needed to build the simulated GPU's libraries; apt install g++")
    except subprocess.CalledProcessError as error:
        sys.exit(f"could not build the simulated GPU's libraries: {command[0]} ended with exit code {error.returncode}")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
