"""The parts, in the order in which they run: what tells most in the least time comes first."""

from tests.gpu.check import grouped, machine, parity
from tests.gpu.check.runner import Part

PARTS = {
    part.name: part
    for part in (
        Part("machine", machine.run, "what this machine is", 10),
        Part("grouped", grouped.run, "the experts' grouped product against fp64", 20),
        Part("parity", parity.run, "the model against the CPU: loss, gradients, routes", 90),
    )
}
