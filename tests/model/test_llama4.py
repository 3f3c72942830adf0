"""Logits, and gradients of the loss, equal those of `Llama4ForCausalLM` in the installed version of transformers."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from model.config import ModelConfig, RopeScaling
from model.moe import Router
from model.rope import rope_frequencies
from model.transformer import Transformer
from tests.support.run_cases import smallest_score_gap
from trainer.hub.mapping import tensor_slices, to_hf_config

transformers = pytest.importorskip("transformers", reason="the extra `hub` is not installed")
VOCAB = 37

configs = st.builds(
    ModelConfig,
    dim=st.sampled_from([12, 20]),
    n_layers=st.integers(2, 4),
    n_heads=st.just(4),
    n_kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([6, 8]),
    ffn_dim=st.just(28),
    expert_dim=st.sampled_from([8, 24]),
    n_experts=st.integers(2, 31) | st.sampled_from([1, 31]),
    top_k=st.just(1),
    moe_every=st.sampled_from([1, 2]),
    max_seq_len=st.just(1 << 20),
    rope_theta=st.sampled_from([10_000.0, 500_000.0]),
    rope_scaling=st.none()
    | st.builds(
        RopeScaling,
        factor=st.sampled_from([8, 16]),
        high_freq_factor=st.sampled_from([1, 4]),
        original_max_position_embeddings=st.sampled_from([32, 64]),
    ),
    nope_every=st.sampled_from([0, 2, 3]),
    attention_chunk=st.sampled_from([None, 7, 16]),
    qk_norm=st.booleans(),
    temperature_tuning=st.booleans(),
    temperature_floor=st.sampled_from([3, 16]),
    temperature_scale=st.sampled_from([0.1, 0.7]),
    norm_eps=st.sampled_from([1e-5, 1e-2]),
    tie_embeddings=st.booleans(),
)
drawn = st.tuples(configs, st.booleans(), st.integers(0, 99))
few_examples = settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # no search for a smaller example
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def both(config, seed, dtype):
    """The model and the one of transformers with the same weights, of ordinary size, also those of norms."""
    ours = Transformer(config, VOCAB)
    ours.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5, generator=generator)
    ours.to(dtype).compute_dtype = dtype
    theirs = transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(**to_hf_config(config, VOCAB, 1, 2, "float32"))
    )
    weights = {k: v for k, v in named(config, dict(ours.named_parameters()).get)}
    if config.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    theirs.load_state_dict(weights)
    return ours.eval(), theirs.to(dtype).eval()


def named(config, get):
    """What `get` says of each of our tensors, under their names."""
    for part in tensor_slices(config, VOCAB):
        if part.is_plain:
            yield part.hf_name, get(part.name)[part.start : part.stop].detach()


def tokens_of(seed, length=60):
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


def logits_of(ours, tokens):
    """Our logits, if no choice of an expert is a near tie that rounding may decide differently."""
    gaps = [1.0]
    hooks = [
        module.register_forward_hook(lambda router, inputs, _: gaps.append(smallest_score_gap(router, *inputs)))
        for module in ours.modules()
        if isinstance(module, Router)
    ]
    logits = ours(tokens).logits
    for hook in hooks:
        hook.remove()
    assume(min(gaps) > 2e-6)
    return logits


@contextmanager
def wide_casts(patch=pytest.MonkeyPatch):
    """Casts to fp32 in transformers keep fp64, and positions become fp64."""
    with patch.context() as p:
        p.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


@few_examples
@given(drawn)
def test_logits_and_gradients_equal_transformers_in_fp32(case):
    config, two, seed = case
    config = config.model_copy(update={"top_k": min(1 + two, config.n_experts)})
    ours, theirs = both(config, seed, torch.float32)
    tokens = tokens_of(seed)
    torch.testing.assert_close(logits_of(ours, tokens), theirs(tokens).logits, rtol=0, atol=2e-5)
    loss = ours(tokens[:, :-1], tokens[:, 1:]).loss / tokens[:, 1:].numel()
    their_loss = theirs(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, their_loss, rtol=1e-6, atol=1e-6)
    loss.backward()
    their_loss.backward()
    expected = {name: weight.grad for name, weight in theirs.named_parameters()}
    grads = dict(named(config, lambda name: ours.get_parameter(name).grad))
    assert set(grads) == set(expected)
    for name, grad in grads.items():
        distance = (grad - expected[name]).norm()
        assert distance <= 1e-4 * expected[name].norm(), (name, float(distance), float(expected[name].norm()))


FAR = [0, 8_191, 131_072, 1_000_000]


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_logits_at_positions_far_from_the_start(theta):
    """Far positions show the last bit of a frequency. Frequencies are equal, also at the width of a real head."""
    scalings = [None, RopeScaling(), RopeScaling(factor=16, high_freq_factor=1, original_max_position_embeddings=64)]
    rotary = transformers.models.llama4.modeling_llama4.Llama4TextRotaryEmbedding
    for scaling in scalings:
        config = ModelConfig(dim=128, n_heads=1, rope_theta=theta, rope_scaling=scaling)
        theirs = rotary(transformers.Llama4TextConfig(**to_hf_config(config, VOCAB, 1, 2, "float32"))).inv_freq
        assert torch.equal(rope_frequencies(128, theta, scaling, torch.device("cpu")), theirs)
    config = ModelConfig(dim=64, n_heads=1, n_layers=2, nope_every=0, moe_every=0, ffn_dim=8, rope_theta=theta)
    ours, theirs = both(config, 1, torch.float32)
    tokens = tokens_of(0)
    for start in FAR:
        positions = torch.arange(start, start + tokens.shape[1])[None]
        got, expected = ours(tokens, positions=positions).logits, theirs(tokens, position_ids=positions).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_logits_with_the_chunk_and_floor_of_llama_4():
    """8,200 tokens: more than a chunk and a temperature floor of Llama 4."""
    config = ModelConfig(
        dim=16,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        ffn_dim=16,
        moe_every=0,
        nope_every=2,
        attention_chunk=8192,
        temperature_scale=0.7,
        max_seq_len=16384,
    )
    ours, theirs = both(config, 3, torch.float32)
    tokens = tokens_of(3, 8200)[:1]
    with torch.no_grad():
        got, expected = ours(tokens).logits, theirs(tokens, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_large_router_logits_choose_the_same_experts():
    """Logits above 17, whose sigmoids are all 1 in fp32."""
    config = ModelConfig(dim=16, n_layers=1, n_heads=2, expert_dim=8, n_experts=7, nope_every=0)
    ours, theirs = both(config, 1, torch.float32)
    with torch.no_grad():
        ours.blocks[0].feed_forward.router.weight *= 40
        theirs.model.layers[0].feed_forward.router.weight *= 40
    tokens = tokens_of(0)
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=0, atol=2e-5)


@few_examples
@given(drawn)
def test_logits_equal_transformers_in_fp64(case):
    """As installed; and to the last digits if casts to fp32 in transformers are disabled."""
    config, two, seed = case
    config = config.model_copy(update={"top_k": min(1 + two, config.n_experts)})
    ours, theirs = both(config, seed, torch.float64)
    tokens = tokens_of(seed)
    logits = logits_of(ours, tokens)
    torch.testing.assert_close(logits, theirs(tokens).logits.double(), rtol=0, atol=1e-5)
    with wide_casts():
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=0, atol=1e-9)
