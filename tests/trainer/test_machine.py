"""Choices that depend on the machine: dtype, compiler, kernels, threads; and the memory of the process."""

import os
import subprocess
import sys

import pytest
import torch

from data.settings import ConfigError
from model import segments
from tests.support import run_cases as cases
from tests.support.configs import ALL_OPTIONS
from trainer import devices, machine


def test_dtype_by_request_and_by_device():
    cpu = torch.device("cpu")
    assert machine.choose_dtype("float32", cpu, 64) == torch.float32
    assert machine.choose_dtype("bfloat16", cpu, 64) == torch.bfloat16
    assert machine.choose_dtype("auto", cpu, 512) in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("pays", [True, False])
def test_auto_dtype_on_a_cpu_follows_the_trial(monkeypatch, pays):
    monkeypatch.setattr(machine, "bf16_pays", lambda dim: pays)
    expected = torch.bfloat16 if pays else torch.float32
    assert machine.choose_dtype("auto", torch.device("cpu"), 512) == expected


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_resumed_run_keeps_the_dtype_of_its_first_trial(monkeypatch, has_bf16):
    monkeypatch.setattr(machine, "_has_bf16", lambda: has_bf16)
    for pays in (True, False):
        monkeypatch.setattr(machine, "bf16_pays", lambda dim, pays=pays: pays)
        assert machine.choose_dtype("auto", torch.device("cpu"), 512, "float32") == torch.float32
        expected = torch.bfloat16 if has_bf16 else torch.float32  # without it a step would be 100 times slower
        assert machine.choose_dtype("auto", torch.device("cpu"), 512, "bfloat16") == expected


def test_inference_is_in_bf16_only_if_the_gpu_has_it(monkeypatch):
    assert machine.inference_dtype(torch.device("cpu")) == torch.float32
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert machine.inference_dtype(torch.device("cuda", 0)) == dtype


def test_compile_without_a_compiler_is_refused_in_one_line(corpus_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="^train.compile=true: .* needs a C.. compiler, and there is no no-such"):
        cases.run(corpus_dir, tmp_path, "run.name=c", "train.compile=true")


def test_a_cpu_has_a_peak_of_memory_and_no_peak_flops():
    cpu = torch.device("cpu")
    assert devices.peak_flops(cpu, torch.bfloat16) is None
    before = machine.memory_used(cpu)["memory_gib"]
    large = torch.ones(1 << 28)  # 1 GiB, more than the process had before
    assert machine.memory_used(cpu)["memory_gib"] > max(1.0, before) and large.numel()


def test_deterministic_works_with_all_options(pool, corpus_dir, tmp_path):
    """Every operation of a run with all options has a deterministic kernel, and two runs have bitwise equal losses."""
    losses = []
    for name in "ab":
        words = [f"run.name={name}", "train.steps=4", *ALL_OPTIONS, "parallel.expert=2"]
        keys = dict(corpus=str(corpus_dir), runs=str(tmp_path), more=words)
        assert pool.run(2, "tests.support.run_cases:deterministic_run", **keys) == [(True, ":4096:8")] * 2
        losses.append(cases.losses(tmp_path / name))
    assert losses[0] == losses[1]


SHOW_THREADS = "from trainer.machine import set_threads; from parallel.mesh import World; "
SHOW_THREADS += "import torch; set_threads('auto', World(0, {n}, 0, {n})); print(torch.get_num_threads())"


def threads(processes, user_threads):
    """Threads of one of several workers, whose launcher sets OMP_NUM_THREADS=1, as torchrun does."""
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    if user_threads is not None:
        env["OMP_NUM_THREADS"] = user_threads
    worker = [sys.executable, "-c", SHOW_THREADS.format(n=processes)]
    launcher = f"import os, subprocess; os.environ.setdefault('OMP_NUM_THREADS', '1'); subprocess.run({worker!r})"
    command = [sys.executable, "-c", launcher] if processes > 1 else worker
    return int(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="the user's value is read from /proc")
def test_threads_are_the_users_or_all_cores():
    cores = len(os.sched_getaffinity(0))
    assert threads(1, None) == cores
    assert threads(1, "1") == 1
    assert threads(2, None) == max(1, cores // 2)
    assert threads(2, "3") == 3


@pytest.mark.slow
def test_allocator_keeps_freed_memory():
    """Counts the page faults of allocating and freeing a large tensor repeatedly."""
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
    """Installs programs for a test: PATH has no others, and CC is not set."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # as if triton were installed

    def install(name):
        (tmp_path / name).touch(0o755)

    return install


def test_the_c_compiler_is_the_one_that_triton_runs(tools, monkeypatch):
    assert machine.c_compiler() is None
    tools("cc")  # Triton does not search for it
    assert machine.c_compiler() is None
    tools("clang")
    assert machine.c_compiler() == "clang"
    tools("gcc")
    assert machine.c_compiler() == "gcc"
    monkeypatch.setenv("CC", "icx")
    assert machine.c_compiler() is None
    tools("icx")
    assert machine.c_compiler() == "icx"


def test_a_gpu_without_a_c_compiler_trains_without_triton(tools, monkeypatch):
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
    compiles, line = machine.choose_compile("auto", gpu)
    assert not compiles and line == (
        "train.compile=auto: Triton needs a C compiler (gcc or clang, or CC=); training without compilation, which is "
        "slower"
    )
    assert machine.choose_compile(False, gpu) == machine.choose_compile("auto", torch.device("cpu")) == (False, None)
    tools("gcc")
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": "/no/headers"})
    assert "needs /no/headers/Python.h" in machine.without_flex(gpu)
    monkeypatch.setattr("os.path.exists", lambda path: True)
    assert machine.without_flex(gpu) is None
    tools("g++")
    assert machine.choose_compile("auto", gpu) == (True, None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))  # too old for FlexAttention
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
