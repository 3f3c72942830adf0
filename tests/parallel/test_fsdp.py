"""FSDP and expert parallelism on real processes: the same weights, loss and gradients as in a single process."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support import parallel_cases as cases


@pytest.fixture(autouse=True)
def single_process(monkeypatch):
    """This process itself computes the expected results, without the environment of torchrun."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("keys", [{}, {"tie_embeddings": True}])
def test_initial_weights_are_bitwise_the_same_at_any_world_size(pool, keys):
    expected = cases.initial_digest(**keys)
    for world in (2, 3):
        assert set(pool.run(world, "tests.support.parallel_cases:initial_digest", **keys)) == {expected}
    assert cases.initial_digest(**{**keys, "n_experts": 6}) != expected


CASES = [
    (2, {}),
    (2, {"one_unit_bytes": 1 << 30}),
    (3, {"one_unit_bytes": 1 << 30, "reduce": "every", "tie_embeddings": True}),
    (3, {"tie_embeddings": True}),
    (2, {"reduce": "every", "micro_batches": 1}),
    (3, {"reduce": "every", "shared_expert": False}),
    (4, {"replicate": 2}),
    (4, {"replicate": 2, "reduce": "every", "moe_every": 1}),
    (2, {"expert": 2}),
    (2, {"expert": 2, "top_k": 2, "one_unit_bytes": 1 << 30, "recompute": "full"}),
    (3, {"expert": 3, "reduce": "every", "shared_expert": False}),
    (4, {"expert": 2, "top_k": 2}),
    (4, {"expert": 4, "n_experts": 2}),
    (4, {"replicate": 2, "expert": 2, "reduce": "every", "overlap": False}),
]


@pytest.mark.parametrize("world, keys", CASES)
def test_gradients_equal_those_of_one_process(pool, world, keys):
    model_keys = {
        k: v for k, v in keys.items() if k not in ("replicate", "one_unit_bytes", "expert", "overlap", "recompute")
    }
    expected = cases.one_step(**model_keys)
    for got in pool.run(world, "tests.support.parallel_cases:one_step", **keys):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert got["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        for name, grad in expected["grads"].items():
            np.testing.assert_allclose(got["grads"][name], grad, rtol=0, atol=2e-6 * np.abs(grad).max(), err_msg=name)


def test_norm_is_bitwise_the_same_on_all_ranks(pool):
    assert len({got["norm"] for got in pool.run(3, "tests.support.parallel_cases:one_step")}) == 1


@pytest.mark.parametrize("keys", [{}, {"expert": 2}, {"expert": 2, "recompute": "full"}])
def test_router_stays_fp32_under_bf16(pool, keys):
    expected = {
        "weight": "torch.float32",
        "scores": "torch.float32",
        "experts": "torch.bfloat16",
        "rows": "torch.bfloat16",
        "loss": "torch.float32",
        "grad": "torch.float32",
    }
    for dtypes in pool.run(2, "tests.support.parallel_cases:router_dtypes", **keys):
        assert dtypes == expected


@pytest.mark.parametrize("keys", [{}, {"tie_embeddings": True}, {"one_unit_bytes": 1 << 30}])
def test_gathered_weights_are_sharded_again_and_can_be_trained(pool, keys):
    for sharded, equal, trains in pool.run(2, "tests.support.parallel_cases:gathered_leaves_the_model_sharded", **keys):
        assert sharded and equal and trains


def test_rank_0_decides_if_ranks_disagree(pool):
    assert pool.run(3, "tests.support.parallel_cases:broadcast_if_ranks_disagree") == [(True, False)] * 3


def test_gradient_is_that_of_the_mean_loss_over_real_tokens():
    """The loss is divided by the number of real tokens once: compared with torch's mean of the cross-entropy."""
    model, _ = cases.build(moe_every=0)
    tokens = torch.randint(0, cases.VOCAB, (6, 17), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[0, 3:] = -100
    plain = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), targets.flatten())
    plain.backward()
    got = cases.one_step(moe_every=0)
    assert got["loss"] == pytest.approx(plain.item(), rel=1e-6)
    for name, p in model.named_parameters():
        atol = 2e-6 * float(p.grad.abs().max())
        np.testing.assert_allclose(got["grads"][name], p.grad.numpy(), rtol=0, atol=atol, err_msg=name)
