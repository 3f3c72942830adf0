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
from trainer.evaluate import evaluate, main
from trainer.generate import Sampling, generate


@pytest.fixture(scope="module")
def run(corpus_dir, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    cases.run(corpus_dir, runs, "run.name=made", "train.steps=8", "data.seq_len=512")
    return runs / "made"


def test_equals_a_loop_over_stories(run, corpus_dir):
    """Loss, bits per byte and floor from the text of each story alone."""
    model, tokenizer, config = load_model(run)
    corpus = Corpus.open(corpus_dir)
    line = evaluate(model, corpus, config, "all", World())
    split = corpus.split("validation")
    nats = tokens = size = 0
    log_probs = []
    model.eval()
    for number in range(len(split.shards)):
        shard = split.shard(number)
        for a, b in zip(shard.starts, shard.starts[1:], strict=False):
            ids = torch.from_numpy(shard.tokens[a:b].astype(np.int64))[None]
            nats += model(ids[:, :-1], ids[:, 1:]).loss.item()
            text = tokenizer.decode(ids[0].tolist())
            tokens, size = tokens + ids.shape[1] - 1, size + len(text.encode())
            log_probs.append(log_prob(text))
    assert line["stories"] == len(log_probs) and line["tokens"] == tokens and line["cut"] == 0
    assert line["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert line["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert line["floor"] == pytest.approx(-sum(log_probs) / tokens, rel=1e-9)
    assert line["excess"] == pytest.approx(line["loss"] - line["floor"])
    assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))


def test_what_is_cut_is_counted_and_has_no_floor(run, corpus_dir):
    model, tokenizer, config = load_model(run)
    whole = evaluate(model, Corpus.open(corpus_dir), config, "all", World())
    short = cases.config(corpus_dir, run.parent, "data.seq_len=40")
    cut = evaluate(model, Corpus.open(corpus_dir), short, "all", World())
    assert cut["cut"] == whole["tokens"] - cut["tokens"] > 0
    assert cut["floor"] is None and cut["excess"] is None
    split, size = Corpus.open(corpus_dir).split("validation"), 0
    for number in range(len(split.shards)):
        shard = split.shard(number)
        size += sum(len(tokenizer.decode(shard.tokens[a + 1 : a + 41].tolist()).encode()) for a in shard.starts[:-1])
    assert cut["bits_per_byte"] == pytest.approx(cut["loss"] * cut["tokens"] / math.log(2) / size, rel=1e-6)
    some = evaluate(model, Corpus.open(corpus_dir), short, 3, World())
    assert some["stories"] == 3 * short.train.micro_batch_size


def test_the_command_ends_with_one_json_object(run, capsys):
    assert main(["--checkpoint", str(run)]) == 0
    captured = capsys.readouterr()
    line = json.loads(captured.out.splitlines()[-1])
    assert line["split"] == "validation" and line["excess"] > 0
    assert main(["--checkpoint", str(run), "--split", "train", "--batches", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["stories"] == 4


def test_training_mode_is_restored_after_an_error(run, corpus_dir, monkeypatch):
    model, _, config = load_model(run)
    model.train()
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, Corpus.open(corpus_dir), config, 1, World())
    assert model.training


def test_on_a_cpu_it_computes_in_fp32_and_the_line_says_so(run, capsys):
    assert main(["--checkpoint", str(run), "--batches", "2", "--device", "cpu"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["device"], line["dtype"]) == ("cpu", "float32")
    assert {p.dtype for p in load_model(run, "auto")[0].parameters()} == {torch.float32} or torch.cuda.is_available()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_device_cuda_without_a_gpu_is_refused_in_one_line(run):
    with pytest.raises(UserError, match="^--device cuda: 1 process on this machine, 0 CUDA.*use --device cpu$"):
        main(["--checkpoint", str(run), "--device", "cuda"])


def test_placed_in_bf16_all_but_the_routers_become_bf16_and_the_loss_stays_near(run, corpus_dir):
    model, _, config = load_model(run)
    corpus = Corpus.open(corpus_dir)
    want = evaluate(model, corpus, config, 2, World())["loss"]
    place(model, torch.device("cpu"), torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".router." in name else torch.bfloat16), name
    assert evaluate(model, corpus, config, 2, World())["loss"] == pytest.approx(want, rel=5e-3)


def test_evaluation_and_generation_keep_attention_from_cudnn_and_training_does_not(run, corpus_dir):
    """cuDNN plans anew for each shape: the switch is off in their forwards, and on again between tokens and after."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    model, tokenizer, config = load_model(run)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(enabled()))
    evaluate(model, Corpus.open(corpus_dir), config, 2, World())
    between = [enabled() for _ in generate(model, tokenizer, "Once", Sampling(max_new_tokens=3))]
    assert len(seen) >= 4 and not any(seen)
    assert between and all(between) and enabled()
    with pytest.raises(ZeroDivisionError):
        evaluate(model, Corpus.open(corpus_dir), config, 1, World(), between=lambda: 1 / 0)
    assert enabled()
