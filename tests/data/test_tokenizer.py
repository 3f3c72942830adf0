import io
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data.settings import UserError
from data.tokenizer import BOS, EOS, PAD, UNK, UNTRAINABLE, StreamDecoder, Tokenizer, Words, pieces, sample, train

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


def model_of_others(path: Path, **settings: Any) -> Path:
    """A model with settings that ours never has."""
    model = io.BytesIO()
    settings = {"vocab_size": 330, "byte_fallback": True, "normalization_rule_name": "identity"} | settings
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(STORIES), model_writer=model, model_type="bpe", minloglevel=2, **settings
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train(STORIES, 340, path)
    return Tokenizer(path)


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    """As Llama 2 does it: a blank before each text, ids of their own; the second drops blanks besides."""
    folder = tmp_path_factory.mktemp("strangers")
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    one = model_of_others(folder / "one.model", remove_extra_whitespaces=False, **ids)
    two = model_of_others(folder / "two.model", remove_extra_whitespaces=True, unk_surface="?", **ids)
    return [Tokenizer(one), Tokenizer(two)]


def test_ids_are_ours(ours):
    assert (ours.pad, ours.bos, ours.eos, ours.unk) == (PAD, BOS, EOS, UNK) == (0, 1, 2, 3)
    assert ours.vocab_size == 340


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_any_text_comes_back_and_yields_no_control_id(ours, text):
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert min(ids, default=UNK + 1) > UNK


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(TEXTS))
def test_texts_end_to_end_are_the_texts(ours, texts):
    ids = [ours.encode(text) for text in texts]
    assert ours.decode([ours.bos, *(i for its in ids for i in its), ours.eos]) == "".join(texts)


def test_blanks_come_back_from_a_model_that_hardly_saw_one(tmp_path):
    texts = ["".join(chr(0x4E00 + (number * n) % 97) for n in range(2000)) for number in range(1, 20)]
    for name, corpus in (("none", texts), ("one", [*texts, "漢 字"])):
        train(corpus, 400, tmp_path / name)
        tokenizer = Tokenizer(tmp_path / name)
        assert tokenizer.decode(tokenizer.encode(" a  b\u2581 漢")) == " a  b\u2581 漢"


def test_newlines_take_part_in_merges(ours):
    assert len(ours.encode("home.\n\nthe")) < len(ours.encode("home.")) + 2 + len(ours.encode("the"))


def test_the_same_text_gives_the_same_model(ours, tmp_path):
    code = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[2:]\n"
        "from data.tokenizer import train; from test_tokenizer import STORIES; train(STORIES, 340, Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "again.model"), ".", "tests/data"]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"})
    assert (tmp_path / "again.model").read_bytes() == ours.path.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.model"]


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.tuples(TEXTS, st.integers(1, 400))))
def test_pieces_lose_nothing_and_are_short(parts):
    text = "".join(part * times for part, times in parts)
    cut = pieces(text)
    assert "".join(cut) == text.translate(dict.fromkeys(map(ord, UNTRAINABLE)))
    assert all(0 < len(piece.encode()) <= 4000 for piece in cut)


def test_pieces_are_cut_before_blanks():
    text = "one two three " * 500
    assert all(piece.startswith((" two", " three", " one")) for piece in pieces(text)[1:])


@pytest.mark.parametrize("neighbour", ["\u2585", "\0", "\u2581", "\n", "\r\n", "x" * 5000, "漢" * 1500, "…"])
def test_no_story_is_skipped_in_training(tmp_path, neighbour):
    """`wugwug` stands in one kind of story only, beside what sentencepiece by itself would stumble over."""
    train([*STORIES, *[f"{neighbour} {'wugwug ' * 50}{neighbour}"] * 30], 360, tmp_path / "model")
    assert len(Tokenizer(tmp_path / "model").encode("wugwug")) <= 2


@given(size=st.integers(0, 300), limit=st.integers(1, 400))
def test_the_sample_is_bounded_and_even(size, limit):
    parts = [f"{number:04}" for number in range(size)]
    kept = sample(parts, limit)
    stride = next(2**k for k in range(20) if len(parts[:: 2**k]) * 4 <= limit or 2**k >= size)
    assert kept == parts[::stride]


def test_too_large_a_vocabulary_offers_the_largest(tmp_path):
    with pytest.raises(UserError) as error:
        train(STORIES, 9000, tmp_path / "model")
    said = r"data.vocab_size=9000: the corpus yields at most (\d+) pieces; use data.vocab_size=\1 or more text"
    assert (match := re.fullmatch(said, str(error.value)))
    most = int(match[1])
    assert list(tmp_path.iterdir()) == []
    train(STORIES, most, tmp_path / "model")
    assert Tokenizer(tmp_path / "model").vocab_size == most
    with pytest.raises(UserError, match=f"at most {most}"):
        train(STORIES, most + 1, tmp_path / "model")


def test_too_small_a_vocabulary_offers_the_smallest(tmp_path):
    alphabet = ["".join(chr(0x4E00 + i) for i in range(300))] * 3
    with pytest.raises(UserError, match="data.vocab_size=300: .* needs 561 .* use data.vocab_size=561 or more"):
        train(alphabet, 300, tmp_path / "model")
    train(alphabet, 561, tmp_path / "model")


@pytest.mark.parametrize("texts", [[], [""], ["\n"], ["\u2585\0\u2581"]])
def test_no_text_no_tokenizer(tmp_path, texts):
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        train(texts, 300, tmp_path / "model")


def test_half_a_surrogate_is_refused(ours):
    for text in ("a\ud800b", "\u2581\ud800"):
        with pytest.raises(UserError, match="lone surrogate"):
            ours.encode(text)


def test_models_of_others(ours, strangers):
    for tokenizer in strangers:
        assert (tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2, 2)
        assert tokenizer.vocab_size == 330
        assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
        assert {1, 2}.isdisjoint(tokenizer.encode("<s> </s>"))
    assert len({tokenizer.hash for tokenizer in [ours, *strangers]}) == 3


def test_models_that_cannot_serve(tmp_path):
    (tmp_path / "junk.model").write_bytes(b"junk")
    (tmp_path / "empty.model").write_bytes(b"")
    model_of_others(tmp_path / "bos.model", bos_id=-1)
    model_of_others(tmp_path / "eos.model", eos_id=-1)
    model_of_others(tmp_path / "spelled.model", user_defined_symbols=["<s>"])  # a text could yield this bos
    for name, why in [
        ("junk", "not a sentencepiece model"),
        ("empty", "not a sentencepiece model"),
        ("none", "no tokenizer can be read there"),
        ("bos", "no bos of its own"),
        ("eos", "no eos of its own"),
        ("spelled", "no bos of its own"),
    ]:
        with pytest.raises(UserError, match=rf"{name}\.model: .*{why}"):
            Tokenizer(tmp_path / f"{name}.model")


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.add(id) for id in ids), decoder.flush()]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_stream_is_the_whole(ours, strangers, data):
    tokenizer = data.draw(st.sampled_from([ours, *strangers]))
    blank = tokenizer.encode("a b  c")[1:-1]
    ids = st.one_of(st.integers(0, tokenizer.vocab_size - 1), st.integers(0, 260), st.sampled_from(blank))
    character = st.sampled_from("é漢🎉\u2581\ufffd").map(tokenizer.encode)
    some = data.draw(st.lists(st.one_of(ids.map(lambda id: [id]), character, character.map(lambda ids: ids[:-1]))))
    flat = [id for part in some for id in part]
    assert "".join(streamed(tokenizer, flat)) == tokenizer.decode(flat)


def test_a_stream_never_shows_half_a_character(ours):
    text = "a 🎉 and 漢字, é…"
    shown = streamed(ours, ours.encode(text))
    assert "".join(shown) == text and "\ufffd" not in "".join(shown)
    assert [part for part in shown if part] == ["a", " ", "🎉", " and", " ", "漢", "字", ",", " ", "é", "…"]


def test_a_stream_shows_a_character_as_soon_as_it_is_whole(ours):
    decoder = StreamDecoder(ours)
    assert [decoder.add(id) for id in ours.encode("🎉")] == ["", "", "", "🎉"]
    assert decoder.flush() == ""


def checked(tokenizer: Tokenizer, text: str) -> tuple[list[int], bool]:
    """What `Words` should say of a text, by sentencepiece alone."""
    ids = tokenizer.encode(text)
    return ids, tokenizer.decode(ids) == text


def by_words(words: Words, text: str) -> tuple[list[int], bool]:
    ids, came_back = words.encode(text)
    return np.frombuffer(ids, np.uint32).tolist(), came_back


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    """Without bytes a strange character becomes unk; the second model changes characters besides."""
    folder = tmp_path_factory.mktemp("lossy")
    more = dict(byte_fallback=False, vocab_size=80, add_dummy_prefix=False, remove_extra_whitespaces=False)
    changing = {"normalization_rule_name": "nmt_nfkc"}
    return [Tokenizer(model_of_others(folder / f"{n}.model", **more, **way)) for n, way in enumerate([{}, changing])]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_word_by_word_says_the_same_as_text_by_text(ours, strangers, lossy, data):
    tokenizer = data.draw(st.sampled_from([ours, *lossy, *strangers]))
    words = Words(tokenizer)
    assert words.fits or tokenizer not in [ours, lossy[0]]
    letters = st.text(st.sampled_from("ab. \n\t\u2581\u3000\u2047é漢🎉<s>0Tthe"), max_size=30)
    texts = data.draw(st.lists(st.one_of(TEXTS, letters, st.sampled_from(STORIES[:60]))))
    for text in texts * 2:  # learnt, then remembered
        assert by_words(words, text) == checked(tokenizer, text)


def test_models_with_other_ways_of_blanks_are_asked_text_by_text(tmp_path):
    import sentencepiece

    ways = [{"add_dummy_prefix": True}, {"remove_extra_whitespaces": True}, {"split_by_whitespace": False}]
    for number, way in enumerate(ways):
        settings = {"add_dummy_prefix": False, "remove_extra_whitespaces": False} | way
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat and the cat ran to the mat"] * 50),
            vocab_size=300,
            model_prefix=str(tmp_path / str(number)),
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
            **settings,
        )
        other = Tokenizer(tmp_path / f"{number}.model")
        words = Words(other)
        assert not words.fits
        assert by_words(words, "the  cat sat ") == checked(other, "the  cat sat ")


def test_words_do_not_fill_the_memory(ours):
    words = Words(ours)
    words.MOST = 100
    texts = [f"{n} x{n} {'y' * 100}" for n in range(500)]
    assert [by_words(words, text) for text in texts] == [checked(ours, text) for text in texts]
    assert len(words._later) <= 100 and len(words._first) <= 100
