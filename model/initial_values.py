"""The values that parameters start with. Each module declares them next to its parameters, as `initial_values`:

    self.weight = nn.Parameter(torch.empty(rows, columns))
    self.initial_values = {"weight": scaled_normal(columns)}

`Transformer.init_weights` draws them from random numbers that are seeded with (seed, name of the
parameter), see `model/random.py`.
"""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Normal:
    """Normal numbers of mean 0."""

    std: float


@dataclass(frozen=True)
class Constant:
    """The same number everywhere."""

    value: float


InitialValues = Normal | Constant
ONES = Constant(1.0)


def scaled_normal(fan_in: int) -> Normal:
    """Scaled by the number of inputs, so that widths from 64 to 5,120 need no other learning rate."""
    return Normal(fan_in**-0.5)


def residual_normal(fan_in: int, n_layers: int) -> Normal:
    """For a matrix whose result is added to the residual stream: smaller by sqrt(2 layers), as in GPT-2."""
    return Normal((2 * n_layers * fan_in) ** -0.5)


def initial_values(model: nn.Module, name: str) -> InitialValues:
    """The values that the module of parameter `name` declares for it. Raises LookupError if it declares none."""
    path, _, parameter = name.rpartition(".")
    owner = model.get_submodule(path)
    declared: dict[str, InitialValues] = getattr(owner, "initial_values", {})
    if parameter not in declared:
        raise LookupError(f"{name}: no initial values; add {parameter!r} to initial_values of {type(owner).__name__}")
    return declared[parameter]
