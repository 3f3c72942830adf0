"""Low-precision copies of weights: made once while weights do not change, and not used after a change."""

import pytest
import torch
import torch.nn.functional as F

from model.precision import cast, copies_are_kept, weights_unchanged


def test_a_weight_is_copied_once_while_it_does_not_change():
    weight = torch.nn.Parameter(torch.randn(4, 3))
    with weights_unchanged():
        first, second = (cast(weight, torch.bfloat16).detach() for _ in range(2))
        with weights_unchanged():
            inside = cast(weight, torch.bfloat16).detach()
        assert copies_are_kept() and first.data_ptr() == second.data_ptr() == inside.data_ptr()
        assert cast(weight, torch.float32) is weight
        assert cast(weight, torch.float16).dtype == torch.float16
    assert not copies_are_kept()
    with torch.no_grad():
        weight.fill_(2)
    with weights_unchanged():
        assert (cast(weight, torch.bfloat16) == 2).all()
    with torch.no_grad():
        weight.fill_(3)
    assert (cast(weight, torch.bfloat16) == 3).all()


def test_copies_are_dropped_after_an_error():
    with pytest.raises(KeyError), weights_unchanged():
        raise KeyError
    assert not copies_are_kept()


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradients_equal_those_of_plain_casts(micro_batches):
    """Bitwise, and summed over micro-batches in fp32."""
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(micro_batches, 5, 3, generator=g).bfloat16()
    start = torch.randn(4, 3, generator=g)
    plain, shared = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    for x in inputs:
        F.linear(x, plain.to(x.dtype)).square().sum().backward()
    with weights_unchanged():
        for x in inputs:
            F.linear(x, cast(shared, x.dtype)).square().sum().backward()
    assert shared.grad.dtype == torch.float32 and torch.equal(shared.grad, plain.grad)
