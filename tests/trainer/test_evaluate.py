"""The validation loss of a model, its floor, and the command that computes them for a checkpoint."""

import json
import math

import numpy as np
import pytest
import torch

from data.settings import UserError
from data.shards import Corpus
from data.sources.storybook import log_prob
from parallel.mesh import World
from tests.support import run_cases as cases
from trainer.checkpoint.load import load_model, place
from trainer.evaluate import main
from trainer.evaluation import describe_evaluation, evaluate
from trainer.generate import Sampling, generate


@pytest.fixture(scope="module")
def run(corpus_dir, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    cases.run(corpus_dir, runs, "run.name=made", "train.steps=8", "data.seq_len=512")
    return runs / "made"


def test_the_result_equals_a_loop_over_single_stories(run, corpus_dir):
    """Loss, bits per byte and floor, computed from each story and its text."""
    model, tokenizer, config = load_model(run)
    corpus = Corpus.open(corpus_dir)
    line = evaluate(model, corpus, config, "all", World())
    split = corpus.split("validation")
    nats = tokens = text_bytes = 0
    log_probs = []
    model.eval()
    for number in range(len(split.shards)):
        shard = split.shard(number)
        for a, b in zip(shard.starts, shard.starts[1:], strict=False):
            ids = torch.from_numpy(shard.tokens[a:b].astype(np.int64))[None]
            nats += model(ids[:, :-1], ids[:, 1:]).loss.item()
            text = tokenizer.decode(ids[0].tolist())
            tokens += ids.shape[1] - 1
            text_bytes += len(text.encode())
            log_probs.append(log_prob(text))
    assert line["stories"] == len(log_probs) and line["tokens"] == tokens and line["cut"] == 0
    assert line["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert line["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    assert line["floor"] == pytest.approx(-sum(log_probs) / tokens, rel=1e-9)
    assert line["excess"] == pytest.approx(line["loss"] - line["floor"])
    assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))


def test_cut_tokens_are_counted_and_leave_no_floor(run, corpus_dir):
    model, tokenizer, config = load_model(run)
    whole = evaluate(model, Corpus.open(corpus_dir), config, "all", World())
    short = cases.config(corpus_dir, run.parent, "data.seq_len=40")
    cut = evaluate(model, Corpus.open(corpus_dir), short, "all", World())
    assert cut["cut"] == whole["tokens"] - cut["tokens"] > 0
    assert cut["floor"] is None and cut["excess"] is None
    split, text_bytes = Corpus.open(corpus_dir).split("validation"), 0
    for number in range(len(split.shards)):
        shard = split.shard(number)
        for start in shard.starts[:-1]:
            text_bytes += len(tokenizer.decode(shard.tokens[start + 1 : start + 41].tolist()).encode())
    assert cut["bits_per_byte"] == pytest.approx(cut["loss"] * cut["tokens"] / math.log(2) / text_bytes, rel=1e-6)
    some = evaluate(model, Corpus.open(corpus_dir), short, 3, World())
    assert some["stories"] == 3 * short.train.micro_batch_size


def test_the_command_ends_with_one_json_object(run, capsys):
    assert main(["--checkpoint", str(run), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    line = json.loads(printed.out.splitlines()[-1])
    assert line["split"] == "validation" and line["excess"] > 0
    assert (line["device"], line["dtype"]) == ("cpu", "float32")
    assert f"validation loss {line['loss']:.4f} nats per token (true floor {line['floor']:.4f}, " in printed.err
    assert main(["--checkpoint", str(run), "--split", "train", "--batches", "2"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["stories"] == 4
    assert torch.cuda.is_available() or (line["device"], line["dtype"]) == ("cpu", "float32")


def test_a_cut_is_described_and_wrong_flags_are_refused(run):
    line = {"split": "train", "loss": 2.0, "floor": None, "bits_per_byte": 0.5, "stories": 1200, "cut": 3400}
    assert describe_evaluation(line) == (
        "train loss 2.0000 nats per token, 0.500 bits per byte, on 1,200 stories "
        "(3,400 tokens beyond data.seq_len were cut)"
    )
    with pytest.raises(UserError, match="^--batches 0: should be all, or a number from 1$"):
        main(["--checkpoint", str(run), "--batches", "0"])


def test_training_mode_is_restored_after_an_error(run, corpus_dir, monkeypatch):
    model, _, config = load_model(run)
    model.train()
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, Corpus.open(corpus_dir), config, 1, World())
    assert model.training


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_device_cuda_is_refused_without_a_gpu(run):
    with pytest.raises(UserError, match="^--device cuda: 1 process on this machine, 0 CUDA.*use --device cpu$"):
        main(["--checkpoint", str(run), "--device", "cuda"])


def test_in_bf16_only_the_routers_stay_fp32(run, corpus_dir):
    """And the loss stays close."""
    model, _, config = load_model(run)
    corpus = Corpus.open(corpus_dir)
    expected = evaluate(model, corpus, config, 2, World())["loss"]
    place(model, torch.device("cpu"), torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".router." in name else torch.bfloat16), name
    assert evaluate(model, corpus, config, 2, World())["loss"] == pytest.approx(expected, rel=5e-3)


def test_evaluation_and_generation_do_not_use_cudnn_attention(run, corpus_dir):
    """cuDNN would plan for each new shape. It is off in their forwards, and on between tokens and afterwards."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    model, tokenizer, config = load_model(run)
    in_forwards = []
    model.register_forward_hook(lambda *_: in_forwards.append(enabled()))
    evaluate(model, Corpus.open(corpus_dir), config, 2, World())
    between_tokens = [enabled() for _ in generate(model, tokenizer, "Once", Sampling(max_new_tokens=3))]
    assert len(in_forwards) >= 4 and not any(in_forwards)
    assert between_tokens and all(between_tokens) and enabled()
    with pytest.raises(ZeroDivisionError):
        evaluate(model, Corpus.open(corpus_dir), config, 1, World(), before_batch=lambda: 1 / 0)
    assert enabled()
