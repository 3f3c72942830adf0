import gzip
import io
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow.parquet import write_table

from data.shards import Corpus
from data.sources.base import split_of
from tests.support.hub_server import HubServer, commit_of

ROOT = Path.cwd()
STORIES = [f"Tom number {n} saw a big dog in the park.\n\nHe was glad. “Hi,” he said." for n in range(700)]
OWN = [f"Lily number {n} had a red hat." for n in range(20)]


def parquet(**columns: list) -> bytes:
    file = io.BytesIO()
    write_table(pyarrow.table(columns), file)
    return file.getvalue()


def card(text: str) -> bytes:
    return f"---\n{text}\n---\n".encode()


TINY = {
    "README.md": b"---\nlicense: cdla-sharing-1.0\n---\n",
    "data/train-00000-of-00002.parquet": parquet(text=STORIES[:300]),
    "data/train-00001-of-00002.parquet": parquet(text=[*STORIES[300:], " "]),
    "data/validation-00000-of-00001.parquet": parquet(text=OWN),
}
WHOLE = parquet(text=STORIES)
DAMAGED = WHOLE[:400] + bytes(50) + WHOLE[450:]
ROWS = gzip.compress("".join(f'{{"text": "{number}"}}\n' for number in range(700)).encode())
REPOSITORIES = {
    "roneneldan/TinyStories": {"main": TINY, "v0": TINY | {"data/train-00001-of-00002.parquet": WHOLE}},
    "me/lines": {"main": {"train.txt": "\n".join(s.replace("\n", " ") for s in STORIES).encode()}},
    "me/parted": {"main": {"train.txt": b"one\ntwo\n<|endoftext|>\nthree\n"}},
    "me/field": {"main": {"train.parquet": parquet(story=STORIES, id=[1] * 700, title=STORIES)}},
    "me/null": {"main": {"train.parquet": parquet(text=[*STORIES, None])}},
    "me/test": {"main": {"test.parquet": WHOLE}},
    "me/nothing": {"main": {"README.md": b"soon"}},
    "me/code": {"main": {"code.py": b"open('it-ran', 'w')", "train.parquet": WHOLE}},
    "me/cut": {"main": {"data/train-0-of-2.parquet": WHOLE, "data/train-1-of-2.parquet": WHOLE[:-50]}},
    "me/damaged": {"main": {"data/train-0-of-2.parquet": WHOLE, "data/train-1-of-2.parquet": DAMAGED}},
    "me/gzip": {"main": {"data/train-0.jsonl.gz": ROWS, "data/train-1.jsonl.gz": ROWS[:-200]}},
    "me/latin": {"main": {"train.txt": "café\n".encode("latin-1") * 9}},
    "me/configs": {
        "main": {
            "README.md": card(
                "configs:\n- config_name: all\n  data_files: all/*\n- config_name: few\n  data_files: few/*"
            ),
            "all/train.parquet": WHOLE,
            "few/train.parquet": parquet(text=STORIES[:400]),
        }
    },
    "me/count": {
        "main": {
            "README.md": card("dataset_info:\n  splits:\n  - name: train\n    num_bytes: 1\n    num_examples: 701"),
            "train.parquet": WHOLE,
        }
    },
}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer(REPOSITORIES) as hub:
        yield hub


@pytest.fixture
def prepare(hub, tmp_path_factory, tmp_path):
    """Runs the command in a folder of this test, with a cache that all tests share."""
    home = tmp_path_factory.getbasetemp() / "hf"

    def run(source: str, validation: str | None = None, *more: str, **environment: str) -> subprocess.CompletedProcess:
        settings = [f"data.source={source}", "data.dir=corpus", "data.vocab_size=330", *more]
        if validation:
            settings.append(f"data.validation={validation}")
        return subprocess.run(
            [sys.executable, "-m", "data.prepare", *settings],
            env=hub.environment(home, PYTHONPATH=str(ROOT), HF_TOKEN="hf_secret") | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
        )

    return run


def refusal(run: subprocess.CompletedProcess) -> str:
    lines = [line for line in run.stderr.splitlines() if not line.startswith(("reading", "encoding"))]
    assert (run.returncode, run.stdout, len(lines)) == (2, "", 1), run.stderr
    assert "hf_secret" not in run.stderr
    return lines[0]


def stories(folder: Path, name: str) -> list[str]:
    corpus = Corpus.open(folder)
    split, tokenizer = corpus.split(name), corpus.tokenizer()
    shards = [split.shard(number) for number in range(len(split.shards))]
    return [tokenizer.decode(part.tolist()) for s in shards for part in np.split(s.tokens, s.starts[1:-1])]


@pytest.mark.slow
def test_tinystories_becomes_a_corpus(prepare, hub, tmp_path):
    hub.requests.clear()
    run = prepare("tinystories")
    assert run.returncode == 0 and run.stderr.splitlines()[-1] == "encoding: done", run.stderr
    assert run.stdout.startswith("corpus: 700 + 20 stories, ") and "1 empty stories skipped" in run.stdout
    assert "examples/s" not in run.stderr and "hf_secret" not in run.stdout + run.stderr
    assert stories(tmp_path / "corpus", "train") == STORIES and stories(tmp_path / "corpus", "validation") == OWN
    manifest = Corpus.open(tmp_path / "corpus").manifest
    assert manifest.source == {"roneneldan/TinyStories": f"commit {commit_of(TINY)}"}
    assert [path for method, path in hub.requests if method == "GET" and path.endswith("00000-of-00002.parquet")], (
        hub.requests
    )

    # the second time only the commit is requested, and the data is read from the cache
    hub.requests.clear()
    repeated = prepare("tinystories")
    assert repeated.stdout.startswith("ready: corpus already holds 720 stories")
    paths = [path for _, path in hub.requests if "TinyStories" in path]  # the client also sends other requests
    assert paths == ["/api/datasets/roneneldan/TinyStories"]
    (tmp_path / "corpus").rename(tmp_path / "first")
    assert prepare("roneneldan/TinyStories").returncode == 0
    assert not [path for _, path in hub.requests if path.endswith(".parquet")]
    first, second = (Corpus.open(tmp_path / name) for name in ("first", "corpus"))
    assert first.hash == second.hash

    # without the hub the finished corpus is used; for another commit it is refused
    offline = prepare("roneneldan/TinyStories", HF_ENDPOINT="http://127.0.0.1:9")
    assert offline.stdout.startswith("ready") and "using the finished corpus in corpus" in offline.stderr
    error = refusal(prepare("roneneldan/TinyStories@v0"))
    assert "data.source roneneldan/TinyStories -> roneneldan/TinyStories@v0" in error


@pytest.mark.slow
def test_a_data_set_that_changed_on_the_hub_is_refused(prepare, hub, tmp_path, monkeypatch):
    assert prepare("me/lines").returncode == 0
    monkeypatch.setitem(hub.repositories, "me/lines", {"main": {"train.txt": b"another"}})
    old = commit_of(REPOSITORIES["me/parted"]["main"])
    error = refusal(prepare("me/lines"))
    assert "me/lines: commit " in error and "give another data.dir" in error and old not in error


@pytest.mark.slow
def test_validation_may_be_a_split_a_fraction_or_a_path(prepare, tmp_path):
    assert prepare("tinystories", "0.2", "data.dir=fraction").returncode == 0
    train, validation = (stories(tmp_path / "fraction", name) for name in ("train", "validation"))
    assert train == [s for s in STORIES if split_of(s, 0.2) == "train"]
    assert validation == [s for s in STORIES if split_of(s, 0.2) == "validation"]

    (tmp_path / "mine.txt").write_text("Mine.\n<|endoftext|>\n\n<|endoftext|>\nIt’s mine.")
    assert prepare("tinystories", "mine.txt", "data.dir=path").returncode == 0
    assert stories(tmp_path / "path", "train") == STORIES
    assert stories(tmp_path / "path", "validation") == ["Mine.", "It’s mine."]
    manifest = Corpus.open(tmp_path / "path").manifest
    assert "validation mine.txt" in manifest.source and manifest.empty == 2

    assert prepare("me/lines", None, "data.dir=lines").returncode == 0  # it has no validation split
    lines = [s.replace("\n", " ") for s in STORIES]
    assert stories(tmp_path / "lines", "validation") == [s for s in lines if split_of(s, 0.02) == "validation"]
    assert stories(tmp_path / "lines", "train") == [s for s in lines if split_of(s, 0.02) == "train"]


@pytest.mark.slow
def test_a_revision_or_config_can_be_selected(prepare, tmp_path):
    assert prepare("tinystories@v0", None, "data.dir=v0").returncode == 0
    assert stories(tmp_path / "v0", "train") == [*STORIES[:300], *STORIES]
    assert prepare("me/configs:few", None, "data.dir=few").returncode == 0
    assert len(stories(tmp_path / "few", "train") + stories(tmp_path / "few", "validation")) == 400


@pytest.mark.parametrize(
    "source, prefix, part",
    [
        ("tinystories@v9", "data.source=tinystories@v9: ", "the data set has no revision v9; "),
        ("me/none", "data.source=me/none: ", "no such file or folder, and no data set me/none on the hub "),
        ("me--a/x", "data.source=me--a/x: ", "no such file or folder, and no data set me--a/x on the hub "),
    ],
)
def test_a_missing_data_set_gives_one_line(prepare, source, prefix, part):
    error = refusal(prepare(source))
    assert error.startswith(prefix) and part in error


@pytest.mark.slow
@pytest.mark.parametrize(
    "source, prefix, part",
    [
        (
            "me/field",
            "me/field, train: data.text_field=text is not a field with text",
            "a field with text: story, title",
        ),
        ("me/null", "me/null, train, row 701: ", "no text in data.text_field=text"),
        ("me/test", "data.source=me/test: ", "no split train, only test"),
        ("me/nothing", "data.source=me/nothing: ", "doesn't contain any data files"),
        ("me/code", "data.source=me/code: ", "scripts are no longer supported"),
        (
            "me/cut",
            "data.source=me/cut: data/train-1-of-2.parquet: ",
            "the parquet file is truncated or damaged after row 0",
        ),
        (
            "me/damaged",
            "data.source=me/damaged: data/train-1-of-2.parquet: ",
            "the parquet file is truncated or damaged after row 0",
        ),
        (
            "me/gzip",
            "data.source=me/gzip: data/train-1.jsonl.gz: ",
            "the gzip file is truncated or damaged after line ",
        ),
        ("me/latin", "data.source=me/latin: train.txt, line 1: ", "not UTF-8"),
        ("me/configs", "data.source=me/configs: ", "['all', 'few']; write me/configs:CONFIG"),
        ("me/configs:some", "data.source=me/configs:some: ", "['all', 'few']; write me/configs:CONFIG"),
        ("me/count", "data.source=me/count: ", "the number of rows differs from the declared number (train: 701)"),
        ("me/parted", "me/parted, train: ", "rows are lines, not stories; download the file and give its path"),
    ],
)
def test_an_unreadable_data_set_gives_one_line(prepare, tmp_path, source, prefix, part):
    error = refusal(prepare(source))
    assert error.startswith(prefix) and part in error
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.slow
def test_rows_that_are_missing_in_the_cache_are_noticed(prepare, hub, tmp_path, tmp_path_factory, monkeypatch):
    for name, rows in (("more", STORIES), ("less", STORIES[:699])):
        monkeypatch.setitem(hub.repositories, f"me/{name}", {"main": {"train.parquet": parquet(text=rows)}})
        assert prepare(f"me/{name}", None, f"data.dir={name}").returncode == 0
    cache = tmp_path_factory.getbasetemp() / "hf" / "datasets"
    (more,) = (cache / "me___more").rglob("more-train.arrow")
    (less,) = (cache / "me___less").rglob("less-train.arrow")
    more.write_bytes(less.read_bytes())
    error = refusal(prepare("me/more"))
    assert error.startswith("me/more, train: read 699 rows, but the data set declares 700; try again")


@pytest.mark.slow
def test_data_clean_reports_its_repairs(prepare, hub, monkeypatch, tmp_path):
    damaged = [*STORIES, "It was â€œgoodâ€.", "One.\n<|endoftext|>\nTwo."]
    monkeypatch.setitem(hub.repositories, "me/damaged", {"main": {"train.parquet": parquet(text=damaged)}})
    run = prepare("me/damaged", None, "data.clean=true")
    assert run.returncode == 0
    report = "data.clean: 2 sequences of mojibake repaired in 1 texts, 1 texts split at <|endoftext|>"
    assert run.stderr.splitlines()[-1] == report
    found = stories(tmp_path / "corpus", "train") + stories(tmp_path / "corpus", "validation")
    assert sorted(found) == sorted([*STORIES, "It was “good”.", "One.", "Two."])
    assert "data.clean True -> False" in refusal(prepare("me/damaged"))


def test_without_a_network_the_error_names_local_sources(prepare):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    error = refusal(prepare("tinystories", HF_ENDPOINT=f"http://127.0.0.1:{port}"))
    assert error.startswith("data.source=tinystories: the hub did not answer (ConnectError")
    assert "`storybook`" in error and ".jsonl, .parquet or .txt" in error
    assert "HF_HUB_OFFLINE is set" in refusal(prepare("tinystories", HF_HUB_OFFLINE="1"))


@pytest.mark.slow
def test_a_hub_that_never_answers_times_out(prepare):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        error = refusal(prepare("tinystories", HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}"))
    assert time.monotonic() - start < 20 and "the hub did not answer" in error


def test_files_need_neither_datasets_nor_pyarrow(tmp_path):
    (tmp_path / "s.txt").write_text("one")
    code = "import sys; from data.prepare import main; from data.config import DataConfig; import data.sources.open; "
    code += "list(data.sources.open.open_source(DataConfig(source=sys.argv[1]))); "
    code += "print([name for name in ('datasets', 'huggingface_hub', 'pyarrow', 'torch') if name in sys.modules])"
    command = [sys.executable, "-c", code, str(tmp_path / "s.txt")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout == "[]\n", (shlex.join(command), done.stderr)
