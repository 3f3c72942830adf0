"""Export to the Hugging Face format and import from it: transformers computes the same numbers from every tensor."""

import json
import weakref

import pytest
import torch

from data.settings import UserError
from data.shards import Corpus
from model.config import ModelConfig, RopeScaling
from model.moe import Router
from model.transformer import Transformer
from parallel.mesh import World
from tests.support import run_cases as cases
from trainer.checkpoint.load import load_model, weights_digest
from trainer.evaluation import evaluate
from trainer.generate import Sampling, generate
from trainer.hub.__main__ import main
from trainer.hub.export import CheckpointWeights
from trainer.hub.importer import HFCheckpoint, initial_weights
from trainer.hub.mapping import HF_CONFIG_KEYS, differences, tensor_slices, to_hf_config
from trainer.step import train_step

transformers = pytest.importorskip("transformers", reason="the extra `hub` is not installed")
UNUSUAL = ["model.n_kv_heads=1", "model.head_dim=6", "model.ffn_dim=20", "model.attention_chunk=8", "model.n_layers=3"]
UNUSUAL += ["model.temperature_floor=4", "model.expert_dim=12", "train.steps=2", "checkpoint.keep=1"]
KINDS = {  # settings of a run, and the parts of its model that plain Llama 4 cannot express
    "plain": (["model.balance_rate=0", "model.moe_every=2", "model.top_k=2"], []),
    "tied": (["model.balance_until=0", "model.tie_embeddings=true", "model.nope_every=0"], []),
    "dense": (["model.moe_every=0"], []),
    "biased": (["model.balance_rate=0.05"], ["balance bias"]),
    "all": (
        ["model.shared_expert=false", "model.noisy_top_k=true", "model.top_k=2"],
        ["balance bias", "noise matrices", "shared expert"],
    ),
}


@pytest.fixture(autouse=True)
def module_cache(tmp_path, monkeypatch):
    """transformers copies the modelling files that it runs to a cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(scope="module")
def runs(pool, corpus_dir, tmp_path_factory):
    """A run of each kind; the checkpoints of two are written by four processes that share the experts."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (more, _) in KINDS.items():
        words = [*UNUSUAL, *more, f"run.name={name}"]
        if name in ("plain", "all"):
            pool.run(
                4, "tests.support.run_cases:run_in_pool", 300, corpus=str(corpus_dir), runs=str(folder), more=words
            )
        else:
            cases.run(corpus_dir, folder, *words)
    return folder


def export(source, out, *more):
    assert main(["export", "--checkpoint", str(source), "--out", str(out), *more]) == 0
    return out


def load_in_transformers(folder, code=False, **keys):
    """The model of a folder in transformers, which must find each tensor that it needs and use each that is there."""
    auto = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True, trust_remote_code=code, **keys)
    assert not any(info.values()), info
    return model.eval()


def assert_same_logits(model, hf_model, atol=2e-5):
    tokens = torch.randint(4, model.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hf_model(tokens).logits, model.eval()(tokens).logits, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_logits_of_our_model(runs, tmp_path, capsys, kind):
    not_expressible = KINDS[kind][1]
    is_biased = bool(not_expressible)
    out = export(runs / kind, tmp_path / "out", "--shard-size", "30KB")
    printed = capsys.readouterr().out
    assert all(part in printed for part in not_expressible)
    assert ("plain Llama 4, which expresses all of this model" in printed) == (not is_biased)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Llama4BiasedForCausalLM" if is_biased else "Llama4ForCausalLM"]
    assert (out / "modeling_llama4_biased.py").exists() == is_biased
    hf_model = load_in_transformers(out, code=is_biased)
    model, tokenizer, _ = load_model(runs / kind)
    assert_same_logits(model, hf_model)
    text = "Once  Tom <s>\n\u2581\U0001f600"
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=is_biased)
    assert hf_tokenizer(text).input_ids == [tokenizer.bos, *tokenizer.encode(text)]
    assert hf_model.generation_config.eos_token_id == tokenizer.eos == hf_model.config.eos_token_id
    assert not list(out.parent.glob(".*partial"))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "biased"])
def test_transformers_writes_the_same_greedy_stories(runs, tmp_path, kind):
    """200 tokens beyond the end of a chunk, for the first prompt whose story does not depend on rounding."""
    hf_model = load_in_transformers(export(runs / kind, tmp_path / "out", "--batches", "none"), code=kind == "biased")
    model, tokenizer, config = load_model(runs / kind)
    excluded = sorted({tokenizer.bos, tokenizer.pad, tokenizer.unk})
    length = 200 + 2 * config.model.attention_chunk
    for number in range(50):
        prompt = f"Tom had {number} cats"
        ids = [tokenizer.bos, *tokenizer.encode(prompt)]
        story = list(generate(model, tokenizer, prompt, Sampling(length, temperature=0)))
        if len(story) == length and smallest_margin(model, ids + story, len(ids), excluded) > 1e-4:
            break
    else:
        pytest.fail("the story of each prompt depends on rounding")
    made = hf_model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=length,
        do_sample=False,
        suppress_tokens=excluded,
    )
    assert made[0, len(ids) :].tolist() == story and len(set(story)) > 3


def smallest_margin(model, ids, first, excluded):
    """The smallest difference between the logits of the two likeliest tokens, from position `first` on.

    0 if rounding could change which experts a token is sent to.
    """
    gaps = []
    hooks = [
        module.register_forward_hook(lambda router, inputs, _: gaps.append(cases.smallest_score_gap(router, *inputs)))
        for module in model.modules()
        if isinstance(module, Router)
    ]
    logits = model(torch.tensor([ids[:-1]])).logits[0, first - 1 :]
    for hook in hooks:
        hook.remove()
    if min(gaps) <= 2e-6:
        return 0.0
    logits[:, excluded] = -torch.inf
    likeliest = logits.topk(2).values
    return float((likeliest[:, 0] - likeliest[:, 1]).min())


def test_a_biased_export_is_refused_without_trusted_code(runs, tmp_path):
    """Otherwise it would be loaded as another model."""
    out = export(runs / "biased", tmp_path / "out", "--batches", "none")
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(out)


def test_the_flag_plain_exports_llama_4_without_the_bias(runs, tmp_path, capsys):
    out = export(runs / "biased", tmp_path / "out", "--plain", "--batches", "none")
    assert "plain Llama 4 because of --plain, without the balance bias" in capsys.readouterr().out
    model, _, _ = load_model(runs / "biased")
    for router in model.modules():
        if isinstance(router, Router):
            router.bias.zero_()
    assert_same_logits(model, load_in_transformers(out))
    with pytest.raises(UserError, match="--plain: Llama 4 has a shared expert"):
        export(runs / "all", tmp_path / "other", "--plain")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_the_tokens_that_the_bias_sends_elsewhere_are_counted(runs, tmp_path, capsys):
    """Compared with a loop: the experts of each token with and without the bias, for inputs computed with the bias."""
    export(runs / "biased", tmp_path / "out", "--batches", "2")
    printed = capsys.readouterr().out
    model, tokenizer, config = load_model(runs / "biased")
    corpus = Corpus.open(config.data.dir)
    split = corpus.split("validation")
    shard = split.shard(0)
    stories = [shard.tokens[shard.starts[i] : shard.starts[i + 1]].astype("int64") for i in range(4)]
    seen = []
    for block in model.blocks:
        router = block.feed_forward.router
        router.register_forward_hook(
            lambda r, inputs, out: seen.append((inputs[0] @ r.weight.t()).argmax(-1) != out.experts[:, 0])
        )
    changed_tokens = changed_choices = tokens = 0
    for ids in stories:
        ids = torch.from_numpy(ids[: config.data.seq_len + 1])[None]
        seen.clear()
        model.eval()(ids[:, :-1])
        changed = torch.stack(seen)  # (layers, tokens)
        changed_tokens += int(changed.any(0).sum())
        changed_choices += int(changed.sum())
        tokens += changed.shape[1]
    assert changed_choices > 0
    assert f"without the balance bias, {changed_tokens:,} of {tokens:,} validation tokens" in printed
    assert f"({changed_choices:,} of {3 * tokens:,} choices, 4 stories), and the loss would be " in printed
    for block in model.blocks:
        block.feed_forward.router.bias.zero_()
    without_bias = evaluate(model, corpus, config, 2, World())["loss"]
    with_bias = evaluate(load_model(runs / "biased")[0], corpus, config, 2, World())["loss"]
    assert f"would be {without_bias:.4f} instead of {with_bias:.4f} nats per token" in printed
    assert without_bias != with_bias


def test_without_the_corpus_the_effect_of_the_bias_is_unknown(runs, tmp_path, capsys):
    export(runs / "biased", tmp_path / "out", "--data", str(tmp_path / "nowhere"))
    assert "their number was not measured: " in capsys.readouterr().out


def test_a_bf16_export_rounds_the_weights_but_not_the_bias(runs, tmp_path):
    out = export(runs / "biased", tmp_path / "out", "--dtype", "bfloat16", "--batches", "none")
    hf_model = load_in_transformers(out, code=True, dtype="auto")
    assert hf_model.dtype == torch.bfloat16
    model, _, _ = load_model(runs / "biased")
    for part in tensor_slices(model.config, model.vocab_size):
        expected = model.state_dict()[part.name][part.start : part.stop]
        got = hf_model.state_dict()[part.hf_name]
        is_bias = part.hf_name.endswith("balance_bias")
        assert got.dtype == (torch.float32 if is_bias else torch.bfloat16)
        assert torch.equal(got, expected if is_bias else expected.bfloat16())


def test_weights_are_exported_if_the_tokenizer_cannot_be(runs, tmp_path, capsys, monkeypatch):
    def fail(tokenizer, folder, length):
        raise UserError("it cannot")

    monkeypatch.setattr("trainer.hub.export.export_tokenizer", fail)
    out = export(runs / "plain", tmp_path / "out")
    assert "with tokenizer.model, but without tokenizer.json: it cannot" in capsys.readouterr().out
    assert (out / "tokenizer.model").exists() and HFCheckpoint(out).vocab_size == 320


def test_an_export_overwrites_nothing_and_leaves_no_parts(runs, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there: already exists"):
        export(runs / "plain", tmp_path / "there")
    for error, reported in ((OSError(28, "No space left"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr("trainer.hub.export.check_tensors", fail)
        with pytest.raises(reported, match="out: No space left" if reported is UserError else None):
            export(runs / "plain", tmp_path / "new" / "out")
        assert not list((tmp_path / "new").iterdir())


def test_settings_without_a_counterpart_are_not_exported(runs, tmp_path, monkeypatch):
    monkeypatch.delitem(HF_CONFIG_KEYS, "temperature_floor")
    with pytest.raises(UserError, match=r"cannot be exported: .* no counterpart of model\.temperature_floor=4"):
        export(runs / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_holds_one_tensor_at_a_time(runs, tmp_path, monkeypatch):
    alive, read = [], CheckpointWeights.read

    def watched(weights, name):
        assert all(ref() is None for ref in alive)
        tensor = read(weights, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(CheckpointWeights, "read", watched)
    export(runs / "all", tmp_path / "out", "--shard-size", "30KB", "--batches", "none")
    assert len(alive) > 20


def test_with_balance_until_the_bias_is_zero_at_the_last_step(corpus_dir):
    """The bias balances first, and then decreases linearly. It depends on step and bias only, so a run can resume."""
    run = cases.new_run(corpus_dir, "train.steps=10", "model.balance_until=0.6", "model.balance_rate=0.01")
    router = run.model.blocks[0].feed_forward.router
    seen = []
    for batch in run.loader.steps(0, 10):
        train_step(run, batch)
        seen.append(router.bias.clone())
    assert all(bool((a != b).any()) for a, b in zip(seen[:5], seen[1:6], strict=True)) and seen[5].abs().max() > 0.01
    for step, bias in enumerate(seen[5:]):
        torch.testing.assert_close(bias, seen[5] * (4 - step) / 4)
    assert not seen[-1].any()


def test_a_run_with_balance_until_is_exported_as_plain(corpus_dir, tmp_path, capsys):
    """A run that resumes while its bias decreases ends with the same weights. A resumed run may set balance_until."""
    words = ["train.steps=10", "model.balance_until=0.3", "checkpoint.keep=1"]
    assert cases.run(corpus_dir, tmp_path, "run.name=whole", *words) == 0
    assert cases.run(corpus_dir, tmp_path, "run.name=parts", *words, "train.stop_at=6") == 0
    export(tmp_path / "parts", tmp_path / "half", "--batches", "none")
    assert "Llama 4 with modeling_llama4_biased.py" in capsys.readouterr().out
    assert cases.run(corpus_dir, tmp_path, "run.name=parts", *words) == 0
    assert cases.last_digest(tmp_path / "parts") == cases.last_digest(tmp_path / "whole")
    assert cases.run(corpus_dir, tmp_path, "run.name=late", "train.steps=10", "train.stop_at=5") == 0
    assert cases.run(corpus_dir, tmp_path, "run.name=late", "train.steps=10", "model.balance_until=0.5") == 0
    assert "changed since step 5: model.balance_until: None -> 0.5" in capsys.readouterr().out
    for name in ("parts", "late"):
        export(tmp_path / name, tmp_path / f"{name}-out")
        assert "plain Llama 4, which expresses all of this model" in capsys.readouterr().out


# Import


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_loaded_bitwise_on_any_mesh(pool, runs, tmp_path, kind):
    """Balance bias included; each rank reads its own part. Our own checkpoints are loaded in the same way."""
    out = export(runs / kind, tmp_path / "out", "--shard-size", "30KB", "--batches", "none")
    expected = weights_digest(load_model(runs / kind)[0])
    checkpoint = HFCheckpoint(out)
    model = Transformer(checkpoint.model, checkpoint.vocab_size)
    model.init_weights(7)
    checkpoint.fill(model)
    assert weights_digest(model) == expected
    if kind in ("biased", "all"):
        places = [str(out), str(runs / kind)]
        for world, expert in ((4, 4), (3, 1), (4, 2)):
            got = pool.run(
                world, "tests.support.run_cases:initial_digests", places=places, run=str(runs / kind), expert=expert
            )
            assert got == [[expected, expected]] * world


@pytest.mark.parametrize("kind", KINDS)
def test_export_import_export_gives_the_same_bytes(runs, tmp_path, capsys, kind):
    plain = [] if KINDS[kind][1] else ["--plain"]
    for dtype in ("float32", "bfloat16"):
        first, imported, second = (tmp_path / f"{name}-{dtype}" for name in ("first", "imported", "second"))
        export(runs / kind, first, "--dtype", dtype, "--batches", "none")
        assert main(["import", "--from", str(first), "--out", str(imported)]) == 0
        export(imported, second, "--dtype", dtype, "--batches", "none", *plain)
        assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
        assert json.loads((first / "config.json").read_text()) == json.loads((second / "config.json").read_text())
    assert weights_digest(load_model(tmp_path / "imported-float32")[0]) == weights_digest(load_model(runs / kind)[0])
    assert "model:\n  dim: 16\n" in capsys.readouterr().out


def test_an_import_needs_a_new_folder_and_a_tokenizer(runs, tmp_path):
    out = export(runs / "plain", tmp_path / "out")
    words = ["import", "--from", str(out), "--out", str(tmp_path / "imported")]
    with pytest.raises(UserError, match="out: already exists"):
        main([*words[:3], "--out", str(out)])
    (out / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="tokenizer.model: no such file; give .* with 320 pieces by --tokenizer"):
        main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_starts_with_the_weights_of_another(runs, corpus_dir, tmp_path, capsys):
    """An export and a checkpoint give the same losses from the first step on, and random weights give others."""
    out = export(runs / "biased", tmp_path / "out", "--batches", "none")
    words = [*UNUSUAL, *KINDS["biased"][0]]
    for name, source in (("folder", out), ("checkpoint", runs / "biased"), ("fresh", None)):
        more = [] if source is None else [f"train.init_from={source}"]
        assert cases.run(corpus_dir, tmp_path, *words, *more, f"run.name={name}") == 0
        if source is not None:
            assert f"initial weights from {source}" in capsys.readouterr().out
    folder, checkpoint, fresh = (cases.losses(tmp_path / name) for name in ("folder", "checkpoint", "fresh"))
    assert folder == checkpoint and folder[0] < fresh[0] - 1e-3
    # a run that resumes has its own weights, and does not read the folder of train.init_from
    assert cases.run(corpus_dir, tmp_path, *words, "run.name=folder", "train.init_from=gone", "train.steps=3") == 0
    assert len(cases.losses(tmp_path / "folder")) == 3


@pytest.mark.parametrize(
    "words, message",
    [
        (["model.dim=8"], "its weights do not fit this model (model.dim is 16 there, 8 here"),
        (["model.n_experts=6"], "its weights do not fit this model (model.n_experts is 5 there, 6 here)"),
        (["train.init_from=nowhere"], "train.init_from=nowhere: no such folder; give a run folder"),
    ],
)
def test_weights_of_another_model_are_refused(runs, corpus_dir, tmp_path, words, message):
    first = [*UNUSUAL, f"train.init_from={runs / 'biased'}", "run.name=x"]
    with pytest.raises(UserError) as refusal:
        cases.run(corpus_dir, tmp_path, *first, *words)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "x" / "metrics.jsonl").exists()


def test_all_ranks_end_if_one_does_not_see_the_folder(pool, runs, corpus_dir):
    place, words = str(runs / "biased"), [*UNUSUAL, *KINDS["biased"][0]]
    errors = pool.run(2, "tests.support.run_cases:missing_on_rank_1", corpus=str(corpus_dir), place=place, more=words)
    assert errors[0] == errors[1] and errors[0].startswith(f"train.init_from={place}-gone: no such folder")


def test_settings_that_change_what_is_computed_are_logged(runs, tmp_path):
    out = export(runs / "plain", tmp_path / "out")
    config = load_model(runs / "plain")[2].model
    assert initial_weights(str(out), config, 320).notes == [f"initial weights from {out}"]
    other = config.model_copy(update={"rope_theta": 5e5, "max_seq_len": 9, "dropout": 0.1})
    notes = initial_weights(str(out), other, 320).notes
    assert notes[1:] == [f"initial weights from {out}: model.rope_theta is 10000.0 there, 500000.0 here"]
    with pytest.raises(UserError, match="the vocabulary has 320 tokens there, 300 in this corpus"):
        initial_weights(str(out), config, 300)


VISION = dict(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    vision_output_dim=8,
    image_size=28,
    patch_size=14,
    projector_input_dim=8,
    projector_output_dim=8,
)


def test_the_text_part_of_a_multimodal_model_is_read(tmp_path):
    """In bf16, as transformers writes it, which is the layout of the published weights."""
    config = ModelConfig(
        dim=16,
        n_heads=2,
        n_kv_heads=1,
        n_layers=4,
        n_experts=3,
        expert_dim=8,
        moe_every=2,
        ffn_dim=12,
        nope_every=4,
        attention_chunk=8,
        max_seq_len=16384,
        rope_scaling=RopeScaling(),
    )
    both = transformers.Llama4Config(text_config=to_hf_config(config, 37, 1, 2, "bfloat16"), vision_config=VISION)
    model = transformers.Llama4ForConditionalGeneration(both).bfloat16()
    model.save_pretrained(tmp_path)
    checkpoint = HFCheckpoint(tmp_path)
    assert not differences(checkpoint.model, config) and checkpoint.vocab_size == 37
    ours = Transformer(checkpoint.model, 37)
    checkpoint.fill(ours)
    model = transformers.Llama4ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_logits(ours, model.language_model.eval())
