"""Operations per token: `ModelConfig.flops_per_token` equals the number that torch counts in the model."""

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

    torch does not count grouped_mm and fused attention, so the model runs in fp64, which uses neither. Nor does it
    count addmm_, whose formula is passed to it.
    """
    model = Transformer(config, VOCABULARY).double().train()
    model.compute_dtype = torch.float64
    model.init_weights(0)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    rng_keys = site_keys(sequence_keys(0, 0, torch.arange(ROWS)), config.n_layers)
    formulas = {torch.ops.aten.addmm_: product}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, sdpa_kernel(SDPBackend.MATH):
        output = model(tokens, tokens, rng_keys=rng_keys)
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
    """Equal after two corrections: torch also counts the scores that the causal mask hides, nearly half of them, and,
    on a CPU, a product with a vector in the backward of each norm.
    """
    config = ModelConfig(**{**SHAPE, **keys})
    hidden = 0.0
    for layer in range(config.n_layers):
        chunk = config.attention_chunk if config.attention_chunk and config.uses_rope(layer) else LENGTH
        hidden += 3 * 4 * config.n_heads * config.head * (chunk - (chunk + 1) / 2)
    norms = (2 * config.n_layers + 1) * 2 * config.dim
    expected = config.flops_per_token(VOCABULARY, LENGTH) + hidden + norms
    assert counted(config) == pytest.approx(ROWS * LENGTH * expected, rel=1e-12)


@pytest.mark.parametrize(("length", "chunk"), [(24, None), (24, 8), (24, 7), (5, 8)])
def test_average_keys_are_those_of_a_causal_mask(length, chunk):
    config = ModelConfig(**{**SHAPE, "attention_chunk": chunk, "nope_every": 4})
    position = torch.arange(length)
    for layer in (0, 3):  # a RoPE layer with chunks, and the NoPE layer, which sees all tokens before
        segment = position // chunk if chunk and layer == 0 else torch.zeros_like(position)
        seen = (position[:, None] >= position) & (segment[:, None] == segment)
        assert config.average_keys(layer, length) == pytest.approx(float(seen.sum(1).double().mean()))
