"""Operations a token, as the config reckons them, and as torch counts them in the real model."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.random import sequence_keys, site_keys
from model.transformer import Transformer

ROWS, LENGTH, VOCABULARY = 2, 24, 37
SHAPE = dict(dim=16, n_heads=4, expert_dim=12, ffn_dim=20, n_experts=5, n_layers=4, max_seq_len=LENGTH, moe_every=2)


def product(into: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
    return 2 * a[0] * a[1] * b[1]


def counted(config: ModelConfig) -> int:
    """Operations of a forward and a backward, as torch counts them.

    In fp64 each product is one that it knows: grouped_mm and fused attention are not, and addmm_ only when told.
    """
    model = Transformer(config, VOCABULARY).double().train()
    model.compute_dtype = torch.float64
    model.init_weights(0)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    keys = site_keys(sequence_keys(0, 0, torch.arange(ROWS)), config.n_layers)
    known = {torch.ops.aten.addmm_: product}
    with FlopCounterMode(display=False, custom_mapping=known) as counter, sdpa_kernel(SDPBackend.MATH):
        output = model(tokens, tokens, keys=keys)
        output.loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"n_kv_heads": 2, "head_dim": 6, "tie_embeddings": True},
        {"moe_every": 0},
        {"moe_every": 1, "top_k": 2, "noisy_top_k": True, "nope_every": 0},
        {"shared_expert": False, "attention_chunk": 8},
    ],
)
def test_operations_are_those_that_torch_counts(keys):
    """Exactly, but for this: torch counts the scores of all keys, of which a causal mask hides nearly half, and one
    product of a vector in the backward of each norm on a CPU.
    """
    config = ModelConfig(**{**SHAPE, **keys})
    hidden = 0.0
    for layer in range(config.n_layers):
        chunk = config.attention_chunk if config.attention_chunk and config.uses_rope(layer) else LENGTH
        hidden += 3 * 4 * config.n_heads * config.head * (chunk - (chunk + 1) / 2)
    norms = (2 * config.n_layers + 1) * 2 * config.dim
    want = config.flops_per_token(VOCABULARY, LENGTH) + hidden + norms
    assert counted(config) == pytest.approx(ROWS * LENGTH * want, rel=1e-12)


@pytest.mark.parametrize(("length", "chunk"), [(24, None), (24, 8), (24, 7), (5, 8)])
def test_average_keys_are_those_that_a_causal_mask_shows(length, chunk):
    config = ModelConfig(**{**SHAPE, "attention_chunk": chunk, "nope_every": 4})
    at = torch.arange(length)
    for layer in (0, 3):  # with RoPE and chunks, and the NoPE layer, which sees the whole past
        part = at // chunk if chunk and layer == 0 else at * 0
        seen = (at[:, None] >= at) & (part[:, None] == part)
        assert config.average_keys(layer, length) == pytest.approx(float(seen.sum(1).double().mean()))
