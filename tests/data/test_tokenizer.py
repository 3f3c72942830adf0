import io
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data.settings import UserError
from data.tokenizer import (
    BOS,
    EOS,
    PAD,
    UNK,
    UNTRAINABLE,
    CachedEncoder,
    StreamDecoder,
    Tokenizer,
    sample,
    split_text,
    train,
)

WORDS = "the a cat dog Lily Tom ran sat saw and then happy little big tree ball said was very to in home".split()
NASTY = [
    *UNTRAINABLE,
    "\t",
    "\r",
    "\r\n",
    "\n",
    "\n\n",
    " ",
    "  ",
    "\u00a0",
    "\u3000",
    "\u200b",
    "\u2028",
    "\ufeff",
    "\ufffd",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<0x41>",
    "<0x0A>",
    "<|endoftext|>",
    "\u2047",
    " \u2047 ",
    "\U0010ffff",
    "\uffff",
    "🎉",
    "👨‍👩‍👧",
    "漢字",
    "é",
    "e\u0301",
    "…",
    "â€œ",
    "0123",
    "cat",
    " the",
    ".",
]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(NASTY)).map("".join))


def story(number: int) -> str:
    draw = random.Random(number)
    lines = [" ".join(draw.choices(WORDS, k=9)) + "." for _ in range(5)]
    return "\n\n".join(lines) + (" 漢" if number % 50 == 0 else "")


STORIES = [story(number) for number in range(300)]


def train_other_model(path: Path, texts: Sequence[str] = STORIES, **settings: Any) -> Path:
    """Trains a model with settings that differ from ours."""
    model = io.BytesIO()
    settings = {"vocab_size": 330, "byte_fallback": True, "normalization_rule_name": "identity"} | settings
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", minloglevel=2, **settings
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train(STORIES, 340, path)
    return Tokenizer(path)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    """Models like that of Llama 2: they put a space before each text, and have other ids; the second drops spaces."""
    folder = tmp_path_factory.mktemp("others")
    ids: dict[str, Any] = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    one = train_other_model(folder / "one.model", remove_extra_whitespaces=False, **ids)
    two = train_other_model(folder / "two.model", remove_extra_whitespaces=True, unk_surface="?", **ids)
    return [Tokenizer(one), Tokenizer(two)]


def test_a_trained_model_has_our_control_ids(ours):
    assert (ours.pad, ours.bos, ours.eos, ours.unk) == (PAD, BOS, EOS, UNK) == (0, 1, 2, 3)
    assert ours.vocab_size == 340


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_any_text_decodes_to_itself_without_control_ids(ours, text):
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert min(ids, default=UNK + 1) > UNK


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(TEXTS))
def test_concatenated_texts_decode_to_their_concatenation(ours, texts):
    ids = [id for text in texts for id in ours.encode(text)]
    assert ours.decode([ours.bos, *ids, ours.eos]) == "".join(texts)


def test_spaces_survive_a_model_that_hardly_saw_any(tmp_path):
    texts = ["".join(chr(0x4E00 + (number * n) % 97) for n in range(2000)) for number in range(1, 20)]
    for name, corpus in (("none", texts), ("one", [*texts, "漢 字"])):
        train(corpus, 400, tmp_path / name)
        tokenizer = Tokenizer(tmp_path / name)
        assert tokenizer.decode(tokenizer.encode(" a  b\u2581 漢")) == " a  b\u2581 漢"


def test_newlines_take_part_in_merges(ours):
    assert len(ours.encode("home.\n\nthe")) < len(ours.encode("home.")) + 2 + len(ours.encode("the"))


def test_the_same_texts_give_the_same_model(ours, tmp_path):
    code = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[2:]\n"
        "from data.tokenizer import train; from test_tokenizer import STORIES; train(STORIES, 340, Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "repeated.model"), ".", "tests/data"]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"})
    assert (tmp_path / "repeated.model").read_bytes() == ours.path.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["repeated.model"]


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.tuples(TEXTS, st.integers(1, 400))))
def test_splitting_a_text_loses_nothing(parts):
    text = "".join(part * times for part, times in parts)
    split = split_text(text)
    assert "".join(split) == text.translate(dict.fromkeys(map(ord, UNTRAINABLE)))
    assert all(0 < len(part.encode()) <= 4000 for part in split)


def test_texts_are_split_before_spaces():
    text = "one two three " * 500
    assert all(part.startswith((" two", " three", " one")) for part in split_text(text)[1:])


@pytest.mark.parametrize("neighbour", ["\u2585", "\0", "\u2581", "\n", "\r\n", "x" * 5000, "漢" * 1500, "…"])
def test_no_story_is_skipped_in_training(tmp_path, neighbour):
    """`wugwug` occurs only in stories with characters that would make sentencepiece skip them."""
    train([*STORIES, *[f"{neighbour} {'wugwug ' * 50}{neighbour}"] * 30], 360, tmp_path / "model")
    assert len(Tokenizer(tmp_path / "model").encode("wugwug")) <= 2


@given(size=st.integers(0, 300), max_bytes=st.integers(1, 400))
def test_the_sample_is_bounded_and_even(size, max_bytes):
    parts = [f"{number:04}" for number in range(size)]
    kept = sample(parts, max_bytes)
    stride = next(2**k for k in range(20) if len(parts[:: 2**k]) * 4 <= max_bytes or 2**k >= size)
    assert kept == parts[::stride]


def test_an_error_names_the_largest_possible_vocabulary(tmp_path):
    with pytest.raises(UserError) as error:
        train(STORIES, 9000, tmp_path / "model")
    message = r"data.vocab_size=9000: the corpus yields at most (\d+) pieces; use data.vocab_size=\1 or more text"
    assert (match := re.fullmatch(message, str(error.value)))
    largest = int(match[1])
    assert list(tmp_path.iterdir()) == []
    train(STORIES, largest, tmp_path / "model")
    assert Tokenizer(tmp_path / "model").vocab_size == largest
    with pytest.raises(UserError, match=f"at most {largest}"):
        train(STORIES, largest + 1, tmp_path / "model")


def test_an_error_names_the_smallest_possible_vocabulary(tmp_path):
    alphabet = ["".join(chr(0x4E00 + i) for i in range(300))] * 3
    with pytest.raises(UserError, match="data.vocab_size=300: .* needs 561 .* use data.vocab_size=561 or more"):
        train(alphabet, 300, tmp_path / "model")
    train(alphabet, 561, tmp_path / "model")


@pytest.mark.parametrize("texts", [[], [""], ["\n"], ["\u2585\0\u2581"]])
def test_training_without_text_is_refused(tmp_path, texts):
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        train(texts, 300, tmp_path / "model")


def test_a_lone_surrogate_is_refused(ours):
    for text in ("a\ud800b", "\u2581\ud800"):
        with pytest.raises(UserError, match="lone surrogate"):
            ours.encode(text)


def test_other_models_keep_their_own_ids(ours, others):
    for tokenizer in others:
        assert (tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2, 2)
        assert tokenizer.vocab_size == 330
        assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
        assert {1, 2}.isdisjoint(tokenizer.encode("<s> </s>"))
    assert len({tokenizer.hash for tokenizer in [ours, *others]}) == 3


def test_unsuitable_models_are_refused(tmp_path):
    (tmp_path / "junk.model").write_bytes(b"junk")
    (tmp_path / "empty.model").write_bytes(b"")
    train_other_model(tmp_path / "bos.model", bos_id=-1)
    train_other_model(tmp_path / "eos.model", eos_id=-1)
    train_other_model(tmp_path / "spelled.model", user_defined_symbols=["<s>"])  # a text could yield this bos
    for name, problem in [
        ("junk", "not a sentencepiece model"),
        ("empty", "not a sentencepiece model"),
        ("none", "the tokenizer cannot be read"),
        ("bos", "no separate bos id"),
        ("eos", "no separate eos id"),
        ("spelled", "no separate bos id"),
    ]:
        with pytest.raises(UserError, match=rf"{name}\.model: .*{problem}"):
            Tokenizer(tmp_path / f"{name}.model")


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.add(id) for id in ids), decoder.flush()]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_streamed_text_is_the_decoded_text(ours, others, data):
    tokenizer = data.draw(st.sampled_from([ours, *others]))
    spaces = tokenizer.encode("a b  c")[1:-1]
    ids = st.one_of(st.integers(0, tokenizer.vocab_size - 1), st.integers(0, 260), st.sampled_from(spaces))
    character = st.sampled_from("é漢🎉\u2581\ufffd").map(tokenizer.encode)
    cut_character = character.map(lambda ids: ids[:-1])
    parts = data.draw(st.lists(st.one_of(ids.map(lambda id: [id]), character, cut_character)))
    drawn = [id for part in parts for id in part]
    assert "".join(streamed(tokenizer, drawn)) == tokenizer.decode(drawn)


def test_a_stream_never_shows_half_a_character(ours):
    text = "a 🎉 and 漢字, é…"
    shown = streamed(ours, ours.encode(text))
    assert "".join(shown) == text and "\ufffd" not in "".join(shown)
    assert [part for part in shown if part] == ["a", " ", "🎉", " and", " ", "漢", "字", ",", " ", "é", "…"]


def test_a_stream_shows_a_character_once_it_is_complete(ours):
    decoder = StreamDecoder(ours)
    assert [decoder.add(id) for id in ours.encode("🎉")] == ["", "", "", "🎉"]
    assert decoder.flush() == ""


def encode_whole(tokenizer: Tokenizer, text: str) -> tuple[list[int], bool]:
    """The expected result of `CachedEncoder.encode`, by sentencepiece alone."""
    ids = tokenizer.encode(text)
    return ids, tokenizer.decode(ids) == text


def encode_cached(encoder: CachedEncoder, text: str) -> tuple[list[int], bool]:
    ids, is_lossless = encoder.encode(text)
    return np.frombuffer(ids, np.uint32).tolist(), is_lossless


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    """Models without byte pieces: an unknown character becomes unk. The second also normalizes characters."""
    folder = tmp_path_factory.mktemp("lossy")
    lossy: dict[str, Any] = {"byte_fallback": False, "vocab_size": 80}
    lossy |= {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
    one = train_other_model(folder / "one.model", **lossy)
    two = train_other_model(folder / "two.model", **lossy, normalization_rule_name="nmt_nfkc")
    return [Tokenizer(one), Tokenizer(two)]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_the_cached_encoder_gives_the_ids_of_sentencepiece(ours, others, lossy, data):
    tokenizer = data.draw(st.sampled_from([ours, *lossy, *others]))
    encoder = CachedEncoder(tokenizer)
    assert encoder.is_word_based or tokenizer not in [ours, lossy[0]]
    letters = st.text(st.sampled_from("ab. \n\t\u2581\u3000\u2047é漢🎉<s>0Tthe"), max_size=30)
    texts = data.draw(st.lists(st.one_of(TEXTS, letters, st.sampled_from(STORIES[:60]))))
    for text in texts * 2:  # the second time from the cache
        assert encode_cached(encoder, text) == encode_whole(tokenizer, text)


@pytest.mark.parametrize(
    "setting", [{"add_dummy_prefix": True}, {"remove_extra_whitespaces": True}, {"split_by_whitespace": False}]
)
def test_models_with_other_rules_for_spaces_encode_whole_texts(tmp_path, setting):
    texts = ["the cat sat on the mat and the cat ran to the mat"] * 50
    settings = {"vocab_size": 300, "add_dummy_prefix": False, "remove_extra_whitespaces": False} | setting
    other = Tokenizer(train_other_model(tmp_path / "other.model", texts, **settings))
    encoder = CachedEncoder(other)
    assert not encoder.is_word_based
    assert encode_cached(encoder, "the  cat sat ") == encode_whole(other, "the  cat sat ")


def test_the_cache_of_words_is_bounded(ours):
    encoder = CachedEncoder(ours)
    encoder.MAX_CACHED_WORDS = 100
    texts = [f"{n} x{n} {'y' * 100}" for n in range(500)]
    assert [encode_cached(encoder, text) for text in texts] == [encode_whole(ours, text) for text in texts]
    assert len(encoder._next_words) <= 100 and len(encoder._first_words) <= 100
