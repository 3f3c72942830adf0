"""Generation: sampling, batches of prompts, streamed text, and the command."""

import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.settings import UserError
from model.config import ModelConfig
from model.transformer import Transformer
from tests.support import run_cases as cases
from trainer.checkpoint.load import load_model
from trainer.generate import SEPARATOR, Sampling, choose, generate, generate_batch, generate_text, main


@pytest.fixture(scope="module")
def run(corpus_dir, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    cases.run(corpus_dir, runs, "run.name=made", "train.steps=3")
    return runs / "made"


@pytest.fixture(scope="module")
def loaded(run):
    return load_model(run)


class ByteTokenizer:
    """A tokenizer of bytes, so that an untrained model generates incomplete characters."""

    bos, eos, pad, unk = 1, 2, 0, 3

    def encode(self, text):
        return [4 + b for b in text.encode()]


def byte_model(**keys):
    model = Transformer(ModelConfig(dim=16, n_layers=2, n_heads=2, expert_dim=16, n_experts=3, **keys), 260)
    model.init_weights(5)
    return model


def test_greedy_tokens_equal_those_of_a_forward_without_cache():
    model, tokenizer = byte_model(attention_chunk=8, max_seq_len=64, temperature_floor=4).eval(), ByteTokenizer()
    got = list(generate(model, tokenizer, "Tom ran", Sampling(max_new_tokens=30, temperature=0)))
    ids = [1, *tokenizer.encode("Tom ran")]
    for token in got:
        logits = model(torch.tensor([ids])).logits[0, -1]
        logits[[0, 1, 3]] = -torch.inf
        assert token == int(logits.argmax())
        ids.append(token)
    assert len(got) == 30 or int(model(torch.tensor([ids])).logits[0, -1].argmax()) == 2


def test_the_seed_decides_and_the_training_mode_stays():
    model, tokenizer = byte_model(), ByteTokenizer()
    model.train()
    first, same, other = (list(generate(model, tokenizer, "a", Sampling(20, seed=s))) for s in (1, 1, 2))
    assert first == same != other
    assert model.training
    model.eval()
    list(generate(model, tokenizer, "a", Sampling(2)))
    assert not model.training


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_batch_generates_the_story_of_each_prompt_alone(temperature):
    """The lengths differ, around a chunk of 8. Each story ends by itself and has its own random generator."""
    model, tokenizer = byte_model(attention_chunk=8, max_seq_len=40, temperature_floor=4, nope_every=2), ByteTokenizer()
    model.double().compute_dtype = torch.float64  # so that rounding changes no token
    with torch.no_grad():
        model.head.weight[tokenizer.eos] *= 3
    prompts = ["", "Tom ran", "a", "Mia saw a dog and", "abcdefg", "Tom ran", "x" * 38]
    keys = dict(temperature=temperature, top_p=0.95, repetition_penalty=1.1)
    together = [[] for _ in prompts]
    for number, token in generate_batch(model, tokenizer, prompts, Sampling(30, seed=5, **keys)):
        together[number].append(token)
    alone = [list(generate(model, tokenizer, p, Sampling(30, seed=5 + i, **keys))) for i, p in enumerate(prompts)]
    assert together == alone
    assert len({len(story) for story in alone}) > 2 and (temperature == 0) == (together[1] == together[5])
    assert list(generate_batch(model, tokenizer, [], Sampling())) == []


def test_gradients_stay_enabled_between_the_tokens():
    model = byte_model()
    for _ in generate(model, ByteTokenizer(), "a", Sampling(3, seed=1)):
        assert torch.is_grad_enabled()
        assert model(torch.tensor([[1, 5, 6]]), torch.tensor([[5, 6, 7]])).loss.requires_grad


def test_a_story_ends_at_the_longest_length_of_the_model():
    model, tokenizer = byte_model(max_seq_len=10), ByteTokenizer()
    model.head.weight.data[2] *= 1e-3  # no eos
    tokens = list(generate(model, tokenizer, "abc", Sampling(100, temperature=0)))
    assert len(tokens) == 7
    assert len(list(generate(model, tokenizer, "abcdefghi", Sampling(100, temperature=0)))) == 1
    with pytest.raises(UserError, match="--prompt: has 11 tokens, but the model accepts at most 10"):
        list(generate(model, tokenizer, "abcdefghij", Sampling()))


def test_control_tokens_are_never_chosen_and_eos_ends():
    model, tokenizer = byte_model(), ByteTokenizer()
    with torch.no_grad():
        model.head.weight.zero_()
    tokens = [t for s in range(20) for t in generate(model, tokenizer, "", Sampling(40, 1.0, seed=s))]
    assert not {0, 1, 2, 3} & set(tokens)
    with torch.no_grad():
        model.head.norm.weight.zero_()
    logits = torch.zeros(260)
    logits[2] = 9.0
    assert choose(logits, [], Sampling(temperature=0), torch.Generator()) == 2


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), top_k=st.integers(0, 8), top_p=st.floats(0.05, 1.0))
def test_top_k_and_top_p_keep_only_the_likeliest(seed, top_k, top_p):
    logits = torch.randn(8, generator=torch.Generator().manual_seed(seed))
    order = logits.argsort(descending=True).tolist()
    sampling = Sampling(temperature=1.0, top_k=top_k, top_p=top_p)
    generator = torch.Generator().manual_seed(seed)
    drawn = {choose(logits.clone(), [], sampling, generator) for _ in range(60)}
    kept = order[: top_k or 8]
    probabilities = torch.softmax(logits[kept], 0)
    allowed, mass = set(), 0.0
    for token, p in zip(kept, probabilities.tolist(), strict=True):
        if mass < top_p - 1e-6 or not allowed:
            allowed.add(token)
        mass += p
    assert drawn <= allowed


def test_top_p_keeps_more_tokens_than_it_sorts_first():
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=1.0, top_p=0.5)
    drawn = {choose(torch.linspace(0, 1e-3, 1000), [], sampling, generator) for _ in range(3000)}
    assert min(drawn) >= 499 and len(drawn) > 450


def test_a_temperature_near_zero_is_greedy():
    logits = torch.tensor([-1e30, 3.0, -torch.inf, 3.1])
    for temperature in (1e-30, 1e-45):
        assert choose(logits.clone(), [], Sampling(temperature=temperature), torch.Generator()) == 3


def test_the_repetition_penalty_lowers_seen_tokens():
    logits = torch.tensor([2.0, 1.9, -1.0, -1.1])
    greedy = Sampling(temperature=0, repetition_penalty=1.2)
    assert choose(logits.clone(), [0], greedy, torch.Generator()) == 1
    assert choose(torch.tensor([-1.0, -1.1]), [0], greedy, torch.Generator()) == 1
    assert choose(logits.clone(), [3], greedy, torch.Generator()) == 0


@pytest.mark.parametrize(
    "bad",
    [
        "--temperature=-1",
        "--temperature=nan",
        "--temperature=inf",
        "--top-p=0",
        "--top-k=-1",
        "--repetition-penalty=0",
        "--repetition-penalty=inf",
        "--max-new-tokens=0",
        f"--seed={2**63}",
    ],
)
def test_values_out_of_range_are_refused(bad):
    name, value = bad.split("=")
    with pytest.raises(UserError, match=rf"{name} {value}.*: out of range; should be "):
        main(["--checkpoint", "nowhere", bad])
    with pytest.raises(UserError, match="argument --top-k: invalid int value: 'many'"):
        main(["--checkpoint", "nowhere", "--top-k", "many"])


def test_text_is_streamed_in_whole_characters(loaded):
    model, tokenizer, _ = loaded
    pieces = list(generate_text(model, tokenizer, "Once \U0001f600", Sampling(60, temperature=3.0, seed=3)))
    ids = list(generate(model, tokenizer, "Once \U0001f600", Sampling(60, temperature=3.0, seed=3)))
    assert "".join(pieces) == tokenizer.decode(ids)


def test_the_command_prints_only_the_story_to_stdout(run, capsys):
    assert main(["--checkpoint", str(run), "--prompt", "Once", "--max-new-tokens", "5", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Once") and captured.out.endswith("\n")
    assert "step-00000003: step 3" in captured.err


def test_the_command_ends_when_the_reader_closes_the_pipe(run):
    command = [sys.executable, "-m", "trainer.generate", "--checkpoint", str(run), "--max-new-tokens", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.read(1) == "O"
        process.stdout.close()
        assert process.wait(200) == 0 and "Traceback" not in process.stderr.read()


def test_the_command_prints_the_stories_of_several_prompts(run, capsys):
    words = ["--checkpoint", str(run), "--max-new-tokens", "9", "--temperature", "0"]
    alone = []
    for prompt in ("Once", "Tom and", ""):
        assert main([*words, "--prompt", prompt]) == 0
        alone.append(capsys.readouterr().out.removesuffix("\n"))
    assert main([*words, "--prompt", "Once", "--prompt", "Tom and", "--prompt", ""]) == 0
    assert capsys.readouterr().out == SEPARATOR.join(alone) + "\n"
    with pytest.raises(UserError, match="--prompt: has .* tokens, but the model accepts at most 512"):
        main([*words, "--prompt", "Once", "--prompt", "Tom " * 600])
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["missing", "other", "unfinished"])
def test_an_unusable_checkpoint_is_reported_in_one_line(run, tmp_path, damage):
    path = tmp_path / "run"
    if damage != "missing":
        shutil.copytree(run, path)
    if damage == "unfinished":
        shutil.rmtree(path / "checkpoints" / "step-00000003")
    if damage == "other":
        manifest = path / "checkpoints" / "step-00000003" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
    command = [sys.executable, "-m", "trainer.generate", "--checkpoint", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1 and str(path) in result.stderr
