"""Recomputation keeps less from forward to backward, and changes nothing else."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from model.config import ModelConfig
from model.context import ForwardContext
from model.random import sequence_keys, site_keys
from parallel.build import build_model
from trainer.memory import kept_numbers

CPU, ROWS, LENGTH = torch.device("cpu"), 4, 32
SHAPE = dict(dim=16, n_heads=2, expert_dim=64, ffn_dim=64, n_experts=4, n_layers=2, max_seq_len=LENGTH, moe_every=2)


def build(mode, **keys):
    model = build_model(ModelConfig(**{**SHAPE, **keys}), 40, 0, CPU, torch.float32, None, recompute=mode)
    return model.train()


def kept(model, layer):
    """The numbers for each token that one block keeps from forward to backward, including its result."""
    x = torch.randn(ROWS, LENGTH, model.config.dim, requires_grad=True)
    context = ForwardContext.create(model.config, x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        out = model.blocks[layer](x, context)
    assert out[0].requires_grad
    return sum(e.self_cpu_memory_usage for e in seen.key_averages()) / (4 * ROWS * LENGTH)


@pytest.mark.parametrize("keys", [{}, {"n_kv_heads": 1, "top_k": 2}, {"shared_expert": False}])
@pytest.mark.parametrize("layer", [0, 1])
def test_each_mode_keeps_the_numbers_that_are_documented(layer, keys):
    """docs/parallel.md: an MoE layer keeps 13 D + 6 F (uncompiled), 4 D + 3 F, 4 D + F, and little else."""
    keys = {"dim": 128, "expert_dim": 256, "ffn_dim": 192, **keys}
    models = {mode: build(mode, **keys) for mode in ("none", "selective", "full")}
    numbers = {mode: kept(model, layer) for mode, model in models.items()}
    assert numbers["selective"] < numbers["none"]
    if layer == 0 or models["full"].config.shared_expert:  # otherwise both modes keep the same numbers in fp32
        assert numbers["full"] < numbers["selective"]
    for mode, model in models.items():
        assert numbers[mode] == pytest.approx(kept_numbers(model.config, layer, mode, False), rel=0.02, abs=80), mode
    if layer == 1 and len(keys) == 3:
        expected = {"none": 13 * 128 + 6 * 256, "selective": 4 * 128 + 3 * 256, "full": 4 * 128 + 256}
        assert expected == {mode: kept_numbers(model.config, layer, mode, False) for mode, model in models.items()}


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("documents", [None, torch.arange(LENGTH).ge(torch.arange(ROWS)[:, None] * 7).long()])
@pytest.mark.parametrize("keys", [{}, {"top_k": 2, "aux_loss_weight": 0.1, "noisy_top_k": True, "attention_chunk": 9}])
def test_recomputation_changes_neither_loss_nor_gradients(mode, keys, documents):
    """With dropout everywhere; also within documents and chunks."""
    tokens = torch.randint(0, 40, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    rng_keys = site_keys(sequence_keys(0, 0, torch.arange(ROWS)), SHAPE["n_layers"])
    load_shares, results = torch.full((1, 4), 0.25), []
    for one in ("none", mode):
        model = build(one, dropout=0.1, attention_dropout=0.1, **keys)
        torch.manual_seed(5)  # of attention's dropout, which must be the same in both runs
        output = model(tokens, tokens, documents=documents, rng_keys=rng_keys, load_shares=load_shares)
        (output.loss + output.penalty).backward()
        results.append((output.loss, output.loads, [p.grad for p in model.parameters()]))
    (loss, loads, grads), (recomputed_loss, recomputed_loads, recomputed_grads) = results
    assert torch.equal(loss, recomputed_loss) and torch.equal(loads, recomputed_loads)
    for a, b in zip(grads, recomputed_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_full_recomputation_works_in_bf16_under_fsdp(pool):
    """torch.utils.checkpoint raised an error while the router was an FSDP unit inside of a recomputed part."""
    results = [
        pool.run(1, "tests.support.parallel_cases:recomputed_on_one_rank", mode=mode)[0] for mode in ("none", "full")
    ]
    assert results[0] == results[1] and results[1][1]
    assert not any("router" in unit for unit in results[1][2])
