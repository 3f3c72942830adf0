"""The learning rate schedules, and AdamW with its weight decay."""

import math

import pytest
import torch

from model.transformer import Transformer
from tests.support.configs import TINY_MODEL
from trainer.config import TrainConfig
from trainer.optimizer import bytes_per_weight, learning_rate, make_optimizer

CONFIG = TrainConfig(steps=100, max_lr=1.0, min_lr=0.1, warmup_steps=10)


def test_warm_up_is_linear_and_cosine_ends_at_the_minimum():
    rates = [learning_rate(CONFIG, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[99] == pytest.approx(0.1) and max(rates) == 1.0
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[54] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))


def test_constant_schedule_and_decay_steps():
    constant = CONFIG.model_copy(update={"schedule": "constant"})
    assert {learning_rate(constant, step, 100) for step in range(10, 100)} == {1.0}
    early = CONFIG.model_copy(update={"decay_steps": 50})
    assert learning_rate(early, 49, 100) == pytest.approx(0.1) and learning_rate(early, 99, 100) == pytest.approx(0.1)
    assert learning_rate(CONFIG.model_copy(update={"warmup_steps": 0}), 0, 100) < 1.0


def test_wsd_stays_at_the_peak_and_decays_at_the_end():
    wsd = CONFIG.model_copy(update={"schedule": "wsd", "decay_steps": 40})
    rates = [learning_rate(wsd, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and set(rates[10:60]) == {1.0}
    assert rates[69] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(10 / 40))) and rates[99] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[59:], rates[60:], strict=False))
    assert [learning_rate(wsd, step, 200) for step in range(60)] == rates[
        :60
    ]  # so that a run can be extended before its decay
    a_tenth = CONFIG.model_copy(update={"schedule": "wsd"})
    assert [learning_rate(a_tenth, step, 100) == 1.0 for step in (89, 90)] == [True, False]
    short = wsd.model_copy(update={"decay_steps": 1000})  # longer than the run, whose length may come from train.epochs
    assert learning_rate(short, 9, 100) == 1.0 > learning_rate(short, 10, 100) > 0.1


def test_a_decay_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="decay_steps=95: does not fit into steps=100 after warmup_steps=10"):
        TrainConfig(steps=100, warmup_steps=10, schedule="wsd", decay_steps=95)
    TrainConfig(steps=100, warmup_steps=10, schedule="cosine", decay_steps=95)


def test_weight_decay_is_for_matrices_except_the_embedding():
    model = Transformer(TINY_MODEL, 20)
    optimizer = make_optimizer(model, CONFIG)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name or name == "embedding.weight" else 0.1), name


def test_an_adamw_weight_has_two_moments_in_fp32():
    assert bytes_per_weight(CONFIG) == 4 + 4 + 4


def test_a_step_equals_adamw_computed_by_hand():
    """arXiv:1711.05101, algorithm 2, with the state that `make_optimizer` allocates."""
    model = Transformer(TINY_MODEL, 20)
    model.init_weights(0)
    optimizer = make_optimizer(model, CONFIG)
    p = model.head.weight
    expected, m, v = p.detach().double().clone(), 0, 0
    for t in (1, 2, 3):
        for q in model.parameters():
            q.grad = torch.full_like(q, 0.1 * t)
        optimizer.step()
        g = 0.1 * t
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        expected = expected * (1 - 0.1) - (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.95**t)) + 1e-8)
    torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-6)
