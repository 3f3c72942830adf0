"""Mistakes that were found in other small trainers of this kind: a test for each would fail if it were made here.

Tests of other such mistakes are elsewhere: the gradient of the router with top-1 (test_moe.py), an evaluation that
changes a bias or a random state (test_run.py), and targets that are shifted twice, as the loss of transformers shifts
them itself (test_llama4.py).
"""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from data.loader import IGNORE, Rows
from data.shards import Corpus
from tests.support import run_cases as cases
from trainer.checkpoint.load import load_model
from trainer.generate import Sampling, generate
from trainer.step import train_step


@pytest.fixture(scope="module")
def loaded(corpus_dir, tmp_path_factory):
    """A model that was trained on rows of 32 tokens, and accepts 512."""
    runs = tmp_path_factory.mktemp("runs")
    cases.run(corpus_dir, runs, "run.name=short", "model.temperature_floor=16", "model.attention_chunk=24")
    return load_model(runs / "short")


def test_a_step_applies_each_layer_once_and_trains_all_weights(corpus_dir):
    """Each layer is applied once per micro-batch, and the router is trained with top-1, too."""
    run = cases.new_run(corpus_dir, "train.micro_batch_size=3", "train.global_batch_size=6")
    calls = Counter()
    for name, module in run.model.named_modules():
        if name:
            module.register_forward_hook(lambda m, i, o, name=name: calls.update([name]))
    before = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    train_step(run, run.loader.step(0))
    parts = ("", ".attention_norm", ".feed_forward_norm", ".feed_forward.router", ".feed_forward.experts")
    modules = ["embedding", "head", *(f"blocks.{i}{part}" for i in range(2) for part in parts)]
    assert {name: calls[name] for name in modules} == dict.fromkeys(modules, 2)  # there are two micro-batches
    assert max(calls.values()) == 2
    for name, weight in run.model.named_parameters():
        assert not torch.equal(weight, before[name]), name


def test_each_token_is_predicted_from_those_before_it(loaded, corpus_dir):
    """Targets are the text shifted once, with eos among them, even if eos is also the padding."""
    model, tokenizer, _ = loaded
    shard = Corpus.open(corpus_dir).split("train").shard(0)
    tokens = torch.from_numpy(shard.tokens[: shard.starts[4]].astype("int64"))
    stories = [tokens[a:b] for a, b in zip(shard.starts[:4], shard.starts[1:5], strict=True)]
    rows = Rows(Corpus.open(corpus_dir).split("train"), 400, False, tokenizer.bos, pad=tokenizer.eos)
    batch = rows.batch([0, 1, 2, 3], [0, 1, 2, 3])
    assert len({len(story) for story in stories}) > 1 and max(map(len, stories)) <= 401
    expected = torch.zeros(())
    for story in stories:
        assert story[0] == tokenizer.bos and story[-1] == tokenizer.eos
        expected = expected + F.cross_entropy(model.eval()(story[None, :-1]).logits[0], story[1:], reduction="sum")
    torch.testing.assert_close(model(batch.tokens, batch.targets).loss, expected, rtol=1e-5, atol=1e-2)
    assert int((batch.targets != IGNORE).sum()) == sum(len(story) - 1 for story in stories)


@torch.no_grad()
def test_positions_beyond_the_training_length_work(loaded):
    """Beyond the 32 tokens of training: the cache changes no logits, they are finite, and they depend on the past."""
    model, tokenizer, _ = loaded
    tokens = torch.randint(4, tokenizer.vocab_size, (1, 500), generator=torch.Generator().manual_seed(1))
    logits = model.eval()(tokens).logits
    cache = model.new_cache([240], 500)
    parts = [model(tokens[:, :240], cache=cache).logits]
    parts += [model(tokens[:, i : i + 1], cache=cache).logits for i in range(240, 500)]
    torch.testing.assert_close(torch.cat(parts, 1), logits[:, 239:], rtol=1e-4, atol=1e-4)
    assert logits.isfinite().all()
    changed = tokens.clone()
    changed[0, 450] = 5 if tokens[0, 450] != 5 else 6
    after = model(changed).logits
    assert not torch.allclose(after[0, 450:460], logits[0, 450:460])
    long = list(generate(model, tokenizer, "Once", Sampling(10_000, temperature=1.0, seed=1)))
    assert len(long) < 512  # it ended with eos or at the model's length, without an error


def test_generation_keeps_the_training_mode(loaded):
    """Even if the caller stops before the end of the story."""
    model, tokenizer, _ = loaded
    for mode in (True, False):
        model.train(mode)
        story = generate(model, tokenizer, "Once", Sampling(20, seed=1))
        next(story)
        story.close()
        assert all(module.training == mode for module in model.modules())
