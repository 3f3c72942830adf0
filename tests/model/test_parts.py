"""Parts: which methods of the model declare that they can be compiled or recomputed, and how they are switched on."""

import torch
from torch import nn

from model.config import ModelConfig
from model.parts import part, parts_of
from model.transformer import Transformer

COMPILED = {
    "Transformer.drop_embedding",
    "Transformer.router_statistics",
    "Block.add_attention",
    "Block.add_feed_forward",
    "Attention.position",
    "FeedForward.activate",
    "SharedExpert.activate",
    "MoE.permute",
    "MoE.unpermute",
    "Experts.activate",
    "Head.chunk_gradient",
}
SELECTIVE = {"Block.attend", "Experts.process"}
FULL = {"Block.add_attention", "FeedForward.forward", "Router.forward", "SharedExpert.project_up"}


def test_the_model_declares_these_parts():
    with torch.device("meta"):
        model = Transformer(ModelConfig(dim=16, n_layers=2, n_heads=2, n_experts=3, moe_every=2), 40)
    parts = {f"{type(module).__name__}.{part.name}": part for module, part in parts_of(model)}
    assert {name for name, part in parts.items() if part.compile} == COMPILED
    assert {name for name, part in parts.items() if part.dynamic} == {"Experts.activate"}
    assert {name for name, part in parts.items() if part.recompute == "selective"} == SELECTIVE
    assert {name for name, part in parts.items() if part.recompute == "full"} == FULL
    assert {name for name, part in parts.items() if part.keep} == {"Router.forward"}


class Double(nn.Module):
    @part(compile=True)
    def forward(self, x):
        """x -> 2 x."""
        return 2 * x


class Triple(Double):
    def forward(self, x):
        return 3 * x


def test_a_part_is_an_ordinary_method_until_it_is_wrapped():
    first, second = Double(), Double()
    assert first(5) == second(5) == 10 and Double.forward.__doc__ == "x -> 2 x."
    ((module, declared),) = parts_of(first)
    declared.wrap(module, lambda method: lambda x: method(x) + 1)
    assert first(5) == 11 and second(5) == 10
    declared.wrap(module, lambda method: lambda x: 10 * method(x))
    assert first(5) == 110


def test_a_subclass_that_overrides_a_part_has_no_part():
    assert Triple()(5) == 15 and not list(parts_of(Triple()))
