"""The parts, in the order in which they run: what tells most in the least time comes first."""

from tests.gpu.check import (
    attention_plans,
    grouped,
    losses,
    machine,
    memory,
    nccl,
    parity,
    random_numbers,
    ranks,
    runs,
    speed,
)
from tests.gpu.check.runner import Part

PARTS = {
    part.name: part
    for part in (
        Part("machine", machine.run, "what this machine is", 10),
        Part("grouped", grouped.run, "the experts' grouped product against fp64", 20),
        Part("parity", parity.run, "the model against the CPU: loss, gradients, routes", 70),
        Part("random", random_numbers.run, "dropout masks and router noise equal those of the CPU", 10),
        Part("nccl", nccl.run, "FSDP2, the exchange and recomputation on NCCL with one rank", 30),
        Part("losses", losses.run, "the built-in loss and Liger's against fp64", 20),
        Part("runs", runs.run, "train, resume, evaluate, generate, and the same twice", 120),
        Part("speed", speed.run, "launch/scout.yaml in variants: time, MFU, memory", 110, on_cpu=False),
        Part("attention_plans", attention_plans.run, "what cuDNN's attention costs a new shape", 25, on_cpu=False),
        Part("memory", memory.run, "the peak of a run against --dry-run", 40, on_cpu=False),
        Part("kernels", speed.run_kernels, "the same by kernel: busy time, and tables in files", 50, on_cpu=False),
        Part("ranks", ranks.run, "launch/scout.yaml on several GPUs, by degrees of expert parallelism", 180),
    )
}
