"""Compiled parts of the model: the same results up to rounding, and no recompilation in later steps."""

import pytest
import torch

from model.config import ModelConfig
from parallel.build import build_model

CASE = "tests.support.parallel_cases:compare_compiled"
OPTIONS = dict(dropout=0.1, attention_dropout=0.1, attention_chunk=5, nope_every=3, temperature_floor=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "world, keys",
    [(1, {}), (1, {"recompute": "full"}), (2, {"expert": 2, "recompute": "full"}), (2, {"recompute": "selective"})],
)
def test_compiled_parts_agree_and_are_compiled_once(pool, world, keys):
    """Different documents in each step, an idle expert and recomputation cause no recompilation.

    There are twelve graphs: dropout of the embedding; queries and keys with RoPE, and without; residual sum and norm
    after attention; a dense SwiGLU; the residual sum after a feed-forward; in an MoE the rows in expert order, the
    SwiGLU of the experts and of the shared expert, the sum of their outputs, and the statistics; the loss of a chunk.
    """
    for plain, compiled, distance, graphs, breaks in pool.run(world, CASE, timeout=400, **OPTIONS, **keys):
        assert compiled == pytest.approx(plain, rel=1e-6) and distance < 1e-5
        assert graphs == (12, 12) and not breaks


def test_compiled_parts_run_uncompiled_in_evaluation(monkeypatch):
    calls = []

    def recorded(method, dynamic):
        def call(*args):
            calls.append((method.__name__, dynamic))
            return method(*args)

        return call

    monkeypatch.setattr(torch, "compile", recorded)
    config = ModelConfig(dim=16, n_layers=2, n_heads=2, expert_dim=8, ffn_dim=8, n_experts=3, moe_every=2)
    model = build_model(config, 40, 0, torch.device("cpu"), torch.float32, None, compile=True)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    model.eval()(tokens, tokens)
    assert not calls
    model.train()(tokens, tokens).loss.backward()
    assert {name for name, dynamic in calls if dynamic} == {"activate"}
    names = {name for name, _ in calls}
    assert names == {
        "drop_embedding",
        "position",
        "add_attention",
        "activate",
        "add_feed_forward",
        "permute",
        "unpermute",
        "router_statistics",
        "chunk_gradient",
    }
