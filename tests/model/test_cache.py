"""The cache of generation: logits equal those of a whole forward, whatever the lengths of prompts and chunks."""

import pytest
import torch

from tests.support.configs import fp64_model, random_tokens

LENGTHS = [1, 7, 8, 9, 17, 3]  # around the chunk of 8
KINDS = [{}, {"attention_chunk": None}, {"nope_every": 2, "n_kv_heads": 1, "top_k": 2}, {"nope_every": 0}]


def generate_logits(model, tokens, prompts, end):
    """Logits (B, 1, V) after the prompts of these lengths and after each token up to the longest row's `end`."""
    cache = model.new_cache(prompts, end)
    outputs = [model(tokens[:, : max(prompts)], cache=cache)]
    while max(cache.lengths) <= end:
        last = torch.tensor(cache.lengths)[:, None] - 1
        outputs.append(model(tokens.gather(1, last), cache=cache))
    return outputs, cache


@torch.no_grad()
@pytest.mark.parametrize("keys", KINDS)
@pytest.mark.parametrize("first", [1, 7, 8, 9, 17])
def test_logits_with_and_without_cache_are_equal(first, keys):
    model, tokens = fp64_model(**keys).eval(), random_tokens()
    outputs, _ = generate_logits(model, tokens, [first, first], 30)
    got = torch.cat([output.logits for output in outputs], 1)
    torch.testing.assert_close(got, model(tokens).logits[:, first - 1 :])


@torch.no_grad()
@pytest.mark.parametrize("keys", KINDS)
def test_prompts_of_unequal_length_are_independent(keys):
    """Each row has its own positions, whatever tokens pad the others, and no padding is sent to an expert."""
    model, tokens = fp64_model(**keys).eval(), random_tokens(len(LENGTHS), 40)
    outputs, _ = generate_logits(model, tokens, LENGTHS, 37)
    whole = model(tokens).logits
    for row, first in enumerate(LENGTHS):
        got = torch.cat([output.logits[row] for output in outputs])
        torch.testing.assert_close(got, whole[row, first - 1 : first - 1 + len(got)])
    top_k = model.config.top_k
    assert outputs[0].loads.sum(1).tolist() == [top_k * sum(LENGTHS)] * len(outputs[0].loads)
    assert outputs[1].loads.sum(1).tolist() == [top_k * len(LENGTHS)] * len(outputs[1].loads)


@torch.no_grad()
def test_rows_that_are_kept_continue_as_before():
    model, tokens = fp64_model().eval(), random_tokens(len(LENGTHS), 40)
    _, cache = generate_logits(model, tokens, LENGTHS, 20)
    rows = [5, 0, 3]
    cache.keep_sequences(rows)
    last = [length - 1 for length in cache.lengths]
    got = model(tokens[rows, last][:, None], cache=cache).logits
    whole = model(tokens).logits
    torch.testing.assert_close(got[:, 0], whole[rows, last])


@torch.no_grad()
@pytest.mark.parametrize("capacity, chunked", [(64, 8), (5, 5)])
def test_cache_of_a_layer_with_chunks_holds_one_chunk(capacity, chunked):
    model = fp64_model().eval()
    _, cache = generate_logits(model, random_tokens(2, capacity), [2, 5], capacity)
    c = model.config
    for layer, layer_cache in enumerate(cache.layers):
        entries = chunked if c.uses_rope(layer) else capacity
        assert layer_cache.k.shape == layer_cache.v.shape == (2, entries, c.kv_heads, c.head)
        assert layer_cache.k.untyped_storage().nbytes() == layer_cache.k.numel() * 8  # no view of a larger tensor


def test_tokens_that_do_not_fit_the_cache_raise_an_error():
    model, tokens = fp64_model().eval(), random_tokens(2, 12)
    cache = model.new_cache([5, 3], 6)
    with pytest.raises(ValueError, match="4 tokens per sequence do not fit prompts"):
        model(tokens[:, :4], cache=cache)
    model(tokens[:, :5], cache=cache)
    with pytest.raises(ValueError, match="2 tokens per sequence do not fit sequences"):
        model(tokens[:, :2], cache=cache)
    model(tokens[:, :1], cache=cache)
    with pytest.raises(ValueError, match="do not fit sequences of lengths .7, 5. in a cache of 6 tokens"):
        model(tokens[:, :1], cache=cache)
    with pytest.raises(ValueError, match="each sequence is one document"):
        model(tokens, documents=tokens, cache=model.new_cache([12, 12], 12))
