"""Out to the Hugging Face layout, and in again: the same numbers, every tensor, and nothing trusted."""

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
from trainer import hub
from trainer.checkpoint.load import load_model, weights_digest
from trainer.evaluate import evaluate
from trainer.generate import Sampling, generate
from trainer.hub.export import Stored
from trainer.hub.importer import HFCheckpoint, initial_weights
from trainer.hub.mapping import differences, pieces, to_llama
from trainer.step import train_step

transformers = pytest.importorskip("transformers", reason="the extra `hub` is not installed")
UNLIKE = ["model.n_kv_heads=1", "model.head_dim=6", "model.ffn_dim=20", "model.attention_chunk=8", "model.n_layers=3"]
UNLIKE += ["model.temperature_floor=4", "model.expert_dim=12", "train.steps=2", "checkpoint.keep=1"]
KINDS = {  # runs, and what plain Llama 4 has no place for in them
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
def modules_here(tmp_path, monkeypatch):
    """transformers copies modelling files that it runs to a cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(scope="module")
def runs(pool, corpus_dir, tmp_path_factory):
    """A run of each kind; the checkpoints of two are written by four processes that share the experts."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (more, _) in KINDS.items():
        words = [*UNLIKE, *more, f"run.name={name}"]
        if name in ("plain", "all"):
            pool.run(4, "tests.support.run_cases:run_words", 300, corpus=str(corpus_dir), runs=str(folder), more=words)
        else:
            cases.run(corpus_dir, folder, *words)
    return folder


def export(source, out, *more):
    assert hub.main(["export", "--checkpoint", str(source), "--out", str(out), *more]) == 0
    return out


def theirs(folder, code=False, **keys):
    """The model that transformers makes of a folder, which must use and have every tensor."""
    auto = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True, trust_remote_code=code, **keys)
    assert not any(info.values()), info
    return model.eval()


def assert_same(ours, other, atol=2e-5):
    tokens = torch.randint(4, ours.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(other(tokens).logits, ours.eval()(tokens).logits, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_our_logits(runs, tmp_path, capsys, kind):
    reasons = KINDS[kind][1]
    out = export(runs / kind, tmp_path / "out", "--shard-size", "30KB")
    said = capsys.readouterr().out
    assert all(reason in said for reason in reasons) and ("plain Llama 4, which" in said) == (not reasons)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Llama4BiasedForCausalLM" if reasons else "Llama4ForCausalLM"]
    assert (out / "modeling_llama4_biased.py").exists() == bool(reasons)
    model = theirs(out, code=bool(reasons))
    ours, tokenizer, _ = load_model(runs / kind)
    assert_same(ours, model)
    text = "Once  Tom <s>\n\u2581\U0001f600"
    other = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=bool(reasons))
    assert other(text).input_ids == [tokenizer.bos, *tokenizer.encode(text)]
    assert model.generation_config.eos_token_id == tokenizer.eos == model.config.eos_token_id
    assert not list(out.parent.glob(".*partial"))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "biased"])
def test_greedy_stories_are_those_of_transformers(runs, tmp_path, kind):
    """200 tokens past the border of a chunk, for the first beginning where rounding decides nothing on the way."""
    model = theirs(export(runs / kind, tmp_path / "out", "--batches", "none"), code=kind == "biased")
    ours, tokenizer, config = load_model(runs / kind)
    never, length = sorted({tokenizer.bos, tokenizer.pad, tokenizer.unk}), 200 + 2 * config.model.attention_chunk
    for number in range(50):
        prompt = f"Tom had {number} cats"
        ids = [tokenizer.bos, *tokenizer.encode(prompt)]
        story = list(generate(ours, tokenizer, prompt, Sampling(length, temperature=0)))
        if len(story) == length and surest(ours, ids + story, len(ids), never) > 1e-4:
            break
    else:
        pytest.fail("no beginning whose story rounding cannot turn")
    made = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=length,
        do_sample=False,
        suppress_tokens=never,
    )
    assert made[0, len(ids) :].tolist() == story and len(set(story)) > 3


def surest(model, ids, first, never):
    """The smallest distance between the two likeliest tokens from place `first` on, 0 if an expert's is rounding's."""
    gaps = []
    hooks = [
        module.register_forward_hook(lambda router, inputs, _: gaps.append(cases.narrowest(router, *inputs)))
        for module in model.modules()
        if isinstance(module, Router)
    ]
    logits = model(torch.tensor([ids[:-1]])).logits[0, first - 1 :]
    for hook in hooks:
        hook.remove()
    logits[:, never] = -torch.inf
    likeliest = logits.topk(2).values
    return float((likeliest[:, 0] - likeliest[:, 1]).min()) * (min(gaps) > 2e-6)


def test_without_trust_a_biased_model_is_not_loaded_as_something_else(runs, tmp_path):
    out = export(runs / "biased", tmp_path / "out", "--batches", "none")
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(out)


def test_plain_as_asked_for_is_llama_4_without_the_bias(runs, tmp_path, capsys):
    out = export(runs / "biased", tmp_path / "out", "--plain", "--batches", "none")
    assert "plain Llama 4, as asked for: without the balance bias" in capsys.readouterr().out
    ours, _, _ = load_model(runs / "biased")
    for router in ours.modules():
        if hasattr(router, "bias"):
            router.bias.zero_()
    assert_same(ours, theirs(out))
    with pytest.raises(UserError, match="--plain: Llama 4 has a shared expert"):
        export(runs / "all", tmp_path / "other", "--plain")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_it_counts_the_tokens_that_the_bias_sends_elsewhere(runs, tmp_path, capsys):
    """By hand: the choices of each token with and without, in the layers as they are with the bias."""
    export(runs / "biased", tmp_path / "out", "--batches", "2")
    said = capsys.readouterr().out
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
    some = choices = tokens = 0
    for ids in stories:
        ids = torch.from_numpy(ids[: config.data.seq_len + 1])[None]
        seen.clear()
        model.eval()(ids[:, :-1])
        moved = torch.stack(seen)
        some, choices, tokens = some + int(moved.any(0).sum()), choices + int(moved.sum()), tokens + moved.shape[1]
    assert choices > 0
    assert f"without the bias {some:,} of {tokens:,} validation tokens" in said
    assert f"{choices:,} of {3 * tokens:,} choices, in 4 stories; their loss would be " in said
    for block in model.blocks:
        block.feed_forward.router.bias.zero_()
    losses = [evaluate(m, corpus, config, 2, World())["loss"] for m in (model, load_model(runs / "biased")[0])]
    assert f"would be {losses[0]:.4f} instead of {losses[1]:.4f} nats per token" in said and losses[0] != losses[1]


def test_a_bias_without_its_corpus_is_exported_and_said_so(runs, tmp_path, capsys):
    export(runs / "biased", tmp_path / "out", "--data", str(tmp_path / "nowhere"))
    assert "how many was not counted: " in capsys.readouterr().out


def test_bf16_holds_the_weights_rounded_and_the_bias_exact(runs, tmp_path):
    out = export(runs / "biased", tmp_path / "out", "--dtype", "bfloat16", "--batches", "none")
    model = theirs(out, code=True, dtype="auto")
    assert model.dtype == torch.bfloat16
    ours, _, _ = load_model(runs / "biased")
    for piece in pieces(ours.config, ours.vocab_size):
        want = dict(ours.state_dict())[piece.ours][piece.first : piece.first + piece.shape[0]]
        got = model.state_dict()[piece.theirs]
        bias = piece.theirs.endswith("balance_bias")
        assert got.dtype == (torch.float32 if bias else torch.bfloat16)
        assert torch.equal(got, want if bias else want.bfloat16())


def test_weights_go_out_where_the_tokenizer_cannot(runs, tmp_path, capsys, monkeypatch):
    def cannot(tokenizer, folder, length):
        raise UserError("it cannot")

    monkeypatch.setattr("trainer.hub.export.export_tokenizer", cannot)
    out = export(runs / "plain", tmp_path / "out")
    assert "tokenizer.model, but no tokenizer.json: it cannot" in capsys.readouterr().out
    assert (out / "tokenizer.model").exists() and HFCheckpoint(out).vocab_size == 320


def test_an_existing_folder_is_refused_and_a_failure_leaves_nothing(runs, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there: exists"):
        export(runs / "plain", tmp_path / "there")
    for error, wanted in ((OSError(28, "No space left"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr("trainer.hub.export.fits", fail)
        with pytest.raises(wanted, match="out: No space left" if wanted is UserError else None):
            export(runs / "plain", tmp_path / "new" / "out")
        assert not list((tmp_path / "new").iterdir())


def test_an_export_holds_one_tensor_at_a_time(runs, tmp_path, monkeypatch):
    alive, read = [], Stored.read

    def watched(stored, name):
        assert all(ref() is None for ref in alive)
        tensor = read(stored, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Stored, "read", watched)
    export(runs / "all", tmp_path / "out", "--shard-size", "30KB", "--batches", "none")
    assert len(alive) > 20


def test_balance_until_brings_the_bias_to_zero_with_the_last_step(corpus_dir):
    """Balancing before, then a straight line; a function of step and bias, so a resume cannot tell."""
    run = cases.fresh(corpus_dir, "train.steps=10", "model.balance_until=0.6", "model.balance_rate=0.01")
    router = run.model.blocks[0].feed_forward.router
    seen = []
    for batch in run.loader.steps(0, 10):
        train_step(run, batch)
        seen.append(router.bias.clone())
    assert all(bool((a != b).any()) for a, b in zip(seen[:5], seen[1:6], strict=True)) and seen[5].abs().max() > 0.01
    for step, bias in enumerate(seen[5:]):
        torch.testing.assert_close(bias, seen[5] * (4 - step) / 4)
    assert not seen[-1].any()


def test_a_run_that_ends_with_its_bias_at_zero_is_plain(corpus_dir, tmp_path, capsys):
    """The same biases and weights when it was stopped on the way down; and a run may decide for it late."""
    words = ["train.steps=10", "model.balance_until=0.3", "checkpoint.keep=1"]
    assert cases.run(corpus_dir, tmp_path, "run.name=whole", *words) == 0
    assert cases.run(corpus_dir, tmp_path, "run.name=parts", *words, "train.stop_at=6") == 0
    export(tmp_path / "parts", tmp_path / "half", "--batches", "none")
    assert "Llama 4 and modeling_llama4_biased.py" in capsys.readouterr().out
    assert cases.run(corpus_dir, tmp_path, "run.name=parts", *words) == 0
    assert cases.last_digest(tmp_path / "parts") == cases.last_digest(tmp_path / "whole")
    assert cases.run(corpus_dir, tmp_path, "run.name=late", "train.steps=10", "train.stop_at=5") == 0
    assert cases.run(corpus_dir, tmp_path, "run.name=late", "train.steps=10", "model.balance_until=0.5") == 0
    assert "changed since step 5: model.balance_until: None -> 0.5" in capsys.readouterr().out
    for name in ("parts", "late"):
        export(tmp_path / name, tmp_path / f"{name}-out")
        assert "plain Llama 4, which can say all" in capsys.readouterr().out


# In again


@pytest.mark.parametrize("kind", KINDS)
def test_what_went_out_comes_in_on_any_mesh(pool, runs, tmp_path, kind):
    """Bitwise, with the export's bias; each rank reads its own part. And so do our own checkpoints."""
    out = export(runs / kind, tmp_path / "out", "--shard-size", "30KB", "--batches", "none")
    want = weights_digest(load_model(runs / kind)[0])
    theirs = HFCheckpoint(out)
    model = Transformer(theirs.model, theirs.vocab_size)
    model.init_weights(7)
    theirs.fill(model)
    assert weights_digest(model) == want
    if kind in ("biased", "all"):
        places = [str(out), str(runs / kind)]
        for world, expert in ((4, 4), (3, 1), (4, 2)):
            got = pool.run(
                world, "tests.support.run_cases:initial_digests", places=places, run=str(runs / kind), expert=expert
            )
            assert got == [[want, want]] * world


@pytest.mark.parametrize("kind", KINDS)
def test_out_and_in_and_out_gives_the_same_bytes(runs, tmp_path, capsys, kind):
    """By way of a checkpoint, which evaluates and tells stories like the first, and of bf16 once it is rounded."""
    plain = [] if KINDS[kind][1] else ["--plain"]
    for dtype in ("float32", "bfloat16"):
        first, back, again = (tmp_path / f"{name}-{dtype}" for name in ("first", "back", "again"))
        export(runs / kind, first, "--dtype", dtype, "--batches", "none")
        assert hub.main(["import", "--from", str(first), "--out", str(back)]) == 0
        export(back, again, "--dtype", dtype, "--batches", "none", *plain)
        assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
        assert json.loads((first / "config.json").read_text()) == json.loads((again / "config.json").read_text())
    assert weights_digest(load_model(tmp_path / "back-float32")[0]) == weights_digest(load_model(runs / kind)[0])
    assert "model:\n  dim: 16\n" in capsys.readouterr().out


def test_an_import_wants_a_new_folder_and_a_tokenizer_that_fits(runs, tmp_path):
    out = export(runs / "plain", tmp_path / "out")
    words = ["import", "--from", str(out), "--out", str(tmp_path / "back")]
    with pytest.raises(UserError, match="out: exists"):
        hub.main([*words[:3], "--out", str(out)])
    (out / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="tokenizer.model: no such file; give --tokenizer, .* of 320 pieces"):
        hub.main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_begins_with_the_weights_of_another(runs, corpus_dir, tmp_path, capsys):
    """Losses of the first steps from a folder and from a checkpoint are the same, and not those of a fresh run."""
    out = export(runs / "biased", tmp_path / "out", "--batches", "none")
    words = [*UNLIKE, *KINDS["biased"][0]]
    for name, where in (("folder", out), ("checkpoint", runs / "biased"), ("fresh", None)):
        more = [] if where is None else [f"train.init_from={where}"]
        assert cases.run(corpus_dir, tmp_path, *words, *more, f"run.name={name}") == 0
        if where is not None:
            assert f"weights from {where}" in capsys.readouterr().out
    folder, checkpoint, fresh = (cases.losses(tmp_path / name) for name in ("folder", "checkpoint", "fresh"))
    assert folder == checkpoint and folder[0] < fresh[0] - 1e-3
    assert cases.run(corpus_dir, tmp_path, *words, "run.name=folder", "train.init_from=gone", "train.steps=3") == 0
    assert len(cases.losses(tmp_path / "folder")) == 3  # a run that is there goes on; nothing is read from `gone`


@pytest.mark.parametrize(
    "words, message",
    [
        (["model.dim=8"], "another model (model.dim is 16 there, 8 here"),
        (["model.n_experts=6"], "another model (model.n_experts is 5 there, 6 here)"),
        (["train.init_from=nowhere"], "train.init_from=nowhere: no such folder; give a run folder"),
    ],
)
def test_another_model_is_refused_by_its_settings(runs, corpus_dir, tmp_path, words, message):
    first = [*UNLIKE, f"train.init_from={runs / 'biased'}", "run.name=x"]
    with pytest.raises(UserError) as refusal:
        cases.run(corpus_dir, tmp_path, *first, *words)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "x" / "metrics.jsonl").exists()


def test_a_folder_that_one_process_does_not_see_ends_all_of_them(pool, runs, corpus_dir):
    place, words = str(runs / "biased"), [*UNLIKE, *KINDS["biased"][0]]
    said = pool.run(2, "tests.support.run_cases:missing_on_rank_1", corpus=str(corpus_dir), place=place, more=words)
    assert said[0] == said[1] and said[0].startswith(f"train.init_from={place}-gone: no such folder")


def test_settings_that_change_what_is_computed_are_told(runs, tmp_path):
    out = export(runs / "plain", tmp_path / "out")
    model = load_model(runs / "plain")[2].model
    assert initial_weights(str(out), model, 320).notes == [f"weights from {out}"]
    other = model.model_copy(update={"rope_theta": 5e5, "max_seq_len": 9, "dropout": 0.1})
    notes = initial_weights(str(out), other, 320).notes
    assert notes[1:] == [f"not as in {out}: model.rope_theta is 10000.0 there, 500000.0 here"]
    with pytest.raises(UserError, match="the vocabulary is 320 there, 300 in the corpus's tokenizer"):
        initial_weights(str(out), model, 300)


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


def test_the_text_part_of_a_multimodal_model_is_found(tmp_path):
    """As transformers writes it, which is the layout of the published weights; in bf16 as they are."""
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
    both = transformers.Llama4Config(text_config=to_llama(config, 37, 1, 2, "bfloat16"), vision_config=VISION)
    model = transformers.Llama4ForConditionalGeneration(both).bfloat16()
    model.save_pretrained(tmp_path)
    theirs = HFCheckpoint(tmp_path)
    assert not differences(theirs.model, config) and theirs.vocab_size == 37
    ours = Transformer(theirs.model, 37)
    theirs.fill(ours)
    model = transformers.Llama4ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same(ours, model.language_model.eval())
