"""How our model maps to the Hugging Face format of Llama 4: the keys of config.json, and the names of tensors.

`to_hf_config` and `from_hf_config` convert the settings. `tensor_slices` lists the tensors: each tensor of the Hugging
Face format is a run of rows of one of ours, so no tensor is ever transposed or permuted. Our fused `wqkv` is `q_proj`,
`k_proj` and `v_proj`, one below the other; our `gate_up` is `gate_proj` and `up_proj`. Both sides fuse the experts of a
layer in the same way, and in both RoPE rotates the same pairs. `export.py` and `importer.py` use these functions.

This module imports neither torch nor transformers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from data.settings import UserError, check
from model.config import ModelConfig, RopeScaling

# "Plain" is Llama 4 as transformers defines it. "Biased" is the class in modeling_llama4_biased.py, which adds what
# plain Llama 4 cannot express: the balance bias, the noise of noisy_top_k, and MoE layers without a shared expert.
PLAIN_CLASS, BIASED_CLASS = "Llama4ForCausalLM", "Llama4BiasedForCausalLM"
PLAIN_MODEL_TYPE, BIASED_MODEL_TYPE = "llama4_text", "llama4_text_biased"
MULTIMODAL_MODEL_TYPE = "llama4"  # config.json then holds the text model under `text_config`
MODELING_MODULE = "modeling_llama4_biased"

# Each key of ModelConfig is in exactly one of the next three tables, or in BEYOND_LLAMA4 of model/config.py; a test
# checks this. A model is not exported if a key that is in none of the three has another value than the default
# (`not_exportable`).

# Keys of ModelConfig that have one counterpart with the same meaning in config.json.
HF_CONFIG_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",  # written as a number; null means n_heads
    "head_dim": "head_dim",  # written as a number; null means dim / n_heads
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
# Keys of ModelConfig that `to_hf_config` and `from_hf_config` convert, and the keys of config.json that hold them.
CONVERTED_KEYS = {
    "moe_every": ("interleave_moe_layer_step", "moe_layers"),
    "nope_every": ("no_rope_layer_interval", "no_rope_layers", "layer_types"),
    "rope_theta": ("rope_theta", "rope_parameters"),
    "rope_scaling": ("rope_scaling", "rope_parameters"),
    "shared_expert": ("shared_expert",),  # in the config of the biased class only
    "noisy_top_k": ("noisy_top_k",),  # in the config of the biased class only
}
# Keys of ModelConfig that act in training only. Llama 4 has keys for two of them, attention_dropout and
# router_aux_loss_coef (aux_loss_weight), so an export states these two.
TRAINING_ONLY_KEYS = {
    "dropout",
    "attention_dropout",
    "balance_rate",
    "balance_until",
    "aux_loss_weight",
    "z_loss_weight",
}

# Two models with the same weights compute the same numbers if they differ in these keys only.
MAY_DIFFER_KEYS = TRAINING_ONLY_KEYS | {"max_seq_len"}

# The value that transformers uses for a key that config.json omits.
HF_DEFAULTS: dict[str, Any] = {
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

# Limits for the numbers in a config.json, which may come from anywhere; checked before a list of that length is made.
MAX_LAYERS = 4096
MAX_VOCAB_SIZE = 1 << 24


@dataclass(frozen=True)
class TensorSlice:
    """Rows of one of our tensors that are one whole tensor in the Hugging Face format.

    The rows from `start` up to `stop` of our tensor `name` are the tensor `hf_name`, which has the shape `shape`.
    """

    name: str
    hf_name: str
    shape: tuple[int, ...]
    start: int = 0
    is_plain: bool = True  # plain Llama 4 has this tensor; otherwise only the biased class has it

    @property
    def stop(self) -> int:
        return self.start + self.shape[0]


def not_exportable(config: ModelConfig) -> list[str]:
    """`model.KEY=VALUE` for each setting that is not the default and has no counterpart in the Hugging Face format."""
    mapped = HF_CONFIG_KEYS.keys() | CONVERTED_KEYS.keys() | TRAINING_ONLY_KEYS
    values = {key: getattr(config, key) for key in ModelConfig.model_fields if key not in mapped}
    defaults = {key: ModelConfig.model_fields[key].get_default(call_default_factory=True) for key in values}
    return [f"model.{key}={value}" for key, value in values.items() if value != defaults[key]]


def tensor_slices(config: ModelConfig, vocab_size: int) -> Iterator[TensorSlice]:
    """All tensors of a model in the Hugging Face format. Slices of the same tensor of ours follow one another."""
    c = config
    yield TensorSlice("embedding.weight", "model.embed_tokens.weight", (vocab_size, c.dim))
    for layer in range(c.n_layers):
        block, hf_layer = f"blocks.{layer}", f"model.layers.{layer}"
        yield TensorSlice(f"{block}.attention_norm.weight", f"{hf_layer}.input_layernorm.weight", (c.dim,))
        yield from _attention_slices(c, f"{block}.attention", f"{hf_layer}.self_attn")
        yield TensorSlice(f"{block}.feed_forward_norm.weight", f"{hf_layer}.post_attention_layernorm.weight", (c.dim,))
        if c.is_moe(layer):
            yield from _moe_slices(c, f"{block}.feed_forward", f"{hf_layer}.feed_forward")
        else:
            yield from _feed_forward_slices(c.dim, c.ffn_dim, f"{block}.feed_forward", f"{hf_layer}.feed_forward")
    yield TensorSlice("head.norm.weight", "model.norm.weight", (c.dim,))
    if not c.tie_embeddings:
        yield TensorSlice("head.weight", "lm_head.weight", (vocab_size, c.dim))


def _attention_slices(c: ModelConfig, name: str, hf_name: str) -> Iterator[TensorSlice]:
    q_rows, kv_rows = c.n_heads * c.head, c.kv_heads * c.head
    start = 0
    for letter, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
        yield TensorSlice(f"{name}.wqkv", f"{hf_name}.{letter}_proj.weight", (rows, c.dim), start)
        start += rows
    yield TensorSlice(f"{name}.wo", f"{hf_name}.o_proj.weight", (c.dim, q_rows))


def _feed_forward_slices(dim: int, hidden: int, name: str, hf_name: str) -> Iterator[TensorSlice]:
    yield TensorSlice(f"{name}.gate_up", f"{hf_name}.gate_proj.weight", (hidden, dim))
    yield TensorSlice(f"{name}.gate_up", f"{hf_name}.up_proj.weight", (hidden, dim), start=hidden)
    yield TensorSlice(f"{name}.down", f"{hf_name}.down_proj.weight", (dim, hidden))


def _moe_slices(c: ModelConfig, name: str, hf_name: str) -> Iterator[TensorSlice]:
    router, hf_router = f"{name}.router", f"{hf_name}.router"
    yield TensorSlice(f"{router}.weight", f"{hf_router}.weight", (c.n_experts, c.dim))
    if c.noisy_top_k:
        yield TensorSlice(f"{router}.noise", f"{hf_router}.noise", (c.n_experts, c.dim), is_plain=False)
    yield TensorSlice(f"{router}.bias", f"{hf_router}.balance_bias", (c.n_experts,), is_plain=False)
    gate_up_shape, down_shape = (c.n_experts, c.dim, 2 * c.expert_dim), (c.n_experts, c.expert_dim, c.dim)
    yield TensorSlice(f"{name}.experts.gate_up", f"{hf_name}.experts.gate_up_proj", gate_up_shape)
    yield TensorSlice(f"{name}.experts.down", f"{hf_name}.experts.down_proj", down_shape)
    if c.shared_expert:
        yield from _feed_forward_slices(c.dim, c.expert_dim, f"{name}.shared", f"{hf_name}.shared_expert")


def tensor_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of each of our tensors, by name."""
    shapes = {}
    for name, group in groupby(tensor_slices(config, vocab_size), key=lambda entry: entry.name):
        slices = list(group)
        shapes[name] = (slices[-1].stop, *slices[0].shape[1:])
    return shapes


def to_hf_config(
    config: ModelConfig, vocab_size: int, bos: int, eos: int, dtype: str, plain: bool = True
) -> dict[str, Any]:
    """The content of config.json for a model, of the plain class or of the biased one.

    It lists the layers one by one, and spells the RoPE settings as transformers does since version 5 and as it did
    before, because other tools read one or the other.
    """
    c = config
    values = {**c.model_dump(), "n_kv_heads": c.kv_heads, "head_dim": c.head}
    rope_scaling = None if c.rope_scaling is None else {"rope_type": "llama3", **c.rope_scaling.model_dump()}
    result = {
        "architectures": [PLAIN_CLASS if plain else BIASED_CLASS],
        "model_type": PLAIN_MODEL_TYPE if plain else BIASED_MODEL_TYPE,
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": vocab_size,
        **{hf_key: values[key] for key, hf_key in HF_CONFIG_KEYS.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": c.attention_dropout,
        "interleave_moe_layer_step": c.moe_every,
        "moe_layers": c.moe_layers,
        "no_rope_layer_interval": c.nope_every or c.n_layers + 1,  # transformers divides by it, so it cannot be 0
        "no_rope_layers": [int(c.uses_rope(layer)) for layer in range(c.n_layers)],  # despite the name: 1 is RoPE
        "layer_types": _layer_types(c),
        "rope_theta": c.rope_theta,
        "rope_scaling": rope_scaling,
        "rope_parameters": {**(rope_scaling or {"rope_type": "default"}), "rope_theta": c.rope_theta},
        "output_router_logits": False,
        "router_aux_loss_coef": c.aux_loss_weight,
        "router_jitter_noise": 0.0,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    if not plain:
        result["auto_map"] = {
            "AutoConfig": f"{MODELING_MODULE}.Llama4BiasedConfig",
            "AutoModelForCausalLM": f"{MODELING_MODULE}.{BIASED_CLASS}",
        }
        result["shared_expert"] = c.shared_expert
        result["noisy_top_k"] = c.noisy_top_k
        # The old spelling serves tools other than transformers, and none of those can load the biased class.
        del result["rope_theta"], result["rope_scaling"]
    return result


def _layer_types(config: ModelConfig) -> list[str]:
    """The attention of each layer, as config.json names it."""
    chunked = [config.uses_rope(layer) and config.attention_chunk is not None for layer in range(config.n_layers)]
    return ["chunked_attention" if is_chunked else "full_attention" for is_chunked in chunked]


def from_hf_config(content: Mapping[str, Any], where: str) -> tuple[ModelConfig, int]:
    """The settings and the vocabulary size of the model that the content of a config.json describes.

    Accepts the config of a text model, and that of a multimodal model, whose text model is in `text_config`. Raises
    UserError, which begins with `where`, if our model cannot be such a model.
    """
    text = {**HF_DEFAULTS, **_text_section(content, where)}
    for key, supported in (("hidden_act", "silu"), ("attention_bias", False)):
        if text.get(key, supported) != supported:
            raise UserError(f"{where}: {key}={text[key]}: not supported; the only supported value is {supported}")
    moe_layers = _moe_layers(text, where)
    uses_rope = _uses_rope(text, where)
    values: dict[str, Any] = {key: text[hf_key] for key, hf_key in HF_CONFIG_KEYS.items()}
    values |= {
        "moe_every": moe_layers[0] + 1 if moe_layers else 0,
        "nope_every": uses_rope.index(False) + 1 if False in uses_rope else 0,
        "temperature_tuning": bool(text["attn_temperature_tuning"]),  # 4 in published configs
        "attention_dropout": text.get("attention_dropout", 0.0),
        "shared_expert": text.get("shared_expert", True),
        "noisy_top_k": text.get("noisy_top_k", False),
        **_rope_values(text, where),
    }
    try:
        config = check(ModelConfig, "model", values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    _check_layers(config, text, moe_layers, uses_rope, where)
    return config, _integer(text["vocab_size"], f"{where}: vocab_size", MAX_VOCAB_SIZE)


def _text_section(content: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The section of config.json that describes the text model. Raises UserError if it is not a Llama 4 model."""
    is_multimodal = "text_config" in content
    text = content["text_config"] if is_multimodal else content
    if not isinstance(text, Mapping):
        raise UserError(f"{where}: text_config={text}: should be a JSON object")
    model_type = text.get("model_type", content.get("model_type"))
    # the config of a text model may omit its type
    accepted = (PLAIN_MODEL_TYPE, BIASED_MODEL_TYPE, MULTIMODAL_MODEL_TYPE if is_multimodal else None)
    if model_type not in accepted:
        raise UserError(f"{where}: model_type={model_type}: not a Llama 4 text model ({PLAIN_MODEL_TYPE})")
    if "quantization_config" in content or "quantization_config" in text:
        raise UserError(f"{where}: quantization_config: quantized weights are not supported; use the bf16 weights")
    return text


def _moe_layers(text: Mapping[str, Any], where: str) -> list[int]:
    """The numbers of the layers that hold experts."""
    n_layers = _integer(text["num_hidden_layers"], f"{where}: num_hidden_layers")
    step = _integer(text["interleave_moe_layer_step"], f"{where}: interleave_moe_layer_step")
    if text.get("moe_layers") is not None:
        return _integers(text["moe_layers"], f"{where}: moe_layers")
    return [layer for layer in range(n_layers) if step and (layer + 1) % step == 0]


def _uses_rope(text: Mapping[str, Any], where: str) -> list[bool]:
    """Whether each layer uses RoPE. If `no_rope_layers` is empty, as in published configs, the interval decides."""
    n_layers = _integer(text["num_hidden_layers"], f"{where}: num_hidden_layers")
    interval = _integer(text["no_rope_layer_interval"], f"{where}: no_rope_layer_interval")
    if text.get("no_rope_layers"):
        flags = _integers(text["no_rope_layers"], f"{where}: no_rope_layers")
        return [flag != 0 for flag in flags[:n_layers]]
    return [interval == 0 or (layer + 1) % interval != 0 for layer in range(n_layers)]


def _rope_values(text: Mapping[str, Any], where: str) -> dict[str, Any]:
    """rope_theta and rope_scaling of ModelConfig. `rope_parameters` (transformers 5) wins over the older spelling."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{where}: rope_parameters={rope}: should be a JSON object")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise UserError(f"{where}: rope_type={rope_type}: not supported; the supported types are default and llama3")
    scaling = None
    if rope_type == "llama3":
        given = {"original_max_position_embeddings": text["max_position_embeddings"], **rope}
        scaling = {key: given[key] for key in RopeScaling.model_fields if key in given}
    return {"rope_theta": rope.get("rope_theta", text["rope_theta"]), "rope_scaling": scaling}


def _check_layers(
    config: ModelConfig, text: Mapping[str, Any], moe_layers: list[int], uses_rope: list[bool], where: str
) -> None:
    """Raises UserError if the layers that a config.json lists are not those of `config`.

    Our model has experts, and layers without RoPE, at regular intervals only.
    """
    if config.moe_layers != moe_layers:
        raise UserError(
            f"{where}: moe_layers={moe_layers}: not supported; experts must be in every n-th layer, or in no layer"
        )
    if uses_rope != [config.uses_rope(layer) for layer in range(config.n_layers)]:
        raise UserError(
            f"{where}: no_rope_layers={[int(flag) for flag in uses_rope]}: not supported; every n-th layer must be "
            "without RoPE, or no layer"
        )
    layer_types = text.get("layer_types") or _layer_types(config)
    if layer_types != _layer_types(config):
        raise UserError(
            f"{where}: layer_types={layer_types}: not supported; layers with RoPE must attend within chunks, and "
            "layers without RoPE to all earlier tokens"
        )


def _integer(value: Any, what: str, most: int = MAX_LAYERS) -> int:
    if not isinstance(value, int) or not 0 <= value <= most:
        raise UserError(f"{what}={value}: should be an integer from 0 to {most}")
    return value


def _integers(values: Any, what: str) -> list[int]:
    if not isinstance(values, list):
        raise UserError(f"{what}={values}: should be a list of integers")
    return [_integer(value, what) for value in values]


def differences(found: ModelConfig, config: ModelConfig) -> list[str]:
    """`model.KEY is A there, B here` for each setting that makes two models compute other numbers.

    `found` is the model of an existing folder ("there"), `config` the one that is to be built ("here").
    """
    there, here = _resolved(found), _resolved(config)
    return [f"model.{key} is {there[key]} there, {here[key]} here" for key in there if there[key] != here[key]]


def _resolved(config: ModelConfig) -> dict[str, Any]:
    """The settings that decide what a model computes, so that two spellings of the same model are equal."""
    values = {key: value for key, value in config.model_dump().items() if key not in MAY_DIFFER_KEYS}
    del values["moe_every"], values["nope_every"]
    values["n_kv_heads"] = config.kv_heads
    values["head_dim"] = config.head
    values["moe_layers"] = config.moe_layers
    values["nope_layers"] = [layer for layer in range(config.n_layers) if not config.uses_rope(layer)]
    return values
