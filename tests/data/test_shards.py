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
from data.shards import HEADER, OPEN_SHARDS, Corpus, Header, Shard, Writer, token_bytes
from data.tokenizer import Tokenizer, train

NAMES, SIZES, THINGS = "Tom Lily Ann Bo".split(), "big red old wet new".split(), "dog cat hat car pond".split()
STORIES = [f"{name} saw a {size} {thing}.\n{name} was glad." for name in NAMES for size in SIZES for thing in THINGS]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train(STORIES, 300, path)
    return Tokenizer(path)


def grown(tokenizer: Tokenizer, vocab_size: int, path: Path) -> Tokenizer:
    """The same model with pieces appended, as protobuf has it: field 1 of a model is a piece, its field 1 the text."""
    more = []
    for number in range(tokenizer.vocab_size, vocab_size):
        text = f"w{number}".encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -number)
        more.append(b"\x0a" + bytes([len(piece)]) + piece)
    path.write_bytes(tokenizer.path.read_bytes() + b"".join(more))
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
    known=st.sampled_from(["all", "none", "some"]),
)
def test_what_is_written_is_read(small, tmp_path_factory, stories, shard_tokens, known):
    folder = tmp_path_factory.mktemp("shards")
    with Writer(folder, "train", small, shard_tokens) as writer:
        for number, (ids, text_bytes, log_prob) in enumerate(stories):
            writer.add(ids, text_bytes, log_prob if known == "all" or (known == "some" and number % 2) else None)
    assert sorted(p.name for p in folder.iterdir()) == [info.path for info in writer.info.shards]
    assert writer.info.documents == len(stories)
    assert writer.info.tokens == sum(len(ids) + 2 for ids, _, _ in stories)
    assert writer.info.text_bytes == sum(text_bytes for _, text_bytes, _ in stories)
    left = iter(stories)
    for info in writer.info.shards:
        shard = Shard(folder / info.path)
        shard.verify()
        assert (len(shard.tokens), len(shard.text_bytes)) == (info.tokens, info.documents)
        assert (shard.starts[0], shard.starts[-1], len(shard.starts)) == (0, info.tokens, info.documents + 1)
        assert info.tokens <= shard_tokens or info.documents == 1
        for i in range(info.documents):
            ids, text_bytes, log_prob = next(left)
            stored = shard.tokens[shard.starts[i] : shard.starts[i + 1]]
            assert stored.tolist() == [small.bos, *ids, small.eos]
            assert shard.text_bytes[i] == text_bytes
            if known == "all":
                assert shard.log_probs is not None and shard.log_probs[i] == log_prob
        assert known != "none" or shard.log_probs is None
        arrays = [shard.tokens, shard.starts, shard.text_bytes, *([] if shard.log_probs is None else [shard.log_probs])]
        assert [array.dtype.str for array in arrays] == ["<u2", "<i8", "<u4", "<f8"][: len(arrays)]
        assert all(array.flags.aligned and not array.flags.writeable for array in arrays)
    assert next(left, None) is None


def test_a_shard_is_filled_as_far_as_it_goes(small, tmp_path):
    with Writer(tmp_path, "train", small, 10) as writer:
        for length in (3, 3, 3, 18, 8, 8):  # 5, 5 | 5 | 20 | 10 | 10
            writer.add([5] * length, 1)
    assert [info.tokens for info in writer.info.shards] == [10, 5, 20, 10, 10]


@pytest.mark.parametrize("vocab_size, width", [(65535, 2), (65536, 2), (65537, 4)])
def test_the_largest_id_survives(small, tmp_path, vocab_size, width):
    tokenizer = grown(small, vocab_size, tmp_path / "grown.model")
    assert tokenizer.vocab_size == vocab_size
    with Writer(tmp_path, "train", tokenizer, 100) as writer:
        writer.add([vocab_size - 1], 3)
        for beyond in (vocab_size, -1, 1 << 40):
            with pytest.raises(ValueError, match="vocabulary"):
                writer.add([beyond], 3)
    shard = Shard(tmp_path / "train-00000.shard")
    assert shard.tokens.tolist() == [tokenizer.bos, vocab_size - 1, tokenizer.eos]
    assert shard.tokens.itemsize == width == token_bytes(vocab_size)


@pytest.fixture
def shard_path(small: Tokenizer, tmp_path: Path) -> Path:
    with Writer(tmp_path, "train", small, 100) as writer:
        writer.add([7, 8, 9], 11, -3.5)
        writer.add([10], 2, -1.25)
    return tmp_path / "train-00000.shard"


def test_any_flipped_byte_is_found(shard_path):
    whole = shard_path.read_bytes()
    for place in range(len(whole)):
        shard_path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(UserError, match=rf"^{shard_path}: .*delete {shard_path.parent} and make the corpus again"):
            Shard(shard_path).verify()


def test_any_other_length_is_found_at_opening(shard_path):
    whole = shard_path.read_bytes()
    for length in range(len(whole)):
        shard_path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"^{shard_path}: cut off: {length} bytes"):
            Shard(shard_path)
    shard_path.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="too long"):
        Shard(shard_path)


def test_other_files_are_refused(shard_path):
    whole = shard_path.read_bytes()
    shard_path.write_bytes(b"PK\3\4" + whole[4:])
    with pytest.raises(UserError, match="not a shard"):
        Shard(shard_path)
    shard_path.write_bytes(whole[:8] + struct.pack("<I", 2) + whole[12:])
    with pytest.raises(UserError, match="shard format 2, this program reads 1"):
        Shard(shard_path)
    shard_path.unlink()
    with pytest.raises(UserError, match="No such file"):
        Shard(shard_path)


def test_offsets_beyond_4_gib_and_2_to_the_31_tokens(small, tmp_path):
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


def test_an_error_while_writing_leaves_no_shard_that_looks_whole(small, tmp_path):
    with pytest.raises(RuntimeError), Writer(tmp_path, "train", small, 5) as writer:
        writer.add([4, 5, 6], 3)
        writer.add([4, 5, 6], 3)
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train-00000.shard", "train-00001.shard.partial"]


def test_a_split_without_stories_leaves_nothing(small, tmp_path):
    with Writer(tmp_path, "train", small, 5) as writer:
        pass
    assert writer.info.shards == [] and list(tmp_path.iterdir()) == []


def test_a_corpus_knows_itself(corpus, small):
    again = Corpus.open(corpus.folder)
    assert again.manifest == corpus.manifest and again.hash == corpus.hash
    train, validation = again.split("train"), again.split("validation")
    assert train.documents + validation.documents == len(STORIES)
    assert len(train.shards) > OPEN_SHARDS and len(validation.shards) > 1
    tokenizer = again.tokenizer()
    assert tokenizer.hash == again.manifest.tokenizer_hash
    texts = []
    for split in (train, validation):
        assert split.tokens == sum(info.tokens for info in split.shards)
        assert split.documents == sum(info.documents for info in split.shards)
        assert split.text_bytes == sum(int(split.shard(i).text_bytes.sum()) for i in range(len(split.shards)))
        for i in range(len(split.shards)):
            shard = split.shard(i)
            texts += [tokenizer.decode(part.tolist()) for part in np.split(shard.tokens, shard.starts[1:-1])]
    assert sorted(texts) == sorted(STORIES)
    seen = []
    again.verify(lambda done, total: seen.append((done, total)))
    assert seen == [(n + 1, len(seen)) for n in range(len(train.shards) + len(validation.shards))]


def held() -> Iterator[str]:
    """Files that this process holds open or mapped."""
    for handle in Path("/proc/self/fd").iterdir():
        if handle.exists():
            yield os.readlink(handle)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if ".shard" in line:
            yield line


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_few_shards_are_open_at_a_time(corpus):
    split = corpus.split("train")
    before = len(list(held()))
    for number in [*range(len(split.shards)), *range(len(split.shards))]:
        assert split.shard(number).tokens[0] == 1
        assert len(list(held())) <= before + 2 * OPEN_SHARDS  # a handle and a map each
    assert len(list(held())) == before + 2 * OPEN_SHARDS
    split.close()
    assert len(list(held())) == before
    split.shard(0)
    del split
    assert len(list(held())) == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_a_shard_missing_in_mid_list_leaks_nothing(corpus):
    split = corpus.split("train")
    (corpus.folder / split.shards[2].path).unlink()
    before = len(list(held()))
    with pytest.raises(UserError, match=r"train-00002\.shard: cannot be read"):
        Corpus.open(corpus.folder)
    with pytest.raises(UserError, match=r"train-00002\.shard: cannot be read"):
        for number in range(5):
            split.shard(number)
    split.close()
    assert len(list(held())) == before


def test_damage_is_refused_at_opening(corpus):
    folder, paths = corpus.folder, [info.path for info in corpus.split("train").shards]
    kept = folder.parent / "kept"
    shutil.copytree(folder, kept)

    def refused(why: str, name: str) -> None:
        with pytest.raises(UserError, match=rf"^\S*{name}: .*{why}.*python -m data.prepare"):
            Corpus.open(folder)
        shutil.copy(kept / name, folder / name)
        Corpus.open(folder)

    os.truncate(folder / paths[3], 200)
    refused("cut off", paths[3])
    shutil.copy(kept / paths[1], folder / paths[0])  # whole, but another one
    refused("not the shard that the manifest names", paths[0])
    (folder / "tokenizer.model").unlink()
    refused("not the tokenizer that the corpus was made with", "tokenizer.model")
    train(STORIES, 310, folder / "tokenizer.model")
    refused("not the tokenizer that the corpus was made with", "tokenizer.model")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 9}))
    refused("corpus format 9, this program reads 1", "manifest.json")
    for content in ('{"version": 1}', "[]", "{", json.dumps(manifest | {"more": 1})):
        (folder / "manifest.json").write_text(content)
        refused("not a manifest", "manifest.json")


def test_verify_reads_every_shard(corpus):
    path = corpus.folder / corpus.split("validation").shards[-1].path
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(UserError, match=f"^{path}: its checksum does not match"):
        Corpus.open(corpus.folder).verify()


def test_no_corpus(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "none", tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match=rf"^data.dir={folder}: no corpus there; .*python -m data.prepare --config"):
            Corpus.open(folder)


def test_an_unfinished_corpus(corpus):
    (corpus.folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="the corpus there is unfinished; .*python -m data.prepare --config"):
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
        assert f"set data.{key}={made}, or make another" in str(error.value) and "\n" not in str(error.value)


def test_a_corpus_refuses_another_file_under_the_tokenizers_name(corpus):
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


def test_the_hash_names_the_content(corpus):
    folder = corpus.folder.parent
    config = config_of(folder, dir=str(folder / "again"))
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
