"""train.recompute: parts of the model that keep only their inputs, and are computed again in the backward.

The parts are declared with `@part(recompute=...)` (`model/parts.py`). Each is recomputed alone, so that no message is
sent again, no transfer is left unfinished, and rows are dispatched and combined in the same order as without
recomputation.
- `selective` recomputes the norm and attention, and the routed experts.
- `full` recomputes, in addition, the residual sum after attention with the second norm; the router, except its choice,
  because near ties could be decided differently the second time; and the first half of the shared expert, or a dense
  feed-forward.
With `full` an MoE layer keeps its input, the output of attention, the output of the second norm, the rows that it
received, and the hidden layer of the shared expert.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from model.parts import Part, parts_of

# Which declarations of parts each mode of train.recompute includes.
RECOMPUTED: dict[str, tuple[str, ...]] = {"none": (), "selective": ("selective",), "full": ("selective", "full")}


def recompute_parts(model: nn.Module, mode: str) -> None:
    """Enable recomputation of the parts that `mode` includes: none, selective or full."""
    for module, part in parts_of(model):
        if part.recompute in RECOMPUTED[mode]:
            part.wrap(module, partial(_recomputed, part))


def _recomputed(part: Part, method: Callable[..., Any]) -> Callable[..., Any]:
    if not part.keep:
        return partial(checkpoint, method, use_reentrant=False)
    context_fn = partial(create_selective_checkpoint_contexts, list(part.keep))
    return partial(checkpoint, method, use_reentrant=False, context_fn=context_fn)
