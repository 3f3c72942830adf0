"""Our names against those of Llama 4 in the Hugging Face layout: settings, and weights.

Every tensor there is a run of rows of one of ours, so nothing is ever transposed or permuted: our fused `wqkv` is
`q_proj`, `k_proj`, `v_proj` below one another, `gate_up` is `gate_proj`, `up_proj`; the experts are fused on both
sides, and RoPE turns the same pairs. Imports neither torch nor transformers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from data.settings import UserError, check
from model.config import ModelConfig

PLAIN, OURS = "Llama4ForCausalLM", "Llama4BiasedForCausalLM"  # the class that an export asks for
PLAIN_TYPE, OURS_TYPE = "llama4_text", "llama4_text_biased"
MODELING = "modeling_llama4_biased"  # the module that holds OURS

# Settings under another name there; the rest is in `to_llama` and `from_llama`.
HF_CONFIG_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size_mlp",
    "expert_dim": "intermediate_size",
    "n_experts": "num_local_experts",
    "top_k": "num_experts_per_tok",
    "max_seq_len": "max_position_embeddings",
    "attention_chunk": "attention_chunk_size",
    "qk_norm": "use_qk_norm",
    "temperature_tuning": "attn_temperature_tuning",
    "temperature_floor": "floor_scale",
    "temperature_scale": "attn_scale",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
# What transformers takes for a key that a config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size_mlp": 16384,
    "intermediate_size": 8192,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "max_position_embeddings": 131072,
    "attention_chunk_size": 8192,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 202048,
    "rope_theta": 500000.0,
    "interleave_moe_layer_step": 1,
    "no_rope_layer_interval": 4,
}
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Settings that say nothing of what the trained model computes.
TRAINING_ONLY_KEYS = {
    "max_seq_len",
    "dropout",
    "attention_dropout",
    "balance_rate",
    "balance_until",
    "aux_loss_weight",
    "z_loss_weight",
}


@dataclass(frozen=True)
class Piece:
    """A tensor `theirs` of `shape` is the rows `first`.. of `ours`."""

    ours: str
    theirs: str
    first: int
    shape: tuple[int, ...]
    plain: bool = True  # whether Llama 4 knows it


def pieces(config: ModelConfig, vocab_size: int) -> Iterator[Piece]:
    """All weights and biases of a model, each of ours in one or more of theirs."""
    c, heads = config, {"q": config.n_heads, "k": config.kv_heads, "v": config.kv_heads}

    def whole(ours: str, theirs: str, *shape: int, plain: bool = True) -> Piece:
        return Piece(ours, theirs, 0, shape, plain)

    def feed_forward(ours: str, theirs: str, hidden: int) -> Iterator[Piece]:
        yield Piece(f"{ours}.gate_up", f"{theirs}.gate_proj.weight", 0, (hidden, c.dim))
        yield Piece(f"{ours}.gate_up", f"{theirs}.up_proj.weight", hidden, (hidden, c.dim))
        yield whole(f"{ours}.down", f"{theirs}.down_proj.weight", c.dim, hidden)

    yield whole("embedding.weight", "model.embed_tokens.weight", vocab_size, c.dim)
    for i in range(c.n_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        yield whole(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight", c.dim)
        first = 0
        for letter, count in heads.items():
            shape = (count * c.head, c.dim)
            yield Piece(f"{ours}.attention.wqkv", f"{theirs}.self_attn.{letter}_proj.weight", first, shape)
            first += count * c.head
        yield whole(f"{ours}.attention.wo", f"{theirs}.self_attn.o_proj.weight", c.dim, c.n_heads * c.head)
        yield whole(f"{ours}.feed_forward_norm.weight", f"{theirs}.post_attention_layernorm.weight", c.dim)
        ours, theirs = f"{ours}.feed_forward", f"{theirs}.feed_forward"
        if not c.is_moe(i):
            yield from feed_forward(ours, theirs, c.ffn_dim)
            continue
        yield whole(f"{ours}.router.weight", f"{theirs}.router.weight", c.n_experts, c.dim)
        if c.noisy_top_k:
            yield whole(f"{ours}.router.noise", f"{theirs}.router.noise", c.n_experts, c.dim, plain=False)
        yield whole(f"{ours}.router.bias", f"{theirs}.router.balance_bias", c.n_experts, plain=False)
        widths = (c.n_experts, c.dim, 2 * c.expert_dim)
        yield whole(f"{ours}.experts.gate_up", f"{theirs}.experts.gate_up_proj", *widths)
        yield whole(f"{ours}.experts.down", f"{theirs}.experts.down_proj", c.n_experts, c.expert_dim, c.dim)
        if c.shared_expert:
            yield from feed_forward(f"{ours}.shared", f"{theirs}.shared_expert", c.expert_dim)
    yield whole("head.norm.weight", "model.norm.weight", c.dim)
    if not c.tie_embeddings:
        yield whole("head.weight", "lm_head.weight", vocab_size, c.dim)


def whole_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of each of our tensors."""
    shapes = {}
    for ours, group in groupby(pieces(config, vocab_size), key=lambda piece: piece.ours):
        parts = list(group)
        shapes[ours] = (sum(piece.shape[0] for piece in parts), *parts[0].shape[1:])
    return shapes


def to_llama(
    config: ModelConfig, vocab_size: int, bos: int, eos: int, dtype: str, plain: bool = True
) -> dict[str, Any]:
    """config.json of a model: per-layer lists written out, RoPE in the spellings of transformers before and since 5.

    Not `plain`: asks for the class of the modelling file that goes with it.
    """
    c, layers = config, range(config.n_layers)
    given = {**c.model_dump(), "n_kv_heads": c.kv_heads, "head_dim": c.head}
    scaling = None if c.rope_scaling is None else {"rope_type": "llama3", **c.rope_scaling.model_dump()}
    rope = [int(c.uses_rope(i)) for i in layers]
    result = {
        "architectures": [PLAIN if plain else OURS],
        "model_type": PLAIN_TYPE if plain else OURS_TYPE,
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": vocab_size,
        **{theirs: given[ours] for ours, theirs in HF_CONFIG_KEYS.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": c.attention_dropout,
        "interleave_moe_layer_step": c.moe_every,
        "moe_layers": c.moe_layers,
        "no_rope_layer_interval": c.nope_every or c.n_layers + 1,  # it is divided by
        "no_rope_layers": rope,
        "layer_types": ["chunked_attention" if r and c.attention_chunk else "full_attention" for r in rope],
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": c.rope_theta},
        "output_router_logits": False,
        "router_aux_loss_coef": c.aux_loss_weight,
        "router_jitter_noise": 0.0,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    if not plain:
        result |= {
            "auto_map": {"AutoConfig": f"{MODELING}.Llama4BiasedConfig", "AutoModelForCausalLM": f"{MODELING}.{OURS}"},
            "shared_expert": c.shared_expert,
            "noisy_top_k": c.noisy_top_k,
        }
        del result["rope_theta"], result["rope_scaling"]  # for others than transformers, which cannot read it anyway
    return result


def from_llama(given: Mapping[str, Any], where: str) -> tuple[ModelConfig, int]:
    """config.json, of a text model or of a multimodal one -> the model's settings and its vocabulary.

    Raises UserError that begins with `where` for what our model cannot be.
    """
    found = given.get("text_config", given)
    kind = found.get("model_type", given.get("model_type")) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or kind not in (PLAIN_TYPE, OURS_TYPE, "llama4" if found is not given else None):
        raise UserError(f"{where}: model_type={kind}: no Llama 4 text model")
    if "quantization_config" in {**given, **found}:
        raise UserError(f"{where}: quantization_config: its weights are quantized; take the folder of the bf16 weights")
    text = {**DEFAULTS, **found}
    for key, only in (("hidden_act", "silu"), ("attention_bias", False)):
        if text.get(key, only) != only:
            raise UserError(f"{where}: {key}={text[key]}: this model has {only} only")
    n_layers, step, interval = (
        _whole(text[key], f"{where}: {key}")
        for key in ("num_hidden_layers", "interleave_moe_layer_step", "no_rope_layer_interval")
    )
    layers = range(n_layers)
    moe = _wholes(text.get("moe_layers"), f"{where}: moe_layers")
    if moe is None:
        moe = [i for i in layers if step and (i + 1) % step == 0]
    rope = _wholes(text.get("no_rope_layers"), f"{where}: no_rope_layers")
    rope = rope[:n_layers] if rope else [int(interval == 0 or (i + 1) % interval != 0) for i in layers]
    nope = [i for i, uses in enumerate(rope) if not uses]
    values: dict[str, Any] = {ours: text[theirs] for ours, theirs in HF_CONFIG_KEYS.items()}
    values |= {
        "moe_every": moe[0] + 1 if moe else 0,
        "nope_every": nope[0] + 1 if nope else 0,
        "temperature_tuning": bool(text["attn_temperature_tuning"]),  # published ones say 4
        "attention_dropout": text.get("attention_dropout", 0.0),
        "shared_expert": text.get("shared_expert", True),
        "noisy_top_k": text.get("noisy_top_k", False),
        **_rope(text, where),
    }
    try:
        config = check(ModelConfig, "model", values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if config.moe_layers != moe:
        raise UserError(f"{where}: moe_layers={moe}: experts stand in every n-th layer here, or in none")
    if nope != [i for i in layers if not config.uses_rope(i)] or len(rope) != len(layers):
        raise UserError(f"{where}: no_rope_layers={rope}: every n-th layer is without RoPE here, or none")
    types = text.get("layer_types") or to_llama(config, 1, 1, 2, "float32")["layer_types"]
    if types != to_llama(config, 1, 1, 2, "float32")["layer_types"]:
        raise UserError(f"{where}: layer_types={types}: layers with RoPE see chunks here, those without the whole past")
    return config, _whole(text["vocab_size"], f"{where}: vocab_size", 1 << 24)


def _whole(value: Any, what: str, most: int = 4096) -> int:
    if not isinstance(value, int) or not 0 <= value <= most:
        raise UserError(f"{what}={value}: should be a whole number from 0 to {most}")
    return value


def _wholes(values: Any, what: str) -> list[int] | None:
    return None if values is None else [_whole(value, what) for value in values]


def _rope(text: Mapping[str, Any], where: str) -> dict[str, Any]:
    """rope_theta and rope_scaling from either spelling; that of version 5 goes first."""
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{where}: rope_type={kind}: this model knows default and llama3")
    rope.setdefault("original_max_position_embeddings", text["max_position_embeddings"])
    scaling = {key: rope[key] for key in SCALING if key in rope} if kind == "llama3" else None
    return {"rope_theta": rope.get("rope_theta", text["rope_theta"]), "rope_scaling": scaling}


def differences(there: ModelConfig, here: ModelConfig) -> list[str]:
    """`model.key is A there, B here` for each setting in which two models compute something else."""

    def resolved(config: ModelConfig) -> dict[str, Any]:
        values = {key: value for key, value in config.model_dump().items() if key not in TRAINING_ONLY_KEYS}
        del values["moe_every"], values["nope_every"]
        rope = [i for i in range(config.n_layers) if not config.uses_rope(i)]
        return {
            **values,
            "n_kv_heads": config.kv_heads,
            "head_dim": config.head,
            "moe_layers": config.moe_layers,
            "nope_layers": rope,
        }

    a, b = resolved(there), resolved(here)
    return [f"model.{key} is {a[key]} there, {b[key]} here" for key in a if a[key] != b[key]]
