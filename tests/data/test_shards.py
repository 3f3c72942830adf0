import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig
from data.prepare import prepare
from data.settings import UserError
from data.shards import HEADER, MAX_OPEN_SHARDS, Corpus, Header, Shard, Writer, token_bytes
from data.tokenizer import Tokenizer, train

NAMES, SIZES, THINGS = "Tom Lily Ann Bo".split(), "big red old wet new".split(), "dog cat hat car pond".split()
STORIES = [f"{name} saw a {size} {thing}.\n{name} was glad." for name in NAMES for size in SIZES for thing in THINGS]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train(STORIES, 300, path)
    return Tokenizer(path)


def grown(tokenizer: Tokenizer, vocab_size: int, path: Path) -> Tokenizer:
    """The same model with more pieces, encoded as protobuf: field 1 of a model is a piece, its field 1 the text."""
    appended = []
    for number in range(tokenizer.vocab_size, vocab_size):
        text = f"w{number}".encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -number)
        appended.append(b"\x0a" + bytes([len(piece)]) + piece)
    path.write_bytes(tokenizer.path.read_bytes() + b"".join(appended))
    return Tokenizer(path)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(STORIES), encoding="utf-8")
    return prepare(config_of(tmp_path))[0]


def config_of(folder: Path, **changes: object) -> DataConfig:
    settings = {"source": str(folder / "stories.txt"), "dir": str(folder / "corpus"), "vocab_size": 300}
    return DataConfig.model_validate(settings | {"validation": "0.3", "shard_tokens": 100} | changes)


IDS = st.lists(st.integers(4, 299), max_size=12)
LOG_PROBS = st.floats(-1e6, 0)


@settings(max_examples=60, deadline=None)
@given(
    stories=st.lists(st.tuples(IDS, st.integers(0, 2**32 - 1), LOG_PROBS), min_size=1, max_size=20),
    shard_tokens=st.integers(1, 60),
    with_log_prob=st.sampled_from(["all", "none", "some"]),
)
def test_shards_return_the_stories_that_were_written(small, tmp_path_factory, stories, shard_tokens, with_log_prob):
    folder = tmp_path_factory.mktemp("shards")
    with Writer(folder, "train", small, shard_tokens) as writer:
        for number, (ids, text_bytes, log_prob) in enumerate(stories):
            is_known = with_log_prob == "all" or (with_log_prob == "some" and number % 2)
            writer.add(ids, text_bytes, log_prob if is_known else None)
    assert sorted(p.name for p in folder.iterdir()) == [info.path for info in writer.info.shards]
    assert writer.info.documents == len(stories)
    assert writer.info.tokens == sum(len(ids) + 2 for ids, _, _ in stories)
    assert writer.info.text_bytes == sum(text_bytes for _, text_bytes, _ in stories)
    expected = iter(stories)
    for info in writer.info.shards:
        shard = Shard(folder / info.path)
        shard.verify()
        assert (len(shard.tokens), len(shard.text_bytes)) == (info.tokens, info.documents)
        assert (shard.starts[0], shard.starts[-1], len(shard.starts)) == (0, info.tokens, info.documents + 1)
        assert info.tokens <= shard_tokens or info.documents == 1
        for i in range(info.documents):
            ids, text_bytes, log_prob = next(expected)
            stored = shard.tokens[shard.starts[i] : shard.starts[i + 1]]
            assert stored.tolist() == [small.bos, *ids, small.eos]
            assert shard.text_bytes[i] == text_bytes
            if with_log_prob == "all":
                assert shard.log_probs is not None and shard.log_probs[i] == log_prob
        assert with_log_prob != "none" or shard.log_probs is None
        arrays = [shard.tokens, shard.starts, shard.text_bytes]
        if shard.log_probs is not None:
            arrays.append(shard.log_probs)
        assert [array.dtype.str for array in arrays] == ["<u2", "<i8", "<u4", "<f8"][: len(arrays)]
        assert all(array.flags.aligned and not array.flags.writeable for array in arrays)
    assert next(expected, None) is None


def test_a_story_that_does_not_fit_starts_a_new_shard(small, tmp_path):
    with Writer(tmp_path, "train", small, 10) as writer:
        for length in (3, 3, 3, 18, 8, 8):  # 5, 5 | 5 | 20 | 10 | 10
            writer.add([5] * length, 1)
    assert [info.tokens for info in writer.info.shards] == [10, 5, 20, 10, 10]


@pytest.mark.parametrize("vocab_size, width", [(65535, 2), (65536, 2), (65537, 4)])
def test_the_largest_id_of_a_vocabulary_is_stored(small, tmp_path, vocab_size, width):
    tokenizer = grown(small, vocab_size, tmp_path / "grown.model")
    assert tokenizer.vocab_size == vocab_size
    with Writer(tmp_path, "train", tokenizer, 100) as writer:
        writer.add([vocab_size - 1], 3)
        for outside in (vocab_size, -1, 1 << 40):
            with pytest.raises(ValueError, match="vocabulary"):
                writer.add([outside], 3)
    shard = Shard(tmp_path / "train-00000.shard")
    assert shard.tokens.tolist() == [tokenizer.bos, vocab_size - 1, tokenizer.eos]
    assert shard.tokens.itemsize == width == token_bytes(vocab_size)


@pytest.fixture
def shard_path(small: Tokenizer, tmp_path: Path) -> Path:
    with Writer(tmp_path, "train", small, 100) as writer:
        writer.add([7, 8, 9], 11, -3.5)
        writer.add([10], 2, -1.25)
    return tmp_path / "train-00000.shard"


def test_verify_finds_any_changed_byte(shard_path):
    whole = shard_path.read_bytes()
    for offset in range(len(whole)):
        shard_path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0x10]) + whole[offset + 1 :])
        with pytest.raises(
            UserError, match=rf"^{shard_path}: .*delete {shard_path.parent} and prepare the corpus again"
        ):
            Shard(shard_path).verify()


def test_opening_finds_any_wrong_length(shard_path):
    whole = shard_path.read_bytes()
    for length in range(len(whole)):
        shard_path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"^{shard_path}: truncated: {length} bytes"):
            Shard(shard_path)
    shard_path.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="too long"):
        Shard(shard_path)


def test_a_file_that_is_no_shard_is_refused(shard_path):
    whole = shard_path.read_bytes()
    shard_path.write_bytes(b"PK\3\4" + whole[4:])
    with pytest.raises(UserError, match="not a shard file"):
        Shard(shard_path)
    shard_path.write_bytes(whole[:8] + struct.pack("<I", 2) + whole[12:])
    with pytest.raises(UserError, match="shard format 2, but this program reads format 1"):
        Shard(shard_path)
    shard_path.unlink()
    with pytest.raises(UserError, match="No such file"):
        Shard(shard_path)


def test_a_shard_may_have_over_4_gib_and_2_31_tokens(small, tmp_path):
    path, tokens = tmp_path / "train-00000.shard", 2**31 + 10
    header = Header(2, 1, 0, small.vocab_size, tokens, 2, small.hash)
    layout = header.layout()
    with path.open("wb") as file:  # a sparse file
        file.write(header.pack())
        file.seek(HEADER.size + 2 * (tokens - 3))
        file.write(struct.pack("<3H", small.bos, 123, small.eos))
        file.seek(layout["starts"][2])
        file.write(struct.pack("<3q2I2d", 0, tokens - 3, tokens, 70, 80, -7.0, -8.0))
        assert file.tell() == layout["end"][2] > 2**32
    shard = Shard(path)
    assert shard.tokens[shard.starts[1] : shard.starts[2]].tolist() == [small.bos, 123, small.eos]
    assert shard.text_bytes.tolist() == [70, 80] and shard.log_probs is not None
    assert shard.log_probs.tolist() == [-7.0, -8.0]


def test_an_error_while_writing_leaves_a_partial_file(small, tmp_path):
    with pytest.raises(RuntimeError), Writer(tmp_path, "train", small, 5) as writer:
        writer.add([4, 5, 6], 3)
        writer.add([4, 5, 6], 3)
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train-00000.shard", "train-00001.shard.partial"]


def test_a_split_without_stories_leaves_no_file(small, tmp_path):
    with Writer(tmp_path, "train", small, 5) as writer:
        pass
    assert writer.info.shards == [] and list(tmp_path.iterdir()) == []


def test_an_opened_corpus_equals_the_prepared_one(corpus, small):
    opened = Corpus.open(corpus.folder)
    assert opened.manifest == corpus.manifest and opened.hash == corpus.hash
    train, validation = opened.split("train"), opened.split("validation")
    assert train.documents + validation.documents == len(STORIES)
    assert len(train.shards) > MAX_OPEN_SHARDS and len(validation.shards) > 1
    tokenizer = opened.tokenizer()
    assert tokenizer.hash == opened.manifest.tokenizer_hash
    texts = []
    for split in (train, validation):
        assert split.tokens == sum(info.tokens for info in split.shards)
        assert split.documents == sum(info.documents for info in split.shards)
        assert split.text_bytes == sum(int(split.shard(i).text_bytes.sum()) for i in range(len(split.shards)))
        for i in range(len(split.shards)):
            shard = split.shard(i)
            texts += [tokenizer.decode(part.tolist()) for part in np.split(shard.tokens, shard.starts[1:-1])]
    assert sorted(texts) == sorted(STORIES)
    calls = []
    opened.verify(lambda done, total: calls.append((done, total)))
    shards = len(train.shards) + len(validation.shards)
    assert calls == [(done, shards) for done in range(1, shards + 1)]


def open_files() -> Iterator[str]:
    """Files that this process has open or mapped."""
    for handle in Path("/proc/self/fd").iterdir():
        if handle.exists():
            yield os.readlink(handle)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if ".shard" in line:
            yield line


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_only_a_few_shards_are_open_at_a_time(corpus):
    split = corpus.split("train")
    before = len(list(open_files()))
    for number in [*range(len(split.shards)), *range(len(split.shards))]:
        assert split.shard(number).tokens[0] == 1
        assert len(list(open_files())) <= before + 2 * MAX_OPEN_SHARDS  # a handle and a map each
    assert len(list(open_files())) == before + 2 * MAX_OPEN_SHARDS
    split.close()
    assert len(list(open_files())) == before
    split.shard(0)
    del split
    assert len(list(open_files())) == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_a_missing_shard_leaves_no_file_open(corpus):
    split = corpus.split("train")
    (corpus.folder / split.shards[2].path).unlink()
    before = len(list(open_files()))
    with pytest.raises(UserError, match=r"train-00002\.shard: cannot be read"):
        Corpus.open(corpus.folder)
    with pytest.raises(UserError, match=r"train-00002\.shard: cannot be read"):
        for number in range(5):
            split.shard(number)
    split.close()
    assert len(list(open_files())) == before


def test_opening_a_damaged_corpus_is_refused(corpus):
    folder, paths = corpus.folder, [info.path for info in corpus.split("train").shards]
    kept = folder.parent / "kept"
    shutil.copytree(folder, kept)

    def refused(problem: str, name: str) -> None:
        with pytest.raises(UserError, match=rf"^\S*{name}: .*{problem}.*python -m data.prepare"):
            Corpus.open(folder)
        shutil.copy(kept / name, folder / name)
        Corpus.open(folder)

    os.truncate(folder / paths[3], 200)
    refused("truncated", paths[3])
    shutil.copy(kept / paths[1], folder / paths[0])  # whole, but another one
    refused("not the shard that the manifest lists", paths[0])
    (folder / "tokenizer.model").unlink()
    refused("not the tokenizer that the corpus was made with", "tokenizer.model")
    train(STORIES, 310, folder / "tokenizer.model")
    refused("not the tokenizer that the corpus was made with", "tokenizer.model")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 9}))
    refused("corpus format 9, but this program reads format 1", "manifest.json")
    for content in ('{"version": 1}', "[]", "{", json.dumps(manifest | {"more": 1})):
        (folder / "manifest.json").write_text(content)
        refused("not a manifest", "manifest.json")


def test_verifying_a_corpus_reads_every_shard(corpus):
    path = corpus.folder / corpus.split("validation").shards[-1].path
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(UserError, match=f"^{path}: the checksum does not match"):
        Corpus.open(corpus.folder).verify()


def test_a_folder_without_corpus_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "none", tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match=rf"^data.dir={folder}: no corpus here; run python -m data.prepare with"):
            Corpus.open(folder)


def test_an_unfinished_corpus_is_refused(corpus):
    (corpus.folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="the corpus here is unfinished; run python -m data.prepare with"):
        Corpus.open(corpus.folder)


def test_a_corpus_refuses_other_settings(corpus):
    folder = corpus.folder.parent
    corpus.check(config_of(folder))
    corpus.check(config_of(folder, seq_len=7, pack=False, mask_documents=True, workers=0, stories=9))
    for key, value, made in [
        ("source", "other.txt", str(folder / "stories.txt")),
        ("validation", "0.2", "0.3"),
        ("text_field", "story", "text"),
        ("vocab_size", 301, "300"),
        ("shard_tokens", 99, "100"),
        ("tokenizer", "some.model", "train"),
    ]:
        with pytest.raises(UserError) as error:
            corpus.check(config_of(folder, **{key: value}))
        assert str(error.value).startswith(f"data.{key}={value}: the corpus in {corpus.folder} was made with {made}; ")
        assert f"set data.{key}={made}, or give another data.dir" in str(error.value) and "\n" not in str(error.value)


def test_a_corpus_refuses_a_changed_tokenizer_file(corpus):
    folder = corpus.folder.parent
    train(STORIES, 300, folder / "given.model")
    config = config_of(folder, tokenizer=str(folder / "given.model"), dir=str(folder / "second"))
    second = prepare(config)[0]
    second.check(config)
    train(STORIES, 310, folder / "given.model")
    with pytest.raises(UserError, match="data.tokenizer=.*given.model: the file changed after the corpus"):
        second.check(config)
    (folder / "given.model").unlink()  # the corpus has its own copy
    second.check(config)


def test_the_hash_identifies_the_content(corpus):
    folder = corpus.folder.parent
    config = config_of(folder, dir=str(folder / "repeated"))
    assert prepare(config)[0].hash == corpus.hash
    for change in ({"validation": "0.6"}, {"vocab_size": 301}, {"shard_tokens": 60}):
        other = prepare(config_of(folder, dir=str(folder / "other"), **change))[0]
        assert other.hash != corpus.hash
        shutil.rmtree(other.folder)
    (folder / "elsewhere").mkdir()
    shutil.copy(folder / "stories.txt", folder / "elsewhere")
    elsewhere = config_of(folder, source=str(folder / "elsewhere" / "stories.txt"), dir=str(folder / "elsewhere"))
    assert prepare(elsewhere)[0].hash == corpus.hash
    shutil.move(corpus.folder, folder / "moved")
    assert Corpus.open(folder / "moved").hash == corpus.hash
