"""Files in the Hugging Face format: they hold what was written, and nothing in them is trusted when they are read."""

import json
import os
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.settings import UserError
from model.config import BEYOND_LLAMA4, ModelConfig, RopeScaling
from model.transformer import Transformer
from trainer.hub import mapping
from trainer.hub.files import Folder, ShardTensor, write_json, write_shards
from trainer.hub.importer import HFCheckpoint
from trainer.hub.mapping import (
    CONVERTED_KEYS,
    HF_CONFIG_KEYS,
    MAY_DIFFER_KEYS,
    TRAINING_ONLY_KEYS,
    differences,
    from_hf_config,
    not_exportable,
    tensor_shapes,
    tensor_slices,
    to_hf_config,
)

SMALL_MODEL = ModelConfig(
    dim=16, n_heads=4, n_kv_heads=2, n_layers=2, n_experts=3, expert_dim=12, ffn_dim=20, moe_every=2
)


def test_files_hold_the_tensors_within_the_size_limit(tmp_path):
    """Tensors of two dtypes. Only a tensor that is larger than the limit by itself exceeds it, in its own file."""
    sizes = {"a": (torch.bfloat16, 3), "b": (torch.float32, 5), "c": (torch.bfloat16, 1), "d": (torch.float32, 100)}
    tensors = {name: torch.arange(float(n))[:, None].expand(n, 2) for name, (_, n) in sizes.items()}
    entries = [ShardTensor(name, dtype, (n, 2)) for name, (dtype, n) in sizes.items()]
    assert write_shards(tmp_path, entries, iter(tensors.items()), 60) == 2
    (tmp_path / "config.json").write_text("{}")
    folder = Folder(tmp_path)
    assert folder.shapes == {name: (n, 2) for name, (_, n) in sizes.items()}
    for path in tmp_path.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert tensor.dtype == sizes[name][0] and torch.equal(tensor.float(), tensors[name])
    assert torch.equal(folder.read("d", [(3, 8), (1, 2)]), tensors["d"][3:8, 1:2])


def change_folder(folder, change):
    """Call `change(folder, weight_map)`, and write the weight map, which it may have changed, to the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    change(folder, index["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def add_file(folder, weight_map, header_size, header=b"{}"):
    """Add a file that claims a header of `header_size` bytes."""
    (folder / "extra.safetensors").write_bytes(header_size.to_bytes(8, "little") + header)
    weight_map.update(x="extra.safetensors")


def add_link(folder, weight_map, target):
    os.symlink(target, folder / "link.safetensors")
    weight_map.update(x="link.safetensors")


def add_tensor(folder, weight_map, name, tensor):
    save_file({name: tensor}, folder / "extra.safetensors")
    weight_map.update(x="extra.safetensors")


def replace_tensor(folder, weight_map, name, tensor):
    """Replace the tensor `name`, or remove it if `tensor` is None."""
    path = folder / weight_map[name]
    tensors = load_file(path)
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, path)


NORM = "model.norm.weight"
TOO_LARGE = b'{"x":{"dtype":"F32","shape":[9999999],"data_offsets":[0,39999996]}}'[:66]
FAULTS = {  # what is wrong, how to make it so, and the error
    "names a file in another folder": (
        lambda f, m: m.update(x="../x.safetensors"),
        "'../x.safetensors' is not a plain file name",
    ),
    "names a file by an absolute path": (
        lambda f, m: m.update(x="/etc/passwd"),
        "'/etc/passwd' is not a plain file name",
    ),
    "names the parent folder": (lambda f, m: m.update(x=".."), "'..' is not a plain file name"),
    "names a missing file": (lambda f, m: m.update(x="y.safetensors"), "y.safetensors: no such file"),
    "maps a tensor to a number": (lambda f, m: m.update(x=3), "weight_map is missing, or does not map"),
    "has a link to another folder": (
        lambda f, m: add_link(f, m, "/etc/hostname"),
        "link.safetensors: a link to a file outside of the folder",
    ),
    "has a header of impossible size": (lambda f, m: add_file(f, m, 1 << 62), "cannot be read as safetensors"),
    "has a header longer than its file": (lambda f, m: add_file(f, m, 5000), "cannot be read as safetensors"),
    "has a tensor longer than its file": (lambda f, m: add_file(f, m, 66, TOO_LARGE), "cannot be read as safetensors"),
    "lacks a tensor": (lambda f, m: replace_tensor(f, m, NORM, None), f"tensor {NORM} is missing"),
    "has a tensor of a wrong shape": (
        lambda f, m: replace_tensor(f, m, NORM, torch.ones(17)),
        f"tensor {NORM} has shape (17,), but config.json requires (16,)",
    ),
    "has a tensor too many": (
        lambda f, m: add_tensor(f, m, "model.layers.0.self_attn.q_proj.bias", torch.ones(4)),
        "tensor model.layers.0.self_attn.q_proj.bias is not part of the model that config.json describes",
    ),
    "has the same tensor twice": (lambda f, m: add_tensor(f, m, NORM, torch.ones(16)), f"tensor {NORM} is also in"),
    "has integer weights": (
        lambda f, m: replace_tensor(f, m, NORM, torch.ones(16, dtype=torch.int32)),
        f"tensor {NORM} has dtype I32",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a model of random weights, in several files."""
    folder = tmp_path_factory.mktemp("good") / "out"
    folder.mkdir()
    write_json(folder / "config.json", to_hf_config(SMALL_MODEL, 37, 1, 2, "float32"))
    plain = [part for part in tensor_slices(SMALL_MODEL, 37) if part.is_plain]
    entries = [ShardTensor(part.hf_name, torch.float32, part.shape) for part in plain]
    write_shards(folder, entries, ((part.hf_name, torch.randn(part.shape)) for part in plain), 5_000)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_is_refused_if_it(good, tmp_path, fault):
    change, message = FAULTS[fault]
    folder = shutil.copytree(good, tmp_path / "out")
    change_folder(folder, change)
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        checkpoint = HFCheckpoint(folder)
        checkpoint.fill(Transformer(checkpoint.model, checkpoint.vocab_size))
    assert "\n" not in str(refusal.value) and str(folder) in str(refusal.value)


def test_links_within_the_hub_cache_are_followed(good, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1234", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(good.iterdir()):
        shutil.copy(path, blobs / str(number))
        os.symlink(f"../../blobs/{number}", snapshot / path.name)
    assert HFCheckpoint(snapshot).vocab_size == 37


def test_no_pickle_is_loaded_and_no_code_is_run(good, tmp_path):
    """The folder has files that would write a file `trace` if they were loaded."""
    folder, trace = shutil.copytree(good, tmp_path / "out"), tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w').close()"
    (folder / "modeling_llama4_biased.py").write_text(code)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(RunsWhenLoaded(code)))
    HFCheckpoint(folder)
    for path in folder.glob("model*"):
        path.unlink()
    with pytest.raises(UserError, match="model.safetensors: no such file"):
        HFCheckpoint(folder)
    assert not trace.exists()


class RunsWhenLoaded:
    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model_type=llama: not a Llama 4 text model"),
        ({"text_config": 3}, "text_config=3: should be a JSON object"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu: not supported; the only supported value is silu"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"quantization_config": {}}, "quantized weights are not supported"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000: should be an integer"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers=many: should be an integer"),
        ({"moe_layers": [0, 1]}, "moe_layers=[0, 1]: not supported; experts must be in every n-th"),
        ({"moe_layers": ["a"]}, "moe_layers=a: should be an integer"),
        ({"moe_layers": 3}, "moe_layers=3: should be a list of integers"),
        ({"no_rope_layers": [0, 0, 1, 1]}, "no_rope_layers=[0, 0, 1, 1]: not supported; every n-th layer"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types="),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type=yarn: not supported"),
        ({"rope_parameters": 3}, "rope_parameters=3: should be a JSON object"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": -1}}, "rope_scaling"),
        ({"hidden_size": "wide"}, "model.dim=wide: should be an integer"),
        ({"hidden_size": None}, "model.dim=null"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"num_local_experts": 1, "num_experts_per_tok": 2}, "top_k=2: more than n_experts=1"),
    ],
)
def test_an_unsupported_config_is_refused_by_its_key(change, message):
    given = to_hf_config(ModelConfig(n_layers=4, moe_every=2, nope_every=4, attention_chunk=8), 99, 1, 2, "float32")
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        from_hf_config({**given, **change}, "there/config.json")
    assert str(refusal.value).startswith("there/config.json: ") and "\n" not in str(refusal.value)


def test_the_config_of_the_published_scout_is_read():
    """It has an empty no_rope_layers, rope_scaling instead of rope_parameters, and a number for a switch."""
    given = {
        "model_type": "llama4",
        "text_config": {
            "model_type": "llama4_text",
            "attention_chunk_size": 8192,
            "attn_temperature_tuning": 4,
            "head_dim": 128,
            "hidden_size": 5120,
            "interleave_moe_layer_step": 1,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "max_position_embeddings": 10485760,
            "no_rope_layers": [],
            "num_attention_heads": 40,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 48,
            "num_key_value_heads": 8,
            "num_local_experts": 16,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "use_qk_norm": True,
            "rope_scaling": {
                "factor": 16.0,
                "high_freq_factor": 1.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "vocab_size": 202048,
        },
    }
    config, vocab_size = from_hf_config(given, "config.json")
    total, active = config.parameter_counts(vocab_size)
    assert round(total / 1e9, 1) == 107.8 and round(active / 1e9, 1) == 17.2
    assert config.nope_every == 4 and config.moe_layers == list(range(48)) and config.temperature_tuning
    assert config.rope_scaling == RopeScaling(factor=16, high_freq_factor=1)


@pytest.mark.parametrize("keys", [{}, {"moe_every": 0}, {"nope_every": 0, "rope_scaling": RopeScaling(factor=3)}])
def test_settings_survive_the_way_to_config_json_and_back(keys):
    config = ModelConfig(
        **{"n_layers": 5, "moe_every": 2, "nope_every": 3, "n_kv_heads": 2, "attention_chunk": 7, **keys}
    )
    for plain in (True, False):
        found, vocab_size = from_hf_config(to_hf_config(config, 77, 1, 2, "float32", plain), "x")
        assert not differences(found, config) and vocab_size == 77
        assert tensor_shapes(found, 77) == tensor_shapes(config, 77)


def test_each_model_setting_is_in_one_table_of_the_mapping():
    """A new setting must be exported, listed as one that acts in training only, or listed in BEYOND_LLAMA4."""
    keys = [*HF_CONFIG_KEYS, *CONVERTED_KEYS, *TRAINING_ONLY_KEYS, *BEYOND_LLAMA4]
    assert sorted(keys) == sorted(ModelConfig.model_fields)


def test_settings_in_no_table_are_not_exportable(monkeypatch):
    """Unless they have the default value, as in a model of an earlier version."""
    config = ModelConfig(**OTHER_VALUES, dropout=0.1)
    assert not not_exportable(config)
    monkeypatch.delitem(HF_CONFIG_KEYS, "qk_norm")
    monkeypatch.delitem(CONVERTED_KEYS, "rope_scaling")
    monkeypatch.setattr(mapping, "TRAINING_ONLY_KEYS", TRAINING_ONLY_KEYS - {"dropout"})
    assert not not_exportable(ModelConfig())
    assert not_exportable(config) == [
        f"model.rope_scaling={config.rope_scaling}",
        "model.qk_norm=False",
        "model.dropout=0.1",
    ]


OTHER_VALUES = dict(  # that differ from the default of each setting that decides what a model computes
    dim=32,
    n_layers=5,
    n_heads=4,
    n_kv_heads=2,
    head_dim=6,
    ffn_dim=12,
    expert_dim=20,
    n_experts=3,
    top_k=2,
    shared_expert=False,
    moe_every=2,
    rope_theta=5e5,
    rope_scaling=RopeScaling(factor=3),
    nope_every=3,
    attention_chunk=7,
    qk_norm=False,
    temperature_tuning=False,
    temperature_floor=9,
    temperature_scale=0.2,
    norm_eps=1e-6,
    tie_embeddings=True,
    noisy_top_k=True,
)


def test_each_exported_setting_is_read_back():
    config = ModelConfig(**OTHER_VALUES, max_seq_len=99)
    assert OTHER_VALUES.keys() == (HF_CONFIG_KEYS.keys() | CONVERTED_KEYS.keys()) - MAY_DIFFER_KEYS
    assert all(value != getattr(ModelConfig(), key) for key, value in OTHER_VALUES.items())
    plain = to_hf_config(config, 77, 1, 2, "float32")
    biased = to_hf_config(config, 77, 1, 2, "float32", plain=False)
    found, _ = from_hf_config(biased, "x")
    assert {key: getattr(found, key) for key in OTHER_VALUES} == OTHER_VALUES and found.max_seq_len == 99
    hf_keys = {hf_key for hf_keys in CONVERTED_KEYS.values() for hf_key in hf_keys} | set(HF_CONFIG_KEYS.values())
    assert hf_keys <= plain.keys() | biased.keys()


@pytest.mark.parametrize("keys", [{}, {"moe_every": 0}, {"noisy_top_k": True}, {"shared_expert": False}])
def test_the_mapping_lists_every_tensor_of_the_model(keys):
    config = ModelConfig(**{"dim": 8, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "moe_every": 2, **keys})
    model = Transformer(config, 11)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == tensor_shapes(config, 11)
