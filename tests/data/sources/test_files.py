import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.parquet import write_table

from data.config import DataConfig
from data.settings import UserError
from data.sources.base import TRAIN, VALIDATION, split_of
from data.sources.files import find_files
from data.sources.open import open_source


def config_of(source: object, validation: object = "0.5", **more: object) -> DataConfig:
    return DataConfig.model_validate({"source": str(source), "validation": str(validation)} | more)


def texts(source: object, **more: object) -> list[str]:
    return [document.text for document in open_source(config_of(source, **more))]


def jsonl(*stories: str, field: str = "text") -> bytes:
    return b"".join(json.dumps({field: story, "id": 1}).encode() + b"\n" for story in stories)


def refusal(source: object, **more: object) -> str:
    with pytest.raises(UserError) as error:
        texts(source, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_jsonl_keeps_every_character(tmp_path):
    stories = ["one", " two \n\n", "a\tb\r\nc", "\u2028漢🎉\ufeff", "\0"]
    (tmp_path / "s.jsonl").write_bytes(jsonl(*stories[:2]) + b"\r\n \n" + jsonl(*stories[2:]).rstrip())
    assert texts(tmp_path / "s.jsonl") == stories
    assert [d.log_prob for d in open_source(config_of(tmp_path / "s.jsonl"))] == [None] * 5


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path):
    (tmp_path / "s.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl("\ufeffone"))
    (tmp_path / "s.txt").write_bytes(b"\xef\xbb\xbftwo\n\xef\xbb\xbf")
    assert texts(tmp_path) == ["\ufeffone", "two\n\ufeff"]


def test_the_text_field_can_be_set(tmp_path):
    (tmp_path / "s.jsonl").write_bytes(jsonl("one", field="story"))
    assert texts(tmp_path / "s.jsonl", text_field="story") == ["one"]
    assert refusal(tmp_path / "s.jsonl") == (
        f"{tmp_path}/s.jsonl, line 1: data.text_field=text is not a field with text; "
        "set data.text_field to a field with text: story"
    )


@pytest.mark.parametrize(
    "line, problem",
    [
        (b'{"text": "on', "not JSON"),
        (b"once upon a time", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["one"]', "not a JSON object"),
        (b'"one"', "not a JSON object"),
        (b'{"text": 7}', "data.text_field=text is not a field with text; no field contains text"),
        (b'{"text": null, "body": "x"}', "set data.text_field to a field with text: body"),
        (b"{}", "data.text_field=text is not a field with text"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (rb'{"text": "\ud83c"}', "half a surrogate pair"),
    ],
)
def test_an_error_names_the_bad_line_of_a_jsonl_file(tmp_path, line, problem):
    path = tmp_path / "s.jsonl"
    path.write_bytes(jsonl("one", "two") + line + b"\n" + jsonl("three"))
    assert refusal(path).startswith(f"{path}, line 3: ") and problem in refusal(path)


def test_txt_is_split_at_lines_that_are_the_separator(tmp_path):
    path = tmp_path / "s.txt"
    path.write_bytes(
        b"\n\n One.\n\nTwo. \n\n<|endoftext|>\nThree <|endoftext|>\n <|endoftext|>\r\n<|endoftext|>\r\n"
        b"\r\nFour\r\nfive\r\n<|endoftext|>\n<|endoftext|>\n  \n<|endoftext|>\nSix"
    )
    source = open_source(config_of(path))
    assert [d.text for d in source] == [
        " One.\n\nTwo. ",
        "Three <|endoftext|>\n <|endoftext|>",
        "Four\r\nfive",
        "Six",
    ]
    assert source.empty == 2


@given(stories=st.lists(st.text(alphabet="ab \t\r\n漢>").map(lambda s: s.strip("\r\n")), min_size=1))
def test_txt_returns_the_stories_that_were_written(tmp_path_factory, stories):
    path = tmp_path_factory.mktemp("txt") / "s.txt"
    path.write_bytes("\n<|endoftext|>\n".join(stories).encode())
    assert texts(path) == [story for story in stories if story.strip()]


def test_an_error_names_the_line_that_is_not_utf8(tmp_path):
    (tmp_path / "s.txt").write_bytes(b"one\ntwo\ncaf\xe9\n")
    assert refusal(tmp_path / "s.txt").startswith(f"{tmp_path}/s.txt, line 3: not UTF-8")


def test_gzip_is_recognized_by_its_content(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl("one")))
    (tmp_path / "b.jsonl").write_bytes(gzip.compress(jsonl("two")) + gzip.compress(jsonl("three")))
    (tmp_path / "c.jsonl.gz").write_bytes(jsonl("four"))  # decompressed by the server, as some do
    (tmp_path / "d.txt.GZ").write_bytes(gzip.compress(b"five\n<|endoftext|>\nsix"))
    (tmp_path / "e.gz").write_bytes(gzip.compress(b" " + jsonl("seven")))
    (tmp_path / "f.gz").write_bytes(gzip.compress(b"eight"))
    (tmp_path / "g.gz").write_bytes(gzip.compress(b""))
    assert texts(tmp_path) == "one two three four five six seven eight".split()


def test_a_damaged_gzip_file_is_refused(tmp_path):
    path = tmp_path / "s.jsonl.gz"
    whole = gzip.compress(jsonl(*(f"story {number * 7919}" for number in range(5000))), mtime=0)
    half = whole[: len(whole) // 2]
    overwritten = whole[:10] + b"\xff" * 20 + whole[30:]  # the first block is of no known type
    for content in (half, whole[:-3], whole[:15], whole[:-8] + bytes(8), half + b"junk" * 9, overwritten):
        path.write_bytes(content)
        assert refusal(path).startswith(f"{path}: the gzip file is truncated or damaged after line ")


def test_empty_stories_are_skipped_and_counted(tmp_path):
    (tmp_path / "s.jsonl").write_bytes(jsonl("one", "", " \n", "two"))
    source = open_source(config_of(tmp_path / "s.jsonl"))
    for _ in range(2):
        assert [d.text for d in source] == ["one", "two"] and source.empty == 2


def test_folders_and_globs_are_sorted(tmp_path, monkeypatch):
    for name in "b.txt a/z.txt a/b/c.txt a0.jsonl .hidden/d.txt .e.txt f.arrow g.csv h.tar.gz".split():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jsonl(name) if name.endswith("jsonl") else name.encode())
    monkeypatch.chdir(tmp_path)
    assert texts(".") == texts(tmp_path) == ["a/b/c.txt", "a/z.txt", "a0.jsonl", "b.txt"]
    assert texts("*") == ["a0.jsonl", "b.txt"]
    assert texts("**/*.txt") == texts(f"{tmp_path}/**/*.txt") == ["a/b/c.txt", "a/z.txt", "b.txt"]
    (tmp_path / "[a].txt").write_text("brackets")  # an existing file is not read as a glob
    assert texts("[a].txt") == ["brackets"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/a/*.txt") == ["a/z.txt"]


def test_a_source_without_files_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "f.csv").touch()
    for given_path, problem in [
        ("none.txt", "no such file or folder"),
        ("*.txt", "no such file or folder"),
        ("empty", "no story files there"),
        ("f.csv", "not a story file"),
        ("*.csv", "no story files there"),
    ]:
        error = refusal(tmp_path / given_path)
        assert error.startswith(f"data.source={tmp_path / given_path}: {problem}; give a file") and ".jsonl" in error
    (tmp_path / "s.txt").write_text("one")
    error = refusal(tmp_path / "s.txt", validation=tmp_path / "v.txt")
    assert error.startswith(f"data.validation={tmp_path}/v.txt: no such file or folder")


@pytest.mark.parametrize(
    "name",
    ["stories/", "./stories", "../a", "a/b/c", "/a/b", "data/tom.txt", "data/tom.parquet", "a/*", "tiny", "a/b@"],
)
def test_a_missing_path_is_not_requested_from_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(name).startswith(f"data.source={name}: no such file or folder; give a file, folder or glob (.jsonl")


def test_local_files_have_priority_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("roneneldan/TinyStories").mkdir(parents=True)
    Path("roneneldan/TinyStories/s.txt").write_text("one")
    Path("tinystories").write_text("not a format that is read")
    assert texts("roneneldan/TinyStories") == ["one"]
    assert refusal("tinystories").startswith("data.source=tinystories: not a story file")


def parquet(path: Path, **columns: list) -> Path:
    write_table(pyarrow.table(columns), path, row_group_size=1000)
    return path


def test_parquet_is_read_row_by_row(tmp_path):
    stories = ["one", " two \n\n", "\u2028漢🎉\ufeff", "", " ", *(f"story {number}" for number in range(5000))]
    (tmp_path / "a.txt").write_text("first")
    parquet(tmp_path / "b.parquet", id=list(range(len(stories))), text=stories)
    parquet(tmp_path / "c.PARQUET", text=["last"])
    source = open_source(config_of(tmp_path))
    for _ in range(2):
        found, positions = [], []
        for document in source:
            found.append(document.text)
            positions.append(source.position)
        assert found == ["first", *(s for s in stories if s.strip()), "last"] and source.empty == 2
        assert positions == sorted(positions) and len(set(positions)) > 15
        assert source.position == source.total == sum(p.stat().st_size for p in tmp_path.iterdir())


def test_a_parquet_file_without_the_text_field_is_refused(tmp_path):
    path = parquet(tmp_path / "s.parquet", story=["one"], id=[1], title=["t"])
    assert texts(path, text_field="story") == ["one"]
    assert refusal(path) == (
        f"{path}: data.text_field=text is not a field with text; set data.text_field to a field with text: story, title"
    )
    assert "no field contains text" in refusal(parquet(tmp_path / "n.parquet", text=[1, 2]))
    path = parquet(tmp_path / "m.parquet", text=["one", "two", None])
    assert refusal(path).startswith(f"{path}, row 3: no text in data.text_field=text; ")
    write_table(pyarrow.Table.from_arrays([pyarrow.array(["one"])] * 2, ["text", "text"]), path)
    assert refusal(path) == f"{path}: data.text_field=text is the name of 2 columns; rename all but one"
    broken = pyarrow.array([b"one", b"caf\xe9"]).view(pyarrow.string())
    write_table(pyarrow.table({"text": broken}), path)
    assert refusal(path).startswith(f"{path}, row 2: not UTF-8")


def test_a_damaged_parquet_file_is_refused(tmp_path):
    path = parquet(tmp_path / "s.parquet", text=[f"story {number * 7919}" for number in range(5000)])
    whole = path.read_bytes()
    overwritten = whole[:3000] + bytes(x ^ 255 for x in whole[3000:3200]) + whole[3200:]
    for content in (b"", b"PAR1", b"no parquet at all, but text", whole[:-50], whole[: len(whole) // 2], overwritten):
        path.write_bytes(content)
        assert refusal(path).startswith(f"{path}: the parquet file is truncated or damaged after row ")


def test_memory_does_not_grow_with_a_parquet_file(tmp_path):
    stories = [f"story {number} " + "word " * 200 for number in range(20_000)]
    write_table(pyarrow.table({"text": stories}), tmp_path / "s.parquet", use_dictionary=False)  # in one row group
    size, before = sum(map(len, stories)), pyarrow.total_allocated_bytes()
    peak = max(pyarrow.total_allocated_bytes() for _ in open_source(config_of(tmp_path))) - before
    assert peak < 6e6 < size / 3


def test_texts_are_repaired_before_they_are_split(tmp_path):
    (tmp_path / "s.jsonl").write_bytes(jsonl("â€œOne.â€", "Two.\n<|endoftext|>\nThree.", "“One.”", "<|endoftext|>"))
    config = config_of(tmp_path, clean="true")
    source = open_source(config)
    for _ in range(2):
        documents = list(source)
        assert [d.text for d in documents] == ["“One.”", "Two.", "Three.", "“One.”"] and source.empty == 1
        assert documents[0].split == documents[3].split == split_of("“One.”", 0.5)
        assert str(source.cleaner).startswith("2 sequences of mojibake repaired in 1 texts, 2 texts split")
    assert config.corpus_settings() != config_of(tmp_path).corpus_settings()
    assert texts(tmp_path) == ["â€œOne.â€", "Two.\n<|endoftext|>\nThree.", "“One.”", "<|endoftext|>"]


def test_by_default_files_hold_out_a_fiftieth(tmp_path):
    (tmp_path / "s.jsonl").write_bytes(jsonl(*(f"story {number}" for number in range(500))))
    assert list(open_source(config_of(tmp_path, "auto"))) == list(open_source(config_of(tmp_path, "0.02")))


def test_a_validation_path_is_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("val").mkdir()
    for name in ("a.txt", "b.txt", "val/c.txt"):
        Path(name).write_text(name)
    for source, validation, train in [
        (".", "val", ["a.txt", "b.txt"]),
        (tmp_path, "b.txt", ["a.txt", "val/c.txt"]),
        ("*.txt", tmp_path / "b.txt", ["a.txt"]),
    ]:
        documents = list(open_source(config_of(source, validation)))
        assert [d.text for d in documents if d.split == TRAIN] == train
        held_out = {d.text for d in documents if d.split == VALIDATION}
        assert held_out == {"a.txt", "b.txt", "val/c.txt"} - set(train) or source == "*.txt" and held_out == {"b.txt"}
    os.symlink("b.txt", "link.txt")
    assert "link.txt" not in open_source(config_of(".", "b.txt")).fingerprint()
    assert "includes every file of data.source=." in refusal(".", validation=".")


def test_the_hash_of_a_text_determines_its_split(tmp_path):
    golden = {"one": VALIDATION, "two": TRAIN, "three": VALIDATION, "漢": VALIDATION}
    assert {text: split_of(text, 0.5) for text in golden} == golden
    stories = [f"story {number}" for number in range(4000)]
    (tmp_path / "s.jsonl").write_bytes(jsonl(*stories, *stories))
    documents = list(open_source(config_of(tmp_path / "s.jsonl", "0.1")))
    splits = {document.text: set() for document in documents}
    for document in documents:
        splits[document.text].add(document.split)
    assert len(splits) == 4000 and all(len(found) == 1 for found in splits.values())
    assert 340 < sum(found == {VALIDATION} for found in splits.values()) < 460
    train_texts = list(open_source(config_of(tmp_path / "s.jsonl", "0.1")).training_texts())
    assert train_texts == [d.text for d in documents if d.split == TRAIN]


def test_a_larger_fraction_holds_out_more_stories():
    stories = [f"story {number}" for number in range(500)]
    small = {text for text in stories if split_of(text, 0.1) == VALIDATION}
    large = {text for text in stories if split_of(text, 0.4) == VALIDATION}
    assert small < large


def test_a_changed_file_changes_the_fingerprint(tmp_path):
    for name in ("a.txt", "b/a.txt", "v.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    config = config_of(tmp_path, tmp_path / "v.txt")
    first = open_source(config).fingerprint()
    assert list(first) == ["a.txt", "b/a.txt", "validation v.txt"]
    assert first["a.txt"].startswith("5 bytes, sha256 ")
    os.utime(tmp_path / "a.txt", (0, 0))
    assert open_source(config).fingerprint() == first
    (tmp_path / "a.txt").write_text("c.txt")
    assert [name for name, old in first.items() if open_source(config).fingerprint()[name] != old] == ["a.txt"]


def test_the_position_grows_to_the_total(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*(f"story {n}" for n in range(20_000))))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(*(f"story {n}" for n in range(20_000)))))
    source = open_source(config_of(tmp_path))
    positions = [source.position for _ in source]
    assert positions == sorted(positions) and positions[0] < 0.6 * source.total and len(set(positions)) > 4
    assert source.position == source.total == sum(p.stat().st_size for p in find_files("data.source", str(tmp_path)))


def test_memory_does_not_grow_with_the_source(tmp_path):
    lines = jsonl(*(f"story {number} " + "word " * 100 for number in range(20_000)))
    (tmp_path / "s.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    tracemalloc.start()
    try:
        assert sum(1 for _ in open_source(config_of(tmp_path))) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 3e6 < len(lines) / 3
    finally:
        tracemalloc.stop()


def test_the_storybook_is_a_source():
    from data.sources.storybook import log_prob, story

    source = open_source(config_of("storybook", "0.2", stories=200))
    documents = list(source)
    assert [d.text for d in documents] == [story(0, index) for index in range(200)]
    assert {d.split for d in documents} == {TRAIN, VALIDATION} and (source.position, source.empty) == (200, 0)
    for document in documents:
        assert document.split == split_of(document.text, 0.2)
        assert document.log_prob == (log_prob(document.text) if document.split == VALIDATION else None)
    assert list(source.training_texts()) == [d.text for d in documents if d.split == TRAIN]
    more = open_source(config_of("storybook", "0.2", stories=201)).fingerprint()
    assert source.fingerprint() == source.fingerprint() != more
