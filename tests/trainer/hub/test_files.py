"""Folders in the Hugging Face layout: written whole, and read without trusting anything in them."""

import json
import os
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.settings import UserError
from model.config import ModelConfig, RopeScaling
from model.transformer import Transformer
from trainer.hub.files import Entry, Folder, write_json, write_shards
from trainer.hub.importer import HFCheckpoint
from trainer.hub.mapping import differences, from_llama, pieces, to_llama, whole_shapes

SMALL = ModelConfig(dim=16, n_heads=4, n_kv_heads=2, n_layers=2, n_experts=3, expert_dim=12, ffn_dim=20, moe_every=2)


def test_files_hold_what_was_written_at_whole_places(tmp_path):
    """Of mixed types; a file has no more than the limit, but for a tensor that is larger alone."""
    sizes = {"a": (torch.bfloat16, 3), "b": (torch.float32, 5), "c": (torch.bfloat16, 1), "d": (torch.float32, 100)}
    tensors = {name: torch.arange(float(n))[:, None].expand(n, 2) for name, (_, n) in sizes.items()}
    entries = [Entry(name, dtype, (n, 2)) for name, (dtype, n) in sizes.items()]
    assert write_shards(tmp_path, entries, iter(tensors.items()), 60) == 2
    folder = Folder(tmp_path) if (tmp_path / "config.json").write_text("{}") else None
    assert folder.shapes == {name: (n, 2) for name, (_, n) in sizes.items()}
    for path in tmp_path.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert tensor.dtype == sizes[name][0] and torch.equal(tensor.float(), tensors[name])
    assert torch.equal(folder.read("d", [(3, 8), (1, 2)]), tensors["d"][3:8, 1:2])


def broken(folder, change):
    """A copy of a folder in which `change(folder, index)` did something."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    change(folder, index["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def header(folder, length, text=b"{}"):
    (folder / "extra.safetensors").write_bytes(length.to_bytes(8, "little") + text)


def link(path, to):
    os.symlink(to, path)
    return path.name


def retensor(folder, index, name, tensor):
    """Another tensor of that name, or none."""
    path = folder / index[name]
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors if tensor is None else {**tensors, name: tensor}, path)


NORM = "model.norm.weight"
BROKEN = {
    "names a file outside": (lambda f, i: i.update(x="../x.safetensors"), "'../x.safetensors' is no plain file name"),
    "names a file by its whole path": (lambda f, i: i.update(x="/etc/passwd"), "'/etc/passwd' is no plain file name"),
    "names its own folder": (lambda f, i: i.update(x=".."), "'..' is no plain file name"),
    "names a file that is not there": (lambda f, i: i.update(x="y.safetensors"), "y.safetensors: no such file"),
    "has a link out": (
        lambda f, i: i.update(x=link(f / "z.safetensors", "/etc/hostname")),
        "z.safetensors: a link that leads out of the folder",
    ),
    "has a header beyond all size": (
        lambda f, i: (header(f, 1 << 62), i.update(x="extra.safetensors")),
        "cannot be read as safetensors",
    ),
    "has a header beyond its file": (
        lambda f, i: (header(f, 5000), i.update(x="extra.safetensors")),
        "cannot be read as safetensors",
    ),
    "has tensors beyond its file": (
        lambda f, i: (
            header(f, 66, b'{"x":{"dtype":"F32","shape":[9999999],"data_offsets":[0,39999996]}}'[:66]),
            i.update(x="extra.safetensors"),
        ),
        "cannot be read as safetensors",
    ),
    "lacks a tensor": (lambda f, i: retensor(f, i, NORM, None), f"{NORM} is missing"),
    "has a wrong shape": (
        lambda f, i: retensor(f, i, NORM, torch.ones(17)),
        f"{NORM} has shape (17,), config.json says (16,)",
    ),
    "has a tensor more": (
        lambda f, i: (
            save_file({"model.layers.0.self_attn.q_proj.bias": torch.ones(4)}, f / "e.safetensors"),
            i.update(x="e.safetensors"),
        ),
        "model.layers.0.self_attn.q_proj.bias has no place in this model",
    ),
    "has whole numbers": (
        lambda f, i: retensor(f, i, NORM, torch.ones(16, dtype=torch.int32)),
        f"{NORM} is I32",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder in several files, of a model with random weights."""
    folder = tmp_path_factory.mktemp("good") / "out"
    folder.mkdir()
    write_json(folder / "config.json", to_llama(SMALL, 37, 1, 2, "float32"))
    plain = [piece for piece in pieces(SMALL, 37) if piece.plain]
    entries = [Entry(piece.theirs, torch.float32, piece.shape) for piece in plain]
    write_shards(folder, entries, ((p.theirs, torch.randn(p.shape)) for p in plain), 5_000)
    return folder


@pytest.mark.parametrize("how", BROKEN)
def test_a_folder_is_refused_that(good, tmp_path, how):
    change, message = BROKEN[how]
    folder = shutil.copytree(good, tmp_path / "out")
    broken(folder, change)
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        theirs = HFCheckpoint(folder)
        theirs.fill(Transformer(theirs.model, theirs.vocab_size))
    assert "\n" not in str(refusal.value) and str(folder) in str(refusal.value)


def test_links_of_the_hubs_own_cache_are_followed(good, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1234", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for number, path in enumerate(good.iterdir()):
        shutil.copy(path, blobs / str(number))
        os.symlink(f"../../blobs/{number}", snapshot / path.name)
    assert HFCheckpoint(snapshot).vocab_size == 37


def test_no_pickle_and_no_code_is_run(good, tmp_path):
    """Files that would leave a trace if they were loaded."""
    folder, trace = shutil.copytree(good, tmp_path / "out"), tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w').close()"
    (folder / "modeling_llama4_biased.py").write_text(code)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Run(code)))
    HFCheckpoint(folder)
    for path in folder.glob("model*"):
        path.unlink()
    with pytest.raises(UserError, match="model.safetensors: no such file"):
        HFCheckpoint(folder)
    assert not trace.exists()


class Run:
    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model_type=llama: no Llama 4 text model"),
        ({"text_config": 3}, "no Llama 4 text model"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu: this model has silu only"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"quantization_config": {}}, "its weights are quantized"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000: should be a whole number"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers=many: should be a whole number"),
        ({"moe_layers": [0, 1]}, "moe_layers=[0, 1]: experts stand in every n-th layer"),
        ({"moe_layers": ["a"]}, "moe_layers=a: should be a whole number"),
        ({"no_rope_layers": [0, 0, 1, 1]}, "no_rope_layers=[0, 0, 1, 1]: every n-th layer is without RoPE"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types="),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type=yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": -1}}, "rope_scaling"),
        ({"hidden_size": "wide"}, "model.dim=wide: should be an integer"),
        ({"hidden_size": None}, "model.dim=null"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"num_local_experts": 1, "num_experts_per_tok": 2}, "top_k=2: more than n_experts=1"),
    ],
)
def test_what_our_model_cannot_be_is_refused_by_its_key(change, message):
    given = to_llama(ModelConfig(n_layers=4, moe_every=2, nope_every=4, attention_chunk=8), 99, 1, 2, "float32")
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        from_llama({**given, **change}, "there/config.json")
    assert str(refusal.value).startswith("there/config.json: ") and "\n" not in str(refusal.value)


def test_published_spellings_of_the_config_are_read():
    """The keys of Llama 4 Scout's config.json: an empty no_rope_layers, rope_scaling, numbers for switches."""
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
    config, vocab_size = from_llama(given, "config.json")
    total, active = config.parameter_counts(vocab_size)
    assert round(total / 1e9, 1) == 107.8 and round(active / 1e9, 1) == 17.2
    assert config.nope_every == 4 and config.moe_layers == list(range(48)) and config.temperature_tuning
    assert config.rope_scaling == RopeScaling(factor=16, high_freq_factor=1)


@pytest.mark.parametrize("keys", [{}, {"moe_every": 0}, {"nope_every": 0, "rope_scaling": RopeScaling(factor=3)}])
def test_settings_come_back(keys):
    config = ModelConfig(
        **{"n_layers": 5, "moe_every": 2, "nope_every": 3, "n_kv_heads": 2, "attention_chunk": 7, **keys}
    )
    for plain in (True, False):
        back, vocab_size = from_llama(to_llama(config, 77, 1, 2, "float32", plain), "x")
        assert not differences(back, config) and vocab_size == 77
        assert whole_shapes(back, 77) == whole_shapes(config, 77)


@pytest.mark.parametrize("keys", [{}, {"moe_every": 0}, {"noisy_top_k": True}, {"shared_expert": False}])
def test_the_table_of_names_has_every_tensor_of_the_model(keys):
    config = ModelConfig(**{"dim": 8, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "moe_every": 2, **keys})
    model = Transformer(config, 11)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == whole_shapes(config, 11)
