"""The parts of the check in the order in which they run: those that find most faults in the least time are first."""

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
        Part("machine", machine.run, "a description of this machine", 10),
        Part("grouped", grouped.run, "the experts' grouped product, compared with fp64", 20),
        Part("parity", parity.run, "the model, compared with the CPU: loss, gradients, routing", 70),
        Part("random", random_numbers.run, "dropout masks and router noise equal those of the CPU", 10),
        Part("nccl", nccl.run, "FSDP2, the exchange and recomputation on NCCL with one rank", 30),
        Part("losses", losses.run, "the built-in loss and Liger's, compared with fp64", 20),
        Part("runs", runs.run, "train, resume, evaluate, generate, and two equal runs", 120),
        Part("speed", speed.run, "variants of launch/scout.yaml: time, MFU, memory", 110, on_cpu=False),
        Part("attention_plans", attention_plans.run, "the cost of cuDNN's attention for a new shape", 25, on_cpu=False),
        Part("memory", memory.run, "the peak of a run, compared with --dry-run", 40, on_cpu=False),
        Part("kernels", speed.run_kernels, "the same variants by kernel: busy time, tables in files", 50, on_cpu=False),
        Part("ranks", ranks.run, "launch/scout.yaml on several GPUs, for degrees of expert parallelism", 180),
    )
}
