"""The converted tokenizer encodes and decodes exactly as ours."""

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
def converted(ours, tmp_path_factory):
    """The export as `AutoTokenizer` loads it from the folder of a model."""
    transformers = pytest.importorskip("transformers", reason="the extra `hub` is not installed")
    folder = tmp_path_factory.mktemp("export")
    export_tokenizer(ours, folder, 96)
    model_config = {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(model_config))
    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_same(ours: Tokenizer, converted: Any, text: str) -> None:
    ids = converted(text)["input_ids"]
    assert ids == [ours.bos, *ours.encode(text)]
    assert converted.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_have_the_same_ids_and_decode_back(ours, converted, text):
    assert_same(ours, converted, text)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.lists(st.sampled_from([*NASTY, *STORIES[0].split(" "), *CODE.split("\n")])).map(" ".join))
def test_any_text_has_the_same_ids_and_decodes_back(ours, converted, one, two):
    assert_same(ours, converted, one)
    assert_same(ours, converted, two)


def test_every_unicode_character_has_the_same_ids(ours, converted):
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 1 << 12):
        assert_same(ours, converted, "".join(characters[start : start + (1 << 12)]))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_merges_are_in_the_order_of_sentencepiece(tmp_path_factory, data):
    """With few letters and many pieces, the merges compete for the same letters."""
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
    converted = convert(tokenizer)
    for text in [*corpus, *data.draw(st.lists(texts))]:
        assert converted.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


def test_special_tokens_padding_and_sizes_are_ours(ours, converted):
    assert converted.is_fast and len(converted) == ours.vocab_size and converted.model_max_length == 96
    special = (converted.pad_token_id, converted.bos_token_id, converted.eos_token_id, converted.unk_token_id)
    assert special == (ours.pad, ours.bos, ours.eos, ours.unk)
    assert [converted.convert_ids_to_tokens(id) for id in special] == ["<pad>", "<s>", "</s>", "<unk>"]
    short, long = ours.encode("Once"), ours.encode("Once upon a time")
    n_pad = len(long) - len(short)
    assert converted(["Once", "Once upon a time"], padding=True) == {
        "input_ids": [[ours.bos, *short] + [ours.pad] * n_pad, [ours.bos, *long]],
        "attention_mask": [[1] * (1 + len(short)) + [0] * n_pad, [1] * (1 + len(long))],
    }
    assert converted.encode("Once", add_special_tokens=False) == short
    assert converted.decode([ours.bos, *short, ours.eos]) == "<s>Once</s>"


def test_a_tokenizer_saved_by_transformers_stays_the_same(ours, converted, tmp_path):
    converted.save_pretrained(tmp_path)
    reloaded = type(converted).from_pretrained(tmp_path)
    for text in HOSTILE:
        assert_same(ours, reloaded, text)


def test_special_tokens_may_have_other_ids_and_names(tmp_path):
    """bos is 0 and there is no pad, so the ids must be read from the model."""
    ids = {"bos_id": 0, "eos_id": 3, "unk_id": 1, "pad_id": -1, "bos_piece": "<begin of>", "eos_piece": "[END]"}
    plain = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
    other = Tokenizer(train_other_model(tmp_path / "m.model", **ids, **plain))
    export_tokenizer(other, tmp_path, 10)
    converted = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    special = (converted.bos_token_id, converted.eos_token_id, converted.unk_token_id, converted.pad_token_id)
    assert special == (0, 3, 1, 3)
    for text in [*HOSTILE, "<begin of>[END]"]:
        assert_same(other, converted, text)


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(TEXTS, st.sampled_from(HOSTILE)))
def test_a_model_like_that_of_llama_2_has_the_same_ids(llama2, text):
    tokenizer, converted = llama2
    text = text.replace("\u2581", "")
    ids = converted.encode(text).ids
    assert ids == [tokenizer.bos, *tokenizer.encode(text)]
    assert converted.decode(ids) == tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def llama2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama2")
    tokenizer = Tokenizer(train_other_model(folder / "m.model", **LLAMA2))
    export_tokenizer(tokenizer, folder, 10)
    return tokenizer, convert(tokenizer)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_a_model_without_byte_pieces_has_the_same_ids(no_bytes, text):
    tokenizer, converted = no_bytes
    text = text.replace("\u2581", "")
    assert converted.encode(text).ids == [tokenizer.bos, *tokenizer.encode(text)]


@pytest.fixture(scope="module")
def no_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("no_bytes") / "m.model"
    more = dict(byte_fallback=False, vocab_size=60, add_dummy_prefix=False, remove_extra_whitespaces=False)
    tokenizer = Tokenizer(train_other_model(path, **more))
    return tokenizer, convert(tokenizer)


@pytest.mark.parametrize(
    "more, why",
    [
        ({"normalization_rule_name": "nmt_nfkc"}, r"it changes texts .*\(nmt_nfkc\)"),
        ({"remove_extra_whitespaces": True}, "it changes texts before"),
        ({"treat_whitespace_as_suffix": True}, "it marks spaces in an unsupported way"),
        ({"user_defined_symbols": ["cat"]}, "it has user-defined or unused pieces"),
    ],
)
def test_models_that_cannot_be_converted_are_refused(tmp_path, more, why):
    tokenizer = Tokenizer(train_other_model(tmp_path / "m.model", **{"remove_extra_whitespaces": False} | more))
    with pytest.raises(UserError, match=rf"m\.model: cannot be converted to tokenizer\.json, because {why}"):
        export_tokenizer(tokenizer, tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["m.model"]


def test_a_model_without_a_piece_for_a_space_is_refused(tmp_path):
    """With such a model, sentencepiece encodes a space as the bytes of U+2581, and decodes them to U+2581."""
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
    with pytest.raises(UserError, match="because it has no piece for a space"):
        export_tokenizer(Tokenizer(tmp_path / "m.model"), tmp_path, 10)


def test_without_the_extra_the_error_names_the_command(ours, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[hub\]'"):
        export_tokenizer(ours, tmp_path, 10)
