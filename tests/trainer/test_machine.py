import os
import subprocess
import sys

import pytest
import torch

from data.settings import ConfigError, UserError
from model import segments
from parallel.mesh import World
from tests.support import run_cases as cases
from trainer import machine


def test_dtype_by_wish_and_by_device():
    cpu = torch.device("cpu")
    assert machine.choose_dtype("float32", cpu, 64) == torch.float32
    assert machine.choose_dtype("bfloat16", cpu, 64) == torch.bfloat16
    assert machine.choose_dtype("auto", cpu, 512) in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("pays", [True, False])
def test_auto_on_a_cpu_is_what_the_trial_says(monkeypatch, pays):
    monkeypatch.setattr(machine, "bf16_pays", lambda dim: pays)
    wanted = torch.bfloat16 if pays else torch.float32
    assert machine.choose_dtype("auto", torch.device("cpu"), 512) == wanted


@pytest.mark.parametrize("has", [True, False])
def test_a_run_that_goes_on_keeps_what_a_trial_found(monkeypatch, has):
    monkeypatch.setattr(machine, "_has_bf16", lambda: has)
    for pays in (True, False):
        monkeypatch.setattr(machine, "bf16_pays", lambda dim, pays=pays: pays)
        assert machine.choose_dtype("auto", torch.device("cpu"), 512, "float32") == torch.float32
        wanted = torch.bfloat16 if has else torch.float32  # with none a step would take 100 times as long
        assert machine.choose_dtype("auto", torch.device("cpu"), 512, "bfloat16") == wanted


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(ConfigError, match="run.device=cuda: 2 processes on this machine, 0 CUDA devices; .*or use"):
        machine.choose_device("cuda", World(0, 2, 0, 2))
    assert machine.choose_device("auto", World()).type == "cpu"


TOO_OLD = (  # of a torch built for CUDA 13.0 with driver 570, its first line
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 12080). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)


def test_a_driver_too_old_for_torch_is_one_line_that_names_the_wheels(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    line = machine.no_device(TOO_OLD, "2.13.0+cu130", "13.0")
    assert line == (
        "the NVIDIA driver supports CUDA 12.8, and torch 2.13.0+cu130 needs 13.0 or newer; install driver 580 or newer"
        ", or the torch for this driver: pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"
    )
    older = machine.no_device(TOO_OLD.replace("12080", "11040"), "2.13.0+cu126", "12.6")
    assert older.startswith("the NVIDIA driver supports CUDA 11.4, and torch 2.13.0+cu126 needs 12.0 or newer")
    assert older.endswith("install driver 525 or newer")
    other = machine.no_device("CUDA initialization: CUDA unknown error -\nset up", "2.13.0+cu130", "13.0")
    assert other == "torch 2.13.0+cu130: CUDA initialization: CUDA unknown error - set up"
    assert "finds no NVIDIA driver or GPU" in machine.no_device("", "2.13.0+cu130", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # not a mistake
    assert machine.no_device("", "2.13.0+cu130", "13.0") is None


def test_auto_says_why_it_leaves_gpus_unused():
    assert machine.device_for("auto", 2, 2, None) == ("cuda", None)
    assert machine.device_for("auto", 2, 0, None) == ("cpu", None)  # a machine without GPUs is none to speak of
    assert machine.device_for("cpu", 2, 1, None) == ("cpu", None)
    assert machine.device_for("auto", 2, 0, "driver") == ("cpu", "run.device=auto: using the CPU; driver")
    assert machine.device_for("auto", 2, 1, None) == (
        "cpu",
        "run.device=auto: 2 processes on this machine, 1 CUDA device: using the CPU; start 1 process "
        "(--nproc_per_node=1) to use the GPU",
    )
    with pytest.raises(ConfigError, match="^run.device=cuda: 1 process on this machine, 0 CUDA devices; driver"):
        machine.device_for("cuda", 1, 0, "driver")
    with pytest.raises(ConfigError, match="^--device cuda: 8 processes .*, 4 CUDA devices; start at most 4 processes"):
        machine.device_for("cuda", 8, 4, None, "--device ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
@pytest.mark.parametrize("number, says", [("gpu", "on this machine"), ("gpus", "Unsupported nproc_per_node value")])
def test_torchrun_without_a_gpu_or_with_a_typing_error_ends_in_one_line(number, says):
    command = [sys.executable, "-m", "launch.torchrun", f"--nproc_per_node={number}", "-m", "trainer.main"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and says in result.stderr
    assert result.stderr.startswith(f"torchrun: --nproc_per_node={number}: ") and result.stderr.count("\n") == 1


def test_inference_is_bf16_only_where_a_gpu_has_it(monkeypatch):
    assert machine.inference_dtype(torch.device("cpu")) == torch.float32
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert machine.inference_dtype(torch.device("cuda", 0)) == dtype


def test_a_model_that_does_not_fit_the_gpu_goes_to_the_cpu_or_is_refused(monkeypatch, capfd):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(machine, "choose_device", lambda requested, world, option: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(machine, "free_memory", lambda device: 10 << 30)
    assert machine.device_with_room("auto", 4 << 30) == gpu
    assert machine.device_with_room("auto", 5 << 30).type == "cpu"
    assert "--device auto: using the CPU; the model's weights take 10.0 GiB, and 10.0 GiB" in capfd.readouterr().err
    with pytest.raises(UserError, match="^--device cuda: the model's weights take 10.0 GiB.*; use --device cpu$"):
        machine.device_with_room("cuda", 5 << 30)


def test_compile_without_a_compiler_is_refused_in_one_line(corpus_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="^train.compile=true: .* needs a C.. compiler, and there is no no-such"):
        cases.run(corpus_dir, tmp_path, "run.name=c", "train.compile=true")


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
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),  # a smaller chip
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),  # a part of one
        ("AMD Instinct MI300X", None, None),
    ],
)
def test_peaks_by_the_name_of_a_card(name, bf16, fp16):
    for dtype, tflops in ((torch.bfloat16, bf16), (torch.float16, fp16), (torch.float32, None)):
        assert machine.peak_of(name, dtype) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_a_cpu_reports_its_peak_of_memory_and_no_peak_of_speed():
    cpu = torch.device("cpu")
    assert machine.peak_flops(cpu, torch.bfloat16) is None
    before = machine.memory_used(cpu)["memory_gib"]
    large = torch.ones(1 << 28)  # 1 GiB, which the process had not before
    assert machine.memory_used(cpu)["memory_gib"] > max(1.0, before) and large.numel()


EVERYTHING = ["data.mask_documents=true", "model.attention_chunk=20", "model.attention_dropout=0.1"]
EVERYTHING += ["model.dropout=0.1", "model.top_k=2", "model.noisy_top_k=true", "model.aux_loss_weight=0.01"]
EVERYTHING += ["train.recompute=full"]


def test_deterministic_has_a_kernel_for_everything(pool, corpus_dir, tmp_path):
    """No operation of a run with all options refuses, and two runs are the same to the last digit."""
    losses = []
    for name in "ab":
        words = [f"run.name={name}", "train.steps=4", *EVERYTHING, "parallel.expert=2"]
        keys = dict(corpus=str(corpus_dir), runs=str(tmp_path), more=words)
        assert pool.run(2, "tests.support.run_cases:deterministic_run", **keys) == [(True, ":4096:8")] * 2
        losses.append(cases.losses(tmp_path / name))
    assert losses[0] == losses[1]


SHOW_THREADS = "from trainer.machine import set_threads; from parallel.mesh import World; "
SHOW_THREADS += "import torch; set_threads('auto', World(0, {n}, 0, {n})); print(torch.get_num_threads())"


def threads(processes, said):
    """Threads of one of several workers below a launcher that sets OMP_NUM_THREADS=1, as torchrun does."""
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    env |= {} if said is None else {"OMP_NUM_THREADS": said}
    worker = [sys.executable, "-c", SHOW_THREADS.format(n=processes)]
    launcher = f"import os, subprocess; os.environ.setdefault('OMP_NUM_THREADS', '1'); subprocess.run({worker!r})"
    command = [sys.executable, "-c", launcher] if processes > 1 else worker
    return int(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="what the user said is read from /proc")
def test_threads_are_the_users_else_all_cores():
    cores = len(os.sched_getaffinity(0))
    assert threads(1, None) == cores
    assert threads(1, "1") == 1
    assert threads(2, None) == max(1, cores // 2)
    assert threads(2, "3") == 3


@pytest.mark.slow
def test_freed_memory_is_kept():
    """Page faults of making and freeing a large tensor again and again."""
    code = (
        "import resource, torch\nfrom trainer.machine import keep_freed_memory\n{}\n"
        "a = torch.ones(8 << 20); del a\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(30): torch.ones(8 << 20)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    faults = [
        int(subprocess.run([sys.executable, "-c", code.format(x)], capture_output=True, text=True, check=True).stdout)
        for x in ("", "keep_freed_memory()")
    ]
    if faults[0] < 1000:
        pytest.skip(f"this allocator keeps its pages anyway ({faults[0]} faults)")
    assert faults[1] < faults[0] / 4


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A PATH with nothing but what a test puts there; CC is not set."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # as if triton were installed

    def install(name):
        (tmp_path / name).touch(0o755)

    return install


def test_the_c_compiler_is_the_one_that_triton_runs(tools, monkeypatch):
    assert machine.c_compiler() is None
    tools("cc")  # which Triton does not look for
    assert machine.c_compiler() is None
    tools("clang")
    assert machine.c_compiler() == "clang"
    tools("gcc")
    assert machine.c_compiler() == "gcc"
    monkeypatch.setenv("CC", "icx")
    assert machine.c_compiler() is None
    tools("icx")
    assert machine.c_compiler() == "icx"


def test_a_gpu_without_a_c_compiler_trains_without_triton_and_says_so(tools, monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert machine.without_flex(gpu) == (
        "data.mask_documents=true: Triton compiles FlexAttention and needs a C compiler (gcc or clang, or CC=); "
        "a slower attention is used"
    )
    loss, line = machine.choose_loss(True, gpu)
    assert loss is None and "train.liger=true: Triton compiles its kernels and needs a C compiler" in line
    with pytest.raises(ConfigError, match="train.compile=true: Triton needs a C compiler.*set train.compile=false"):
        machine.choose_compile(True, gpu)
    assert machine.choose_compile("auto", gpu) == (
        False,
        "train.compile=auto: Triton needs a C compiler (gcc or clang, or CC=); training uncompiled, which is slower",
    )
    assert machine.choose_compile(False, gpu) == machine.choose_compile("auto", torch.device("cpu")) == (False, None)
    tools("gcc")
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": "/no/headers"})
    assert "needs /no/headers/Python.h" in machine.without_flex(gpu)
    monkeypatch.setattr("os.path.exists", lambda path: True)
    assert machine.without_flex(gpu) is None
    tools("g++")
    assert machine.choose_compile("auto", gpu) == (True, None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))  # where there is no FlexAttention
    assert machine.without_flex(gpu) is None
    assert machine.without_flex(torch.device("cpu")) is None


@pytest.mark.parametrize("lacks, kind", [(None, "FlexSegments"), ("a C compiler", "SegmentGroups")])
def test_attention_over_documents_needs_no_triton(monkeypatch, lacks, kind):
    monkeypatch.setattr(segments, "flex_supported", lambda device: True)
    monkeypatch.setattr(segments, "triton_lacks", lambda: lacks)
    monkeypatch.setattr(segments, "FlexSegments", lambda starts: "FlexSegments")
    monkeypatch.setattr(segments, "SegmentGroups", lambda starts, device: "SegmentGroups")
    segments.flex_available.cache_clear()
    try:
        starts = torch.ones(1, 4, dtype=torch.bool)
        assert segments.segment_mask(starts, torch.ones(1, 4, 8), dropout=False) == kind
        assert segments.segment_mask(starts, torch.ones(1, 4, 8), dropout=True) == "SegmentGroups"
    finally:
        segments.flex_available.cache_clear()
