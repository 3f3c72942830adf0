import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data.settings import UserError
from data.sources.storybook import story
from data.tokenizer import Tokenizer, train
from tests.data.test_tokenizer import NASTY, STORIES, TEXTS, train_other_model
from trainer.hub.tokenizer import convert, export_tokenizer

pytest.importorskip("tokenizers", reason="the extra `hub` is not installed")

CODE = Path(__file__).read_text(encoding="utf-8")
HOSTILE = [
    *NASTY,
    story(0, 1),
    CODE,
    CODE.replace("\n", "\r\n"),
    CODE.replace("    ", "\t"),
    " lead",
    "trail ",
    "\n \n\t ",
    "<s>Once</s>",
    " <s> ",
    "<0x0A><0xFF>",
    "<0xE2><0x96><0x81>",
    "\u2581Once\u2581upon",
    "a\u2581 \u2581b",
    "\u2581" * 9,
    "ab" * 500,
    " " * 333,
    "🎉" * 50,
    "e\u0301 \u00e9 \ufb01 \u2167 \u1e9b\u0323",
    "\u202eevil\u202c",
    "\x1b[0m\x7f",
    "",
]
LLAMA2: dict[str, Any] = dict(remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("ours") / "tokenizer.model"
    train([*STORIES, *(story(0, number) for number in range(300)), CODE], 700, path)
    return Tokenizer(path)


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    """What `AutoTokenizer` makes of the export, as it lies beside a model."""
    transformers = pytest.importorskip("transformers", reason="the extra `hub` is not installed")
    folder = tmp_path_factory.mktemp("export")
    export_tokenizer(ours, folder, 96)
    beside = {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(beside))
    return transformers.AutoTokenizer.from_pretrained(folder)


def same(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = theirs(text)["input_ids"]
    assert ids == [ours.bos, *ours.encode(text)]
    assert theirs.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_encoded_as_by_us_and_come_back(ours, theirs, text):
    same(ours, theirs, text)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.lists(st.sampled_from([*NASTY, *STORIES[0].split(" "), *CODE.split("\n")])).map(" ".join))
def test_any_text_is_encoded_as_by_us_and_comes_back(ours, theirs, one, two):
    same(ours, theirs, one)
    same(ours, theirs, two)


def test_every_character_there_is(ours, theirs):
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 1 << 12):
        same(ours, theirs, "".join(characters[start : start + (1 << 12)]))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_order_of_merges_is_that_of_sentencepiece(tmp_path_factory, data):
    """Few letters and many pieces: here merges compete for the same letters."""
    texts = st.text(st.sampled_from(data.draw(st.sampled_from(["ab", "ab ", "aab c"]))), min_size=1, max_size=60)
    corpus = data.draw(st.lists(texts.filter(str.strip), min_size=3))
    path = tmp_path_factory.getbasetemp() / "letters.model"
    more: dict[str, Any] = dict(hard_vocab_limit=False, add_dummy_prefix=False, remove_extra_whitespaces=False)
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 4),
        model_writer=made,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        required_chars="\u2581",
        minloglevel=2,
        **more,
    )
    path.write_bytes(made.getvalue())
    tokenizer = Tokenizer(path)
    fast = convert(tokenizer)
    for text in [*corpus, *data.draw(st.lists(texts))]:
        assert fast.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


def test_what_it_says_of_itself(ours, theirs):
    assert theirs.is_fast and len(theirs) == ours.vocab_size and theirs.model_max_length == 96
    special = (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id)
    assert special == (ours.pad, ours.bos, ours.eos, ours.unk)
    assert [theirs.convert_ids_to_tokens(id) for id in special] == ["<pad>", "<s>", "</s>", "<unk>"]
    one, two = ours.encode("Once"), ours.encode("Once upon a time")
    width = len(two) + 1
    assert theirs(["Once", "Once upon a time"], padding=True) == {
        "input_ids": [[ours.bos, *one] + [ours.pad] * (width - 1 - len(one)), [ours.bos, *two]],
        "attention_mask": [[1] * (1 + len(one)) + [0] * (width - 1 - len(one)), [1] * width],
    }
    assert theirs.encode("Once", add_special_tokens=False) == one
    assert theirs.decode([ours.bos, *one, ours.eos]) == "<s>Once</s>"


def test_it_stays_the_same_when_saved_again(ours, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    again = type(theirs).from_pretrained(tmp_path)
    for text in HOSTILE:
        same(ours, again, text)


def test_ids_of_others(tmp_path):
    """bos is 0, and no pad: what stands at a place of its own must not be guessed."""
    ids = {"bos_id": 0, "eos_id": 3, "unk_id": 1, "pad_id": -1, "bos_piece": "<begin of>", "eos_piece": "[END]"}
    plain = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
    other = Tokenizer(train_other_model(tmp_path / "m.model", **ids, **plain))
    export_tokenizer(other, tmp_path, 10)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, theirs.pad_token_id) == (0, 3, 1, 3)
    for text in [*HOSTILE, "<begin of>[END]"]:
        same(other, theirs, text)


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(TEXTS, st.sampled_from(HOSTILE)))
def test_models_like_llama_2(others, text):
    tokenizer, fast = others
    text = text.replace("\u2581", "")
    ids = fast.encode(text).ids
    assert ids == [tokenizer.bos, *tokenizer.encode(text)]
    assert fast.decode(ids) == tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama2")
    tokenizer = Tokenizer(train_other_model(folder / "m.model", **LLAMA2))
    export_tokenizer(tokenizer, folder, 10)
    return tokenizer, convert(tokenizer)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_models_without_bytes(lossy, text):
    tokenizer, fast = lossy
    text = text.replace("\u2581", "")
    assert fast.encode(text).ids == [tokenizer.bos, *tokenizer.encode(text)]


@pytest.fixture(scope="module")
def lossy(tmp_path_factory):
    path = tmp_path_factory.mktemp("lossy") / "m.model"
    more = dict(byte_fallback=False, vocab_size=60, add_dummy_prefix=False, remove_extra_whitespaces=False)
    tokenizer = Tokenizer(train_other_model(path, **more))
    return tokenizer, convert(tokenizer)


@pytest.mark.parametrize(
    "more, why",
    [
        ({"normalization_rule_name": "nmt_nfkc"}, r"it changes texts .*\(nmt_nfkc\)"),
        ({"remove_extra_whitespaces": True}, "it changes texts before"),
        ({"treat_whitespace_as_suffix": True}, "it treats blanks in a way of its own"),
        ({"user_defined_symbols": ["cat"]}, "it has user-defined or unused pieces"),
    ],
)
def test_models_that_cannot_be_written_so_are_refused(tmp_path, more, why):
    tokenizer = Tokenizer(train_other_model(tmp_path / "m.model", **{"remove_extra_whitespaces": False} | more))
    with pytest.raises(UserError, match=rf"m\.model: cannot be written as tokenizer\.json, since {why}"):
        export_tokenizer(tokenizer, tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["m.model"]


def test_a_model_without_a_blank_is_refused(tmp_path):
    """To sentencepiece a blank is then the bytes of U+2581, and comes back as that."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["漢字"] * 9),
        model_writer=made,
        model_type="bpe",
        vocab_size=262,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (tmp_path / "m.model").write_bytes(made.getvalue())
    with pytest.raises(UserError, match="since it has no piece for a blank"):
        export_tokenizer(Tokenizer(tmp_path / "m.model"), tmp_path, 10)


def test_without_the_extra_it_says_what_to_install(ours, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[hub\]'"):
        export_tokenizer(ours, tmp_path, 10)
