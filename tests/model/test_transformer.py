"""The whole model: its loss, positions, dropout, tied weights, initial values and dtypes."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from model.attention import Attention
from model.config import ModelConfig, RopeScaling
from model.context import ForwardContext
from model.initial_values import Constant, Normal, initial_values
from model.loss import IGNORE
from model.random import sequence_keys, site_keys
from model.rope import rope_frequencies, rotate
from tests.support.configs import SMALL_MODEL, SMALL_VOCAB, fp64_model, random_tokens


def test_loss_is_the_sum_over_real_targets():
    model, tokens = fp64_model(), random_tokens()
    x, y = tokens[:, :-1], tokens[:, 1:].clone()
    y[0, 5:] = IGNORE
    expected = F.cross_entropy(training_logits(model, x, y), y.flatten(), reduction="sum")
    torch.testing.assert_close(model(x, y).loss, expected)


def training_logits(model, x, y):
    """The logits of the loss; they differ from those without targets, because ignored tokens reach no expert."""
    seen = {}
    hook = model.head.norm.register_forward_hook(lambda m, i, out: seen.update(hidden=out))
    model(x, y)
    hook.remove()
    return (seen["hidden"] @ model.head.weight.t()).flatten(0, 1)


@pytest.mark.parametrize("keys", [{}, {"attention_chunk": None}, {"nope_every": 0}, {"n_kv_heads": None}])
def test_no_token_sees_later_tokens(keys):
    model, tokens = (
        fp64_model(moe_every=0, **keys),
        random_tokens(),
    )  # without experts, whose groups of rows would change, it is bitwise
    before = model(tokens).logits
    changed = tokens.clone()
    changed[:, 20:] = 5
    after = model(changed).logits
    assert torch.equal(before[:, :20], after[:, :20]) and not torch.equal(before[:, 20:], after[:, 20:])


def test_rope_layers_see_their_chunk_and_nope_layers_the_row():
    tokens = random_tokens()
    changed = tokens.clone()
    changed[:, 0] = 5
    chunked = fp64_model(nope_every=0, moe_every=0)
    same = (chunked(tokens).logits == chunked(changed).logits).all(-1)
    assert same[:, 8:].all() and not same[:, :8].all()
    whole = fp64_model(nope_every=4, moe_every=0)
    assert not torch.equal(whole(tokens).logits[:, 8:], whole(changed).logits[:, 8:])


def test_rope_rotates_interleaved_pairs():
    frequency = rope_frequencies(4, 10_000.0, None, torch.device("cpu"))
    torch.testing.assert_close(frequency, torch.tensor([1.0, 0.01]))
    x = torch.randn(1, 6, 1, 4, dtype=torch.float64)
    angle = torch.arange(6)[None, :, None, None] * frequency.double()
    rotated = rotate(x, torch.stack([angle.cos(), angle.sin()], -1))
    even, odd = x[..., 0::2], x[..., 1::2]
    torch.testing.assert_close(rotated[..., 0::2], even * angle.cos() - odd * angle.sin())
    torch.testing.assert_close(rotated[..., 1::2], even * angle.sin() + odd * angle.cos())


def test_rope_scaling_stretches_long_wavelengths_only():
    scaling = RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=64)
    plain = rope_frequencies(64, 10_000.0, None, torch.device("cpu"))
    scaled = rope_frequencies(64, 10_000.0, scaling, torch.device("cpu"))
    wavelength = 2 * torch.pi / plain
    torch.testing.assert_close(scaled[wavelength < 16], plain[wavelength < 16])
    torch.testing.assert_close(scaled[wavelength > 64], plain[wavelength > 64] / 8)
    between = (wavelength > 16) & (wavelength < 64)
    assert between.any() and (scaled[between] < plain[between]).all() and (scaled[between] > plain[between] / 8).all()


def test_rope_scaling_with_equal_factors_is_a_step():
    """As in the published Scout: wavelengths of at least the original length are stretched."""
    scaling = RopeScaling(factor=16, low_freq_factor=1, high_freq_factor=1, original_max_position_embeddings=64)
    plain = rope_frequencies(64, 10_000.0, None, torch.device("cpu"))
    scaled = rope_frequencies(64, 10_000.0, scaling, torch.device("cpu"))
    torch.testing.assert_close(scaled, torch.where(2 * torch.pi / plain < 64, plain, plain / 16))
    assert 0 < (scaled == plain).sum() < 32
    with pytest.raises(ValidationError, match="high_freq_factor"):
        RopeScaling(low_freq_factor=2, high_freq_factor=1)


def test_tied_head_is_one_parameter_with_both_gradients():
    tied, tokens = fp64_model(tie_embeddings=True), random_tokens()
    assert "head.weight" not in dict(tied.named_parameters())
    untied = fp64_model()
    state = {**tied.state_dict(), "head.weight": tied.embedding.weight.detach()}
    untied.load_state_dict(state)
    tied(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    untied(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    torch.testing.assert_close(tied.embedding.weight.grad, untied.embedding.weight.grad + untied.head.weight.grad)


def test_dropout_does_not_depend_on_the_micro_batch():
    model, tokens = fp64_model(dropout=0.2), random_tokens(4)
    rng_keys, others = (site_keys(sequence_keys(0, step, torch.arange(4)), model.config.n_layers) for step in (3, 4))
    whole = model(tokens, rng_keys=rng_keys).logits
    parts = [model(tokens[i : i + 2], rng_keys=rng_keys[..., i : i + 2]).logits for i in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.allclose(model(tokens, rng_keys=others).logits, whole)
    assert torch.equal(model(tokens).logits, fp64_model()(tokens).logits)


def test_parameter_counts_are_those_of_the_model():
    for keys in ({}, {"tie_embeddings": True}, {"shared_expert": False}, {"moe_every": 0}, {"moe_every": 1}):
        model = fp64_model(**keys)
        total, active = model.config.parameter_counts(SMALL_VOCAB)
        assert total == sum(p.numel() for p in model.parameters())
        c = model.config
        idle = len(c.moe_layers) * (c.n_experts - c.top_k) * 3 * c.dim * c.expert_dim
        assert active == total - idle


def test_initial_values_are_declared_beside_the_parameters():
    model = fp64_model()
    c = model.config
    assert initial_values(model, "blocks.1.feed_forward_norm.weight") == Constant(1.0)
    assert initial_values(model, "embedding.weight") == Normal(1.0)
    assert initial_values(fp64_model(tie_embeddings=True), "embedding.weight") == Normal(c.dim**-0.5)
    assert initial_values(model, "blocks.0.attention.wqkv") == Normal(c.dim**-0.5)
    assert initial_values(model, "blocks.0.feed_forward.down") == Normal((2 * c.n_layers * c.ffn_dim) ** -0.5)
    assert initial_values(model, "blocks.1.feed_forward.experts.down") == Normal(
        (2 * c.n_layers * c.expert_dim) ** -0.5
    )
    assert initial_values(model, "blocks.1.feed_forward.shared.down") == Normal((2 * c.n_layers * c.expert_dim) ** -0.5)


def test_a_parameter_without_initial_values_is_an_error():
    model = fp64_model()
    model.blocks[0].scale = torch.nn.Parameter(torch.empty(3))
    with pytest.raises(LookupError, match=r"blocks.0.scale: no initial values; add 'scale' to .* of Block"):
        model.init_weights(0)


def test_weights_are_cast_where_they_are_used():
    model = fp64_model().float()
    model.compute_dtype = torch.bfloat16
    out = model(random_tokens()[:, :-1], random_tokens()[:, 1:])
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_short_rows_train_with_fp32_attention_on_a_cpu():
    """The scores and weights of bf16 queries are not rounded to bf16; only the result is."""
    layer = Attention(ModelConfig(dim=16, n_layers=1, n_heads=2, max_seq_len=32), 0).bfloat16()
    torch.nn.init.eye_(layer.wo)
    q, k, v = torch.randn(3, 2, 32, 2, 8).bfloat16().unbind()
    context = ForwardContext.create(layer.config, q.flatten(-2))
    wide = (t.float().transpose(1, 2) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(*wide, is_causal=True).transpose(1, 2).flatten(-2)
    assert torch.equal(layer.attend(q, k, v, context), expected.bfloat16())


@pytest.mark.parametrize(
    "keys, names",
    [
        ({"n_heads": 3}, "n_heads=3"),
        ({"n_kv_heads": 3}, "n_kv_heads=3"),
        ({"head_dim": 5}, "head_dim=5"),
        ({"top_k": 9}, "top_k=9"),
    ],
)
def test_impossible_shapes_raise_an_error(keys, names):
    with pytest.raises(ValidationError, match=names):
        ModelConfig(**{**SMALL_MODEL, **keys})
