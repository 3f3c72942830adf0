"""Parts: methods of a module that can run compiled, or be recomputed in the backward instead of keeping their results.

A module declares its parts with the decorator `part`. A part is an ordinary method until `parallel/compile.py`
or `parallel/recompute.py` makes the part compiled or recomputed:

    class FeedForward(nn.Module):
        @part(compile=True)
        def activate(self, x: Tensor) -> Tensor: ...

A part must not communicate: recomputation would repeat the message. The arguments of a part that is compiled are
tensors, lists of tensors, or None, and it calls no other part.
"""

from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any, Literal, TypeVar, cast

from torch import nn

Method = TypeVar("Method", bound=Callable[..., Any])
Call = Callable[..., Any]


class Part:
    """A method of a module class, and how it may run.

    Attributes:
        compile: whether train.compile compiles it.
        dynamic: whether it is compiled for any shape, because a shape differs from step to step.
        recompute: the weakest mode of train.recompute that recomputes it: "selective" or "full"; None: none does.
        keep: operators whose results are kept although the part is recomputed.
    """

    def __init__(
        self, method: Call, compile: bool, dynamic: bool, recompute: Literal["selective", "full"] | None, keep: Sequence
    ) -> None:
        self.method, self.name, self.__doc__ = method, method.__name__, method.__doc__
        self.compile, self.dynamic, self.recompute, self.keep = compile, dynamic, recompute, tuple(keep)

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        return self if module is None else MethodType(self.method, module)

    def wrap(self, module: nn.Module, wrapper: Callable[[Call], Call]) -> None:
        """Run wrapper(method) in place of the method, for this one module.

        The wrapped method is stored as functools.cached_property stores its value: `Part` is a non-data descriptor, so
        the instance's `__dict__` entry wins.
        """
        vars(module)[self.name] = wrapper(getattr(module, self.name))


def part(
    *,
    compile: bool = False,
    dynamic: bool = False,
    recompute: Literal["selective", "full"] | None = None,
    keep: Sequence[Any] = (),
) -> Callable[[Method], Method]:
    """Declare a method to be a part of its module, see `Part`."""

    def declare(method: Method) -> Method:
        return cast(Method, Part(method, compile, dynamic, recompute, keep))

    return declare


def parts_of(model: nn.Module) -> Iterator[tuple[nn.Module, Part]]:
    """Each module of a model with each of its parts. A subclass that overrides a method overrides the part."""
    for module in model.modules():
        attributes: dict[str, Any] = {}
        for base in reversed(type(module).__mro__):
            attributes.update(vars(base))
        for attribute in attributes.values():
            if isinstance(attribute, Part):
                yield module, attribute
