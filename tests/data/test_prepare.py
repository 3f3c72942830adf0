import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import pytest
import sentencepiece

from data.prepare import main
from data.settings import UserError
from data.shards import Corpus
from data.sources.base import side
from data.tokenizer import Tokenizer, train

NAMES = ("Tom", "Lily", "Ann", "Bo", "Max", "Mia")
STORIES = [
    f"{name} saw a {size} {thing}.\n\n{name} was {mood}. "
    for name in NAMES
    for size in ("big", "red", "old")
    for thing in ("dog", "cat", "hat", "car", "pond")
    for mood in ("glad", "sad")
]
ODD = ["<s> </s> <unk> <pad> <0x41>", "\u2581 \u2585\0", " two  blanks ", "tab\tCRLF\r\n🎉 漢字", "x" * 20_000]
GOES_ON = "the same command goes on after the last finished shard"
COMMAND = [sys.executable, "-m", "data.prepare"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with stories, where relative paths start."""
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.chdir(tmp_path)
    Path("s.txt").write_bytes("\n<|endoftext|>\n".join([*STORIES, *ODD]).encode())


def words(**changes: object) -> list[str]:
    settings = {"source": "s.txt", "validation": "0.2", "vocab_size": 300, "dir": "corpus"} | changes
    return [f"data.{key}={value}" for key, value in settings.items()]


def refusal(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one line that a command which cannot be gives."""
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith(("reading", "encoding"))]
    assert out == "" and len(lines) == 1 and "Traceback" not in err
    return lines[0]


def stories_in(folder: str, name: str) -> list[str]:
    corpus = Corpus.open(folder)
    split, tokenizer, texts = corpus.split(name), corpus.tokenizer(), []
    for number in range(len(split.shards)):
        shard = split.shard(number)
        texts += [tokenizer.decode(part.tolist()) for part in np.split(shard.tokens, shard.starts[1:-1])]
    return texts


def test_every_story_is_stored_as_it_is(capsys):
    assert main(words()) == 0
    train_stories, validation = stories_in("corpus", "train"), stories_in("corpus", "validation")
    assert train_stories == [s for s in [*STORIES, *ODD] if side(s, 0.2) == "train"]
    assert validation == [s for s in [*STORIES, *ODD] if side(s, 0.2) == "validation"]
    manifest = Corpus.open("corpus").manifest
    assert manifest.vocab_size == 300
    for split, texts in (("train", train_stories), ("validation", validation)):
        info = manifest.splits[split]
        assert (info.documents, info.misses) == (len(texts), 0)
        assert info.text_bytes == sum(len(text.encode()) for text in texts)
    out, err = capsys.readouterr()
    summary, following = out.splitlines()
    tokens = sum(split.tokens for split in manifest.splits.values())
    text_bytes = sum(split.text_bytes for split in manifest.splits.values())
    assert summary.startswith(f"corpus: {len(train_stories)} + {len(validation)} stories, {tokens:,} tokens, ")
    assert f"{text_bytes / tokens:.2f} bytes a token, 0 stories not decoded to themselves; " in summary
    assert summary.endswith(" MB/s")
    assert following == f"next: torchrun --nproc_per_node=1 -m trainer.main {' '.join(words())}"
    assert err.splitlines()[-1] == "encoding: done" and len(err.splitlines()) <= 10


def test_a_finished_corpus_is_left_as_it_is(capsys):
    assert main(words()) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("corpus").iterdir()}
    capsys.readouterr()
    assert main([*words(), "data.seq_len=9", "data.pack=false", "train.steps=20"]) == 0
    assert capsys.readouterr() == (f"ready: corpus holds the {len(STORIES) + len(ODD)} stories already\n", "")
    assert {path: path.stat().st_mtime_ns for path in Path("corpus").iterdir()} == before


def test_the_same_stories_give_the_same_corpus():
    assert main(words(dir="one")) == main(words(dir="two")) == 0
    one, two = ({p.name: p.read_bytes() for p in Path(name).iterdir()} for name in ("one", "two"))
    assert one == two and {"manifest.json", "tokenizer.model", "train-00000.shard"} < set(one)


def test_other_settings_are_refused(capsys):
    assert main(words()) == 0
    before = {path.name: path.read_bytes() for path in Path("corpus").iterdir()}
    said = refusal(capsys, words(vocab_size=301))
    assert "data.dir=corpus: " in said and "(data.vocab_size 300 -> 301); give another data.dir, or delete" in said
    assert "data.validation 0.2 -> 0.3" in refusal(capsys, words(validation=0.3))
    assert "data.source s.txt -> storybook; data.stories None -> 40000" in refusal(capsys, words(source="storybook"))
    assert {path.name: path.read_bytes() for path in Path("corpus").iterdir()} == before


def test_a_changed_source_is_refused(capsys):
    assert main(words()) == 0
    with open("s.txt", "a") as file:
        file.write("\n<|endoftext|>\nOne more.")
    said = refusal(capsys, words())
    assert "data.dir=corpus: " in said and "(s.txt: " in said and "give another data.dir" in said


def test_stories_may_be_deleted_once_they_are_tokens(capsys):
    assert main(words()) == 0
    Path("s.txt").unlink()
    capsys.readouterr()
    assert main(words()) == 0
    out, err = capsys.readouterr()
    assert out.startswith("ready: ") and err.startswith("data.source=s.txt: not there any more")


def test_a_damaged_corpus_is_not_ready(capsys):
    assert main(words()) == 0
    os.truncate("corpus/train-00000.shard", 500)
    assert refusal(capsys, words()).startswith("corpus/train-00000.shard: cut off: 500 bytes")


def test_an_unfinished_corpus_is_made_anew(capsys):
    assert main(words(shard_tokens=100)) == 0
    whole = {path.name: path.read_bytes() for path in Path("corpus").iterdir()}
    Path("corpus/manifest.json").unlink()
    Path("corpus/train-00001.shard").rename("corpus/train-00001.shard.partial")
    Path("corpus/train-09999.shard").write_bytes(b"old")
    Path("corpus/notes.md").write_text("mine")
    assert main(words(shard_tokens=100)) == 0
    assert {path.name: path.read_bytes() for path in Path("corpus").iterdir()} == whole | {"notes.md": b"mine"}


def test_a_config_file_and_words(capsys):
    Path("c.yaml").write_text("data: {source: s.txt, validation: 0.2, vocab_size: 290, dir: corpus}\ntrain: {}\n")
    argv = ["data.vocab_size=280", "--config", "c.yaml", "model.dim=64", "data.vocab_size=299"]
    assert main(argv) == 0
    assert Corpus.open("corpus").manifest.vocab_size == 299
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"-m trainer.main {' '.join(argv)}")


def test_mistakes_are_one_line(capsys):
    assert refusal(capsys, ["data.vocabsize=3"]).endswith("did you mean data.vocab_size?")
    assert refusal(capsys, ["--config", "no.yaml"]).startswith("no.yaml: no such config file")
    assert refusal(capsys, ["steps"]).startswith("steps: not a setting")
    assert "--help" in refusal(capsys, ["--konfig"])
    assert refusal(capsys, words(source="none.txt")).startswith("data.source=none.txt: no such file or folder")
    assert not Path("corpus").exists()
    assert refusal(capsys, words(tokenizer="none.model")).startswith("none.model: no tokenizer can be read there")
    assert " at most " in refusal(capsys, words(vocab_size=5000))
    Path("s.txt").write_bytes(b"caf\xe9")
    assert refusal(capsys, words()).startswith("s.txt, line 1: not UTF-8")
    Path("file").touch()
    assert refusal(capsys, words(dir="file/corpus")).startswith("file")


def test_a_split_without_stories_is_refused(capsys):
    Path("s.txt").write_text("\n<|endoftext|>\n".join(STORIES[:9]))
    said = refusal(capsys, words(validation=1e-9, vocab_size=280))
    assert said.startswith("data.validation=1e-09: leaves no story for validation, of 9 in data.source=s.txt; give")
    assert not Path("corpus/manifest.json").exists()
    assert "no story for train" in refusal(capsys, words(validation=0.999999, tokenizer=model(STORIES), dir="other"))


def model(texts: list[str], name: str = "given.model", vocab_size: int = 290) -> str:
    train(texts, vocab_size, Path(name))
    return name


def test_a_given_tokenizer_is_copied(capsys):
    given = model(STORIES)
    assert main(words(tokenizer=given)) == 0
    corpus = Corpus.open("corpus")
    assert corpus.tokenizer().hash == Tokenizer(given).hash and corpus.manifest.vocab_size == 290
    assert "vocab_size" not in corpus.manifest.settings
    assert main(words(tokenizer=given, vocab_size=9999)) == 0  # says nothing about a given model
    model(STORIES, vocab_size=295)
    assert "data.tokenizer=given.model: the file changed" in refusal(capsys, words(tokenizer=given))


def test_the_tokenizer_of_the_folder_itself(capsys):
    Path("corpus").mkdir()
    given = model(STORIES, "corpus/tokenizer.model")
    assert main(words(tokenizer=given)) == 0
    assert Corpus.open("corpus").manifest.vocab_size == 290


def test_misses_are_counted(capsys):
    """A model without bytes cannot carry characters that it never saw."""
    with open("bytes.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(STORIES), model_writer=file, model_type="bpe", vocab_size=60, minloglevel=2
        )
    Path("s.txt").write_text("\n<|endoftext|>\n".join([*STORIES, *["Tom saw 漢."] * 3, "Zoë"]))
    assert main(words(tokenizer="bytes.model")) == 0
    splits = Corpus.open("corpus").manifest.splits
    newline = len(STORIES)  # by default such a model turns newlines into blanks
    assert sum(split.misses for split in splits.values()) == newline + 4
    assert f" {newline + 4} stories not decoded to themselves" in capsys.readouterr().out


def test_the_storybook_from_nothing(capsys):
    argv = ["data.stories=300", "data.dir=book", "data.validation=0.1"]
    assert main(argv) == 0
    corpus = Corpus.open("book")
    shard = corpus.split("validation").shard(0)
    assert shard.log_probs is not None and (shard.log_probs < -10).all()
    assert corpus.split("train").shard(0).log_probs is None
    capsys.readouterr()
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith("ready: ")


def test_help_lists_every_key():
    shown = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True).stdout
    for key in ("data.source=storybook", "data.vocab_size=", "data.text_field=text", "data.validation=auto"):
        assert key in shown


def test_data_needs_no_torch():
    code = "import sys, data.prepare, data.shards, data.sources.open, data.tokenizer; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_interrupted_run_says_so_and_can_be_repeated():
    argv = words(source="storybook", stories=1_000_000, tokenizer=model(STORIES))
    pipe = subprocess.PIPE  # a shell's background jobs ignore Ctrl-C, and so would what they start
    hears = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([*COMMAND, *argv], stdout=pipe, stderr=pipe, text=True, preexec_fn=hears) as process:
        while not list(Path("corpus").glob("train-*.partial")) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=200)
    assert process.returncode == 130 and out == ""
    assert [line for line in err.splitlines() if line][-1] == f"interrupted; {GOES_ON}"
    assert "Traceback" not in err
    with pytest.raises(UserError, match="unfinished"):
        Corpus.open("corpus")
    assert main(words()) == 0
    Corpus.open("corpus").verify()


def test_a_full_disk_is_one_line():
    """A limit on the size of files stands for the disk: writes fail alike, with another number."""
    code = (
        "import resource, sys; from data.prepare import main; resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    limited = subprocess.run([sys.executable, "-c", code, *words()], capture_output=True, text=True)
    assert limited.returncode == 2 and limited.stdout == ""
    assert limited.stderr.splitlines()[-1] == f"data.dir=corpus: {os.strerror(errno.EFBIG)}; make room: {GOES_ON}"
    assert "Traceback" not in limited.stderr


def test_finished_shards_stay_on_a_full_disk():
    """A disk of 400 kB; with more room the same command goes on."""
    write_long(8)
    argv = words(source="long.txt", tokenizer=model(STORIES), shard_tokens=40_000)
    assert main(argv) == 0
    Path("small").mkdir()
    script = (
        "mount -t tmpfs -o size=400k tmpfs small || exit 77\n"
        '"$@"; echo "code $?"; ls -i small/corpus > full\n'
        'mount -o remount,size=64m small && "$@" || exit\n'
        "ls -i small/corpus > done; mv small/corpus roomy"
    )
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *COMMAND, *argv]
    try:
        run = subprocess.run([*command, "data.dir=small/corpus"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("a small disk takes unshare, of util-linux")
    if run.returncode in (1, 77) and "code" not in run.stdout:
        pytest.skip(f"a small disk takes the right to mount one: {run.stderr.strip()}")
    assert run.returncode == 0 and run.stdout.startswith("code 2\n"), run
    assert f"data.dir=small/corpus: {os.strerror(errno.ENOSPC)}; make room: {GOES_ON}\n" in run.stderr
    before, after = (set(Path(name).read_text().split("\n")) for name in ("full", "done"))
    kept = {line for line in before if line.endswith(".shard")}
    assert len(kept) >= 2 and kept < after and "going on after" in run.stderr
    assert whole("roomy") == whole("corpus")


def test_two_at_once_make_one_corpus():
    argv = [*COMMAND, *words(source="storybook", stories=600, vocab_size=310)]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum(out.startswith("ready: ") for out, _ in said) == 1
    Corpus.open("corpus").verify()


LONG = dict(source="long.txt", vocab_size=310, shard_tokens=400_000)


def write_long(times):
    """Stories for some seconds, no two alike."""
    stories = (f"{number} {8 * story}" for number in range(times) for story in STORIES)
    Path("long.txt").write_text("\n<|endoftext|>\n".join(stories))


def whole(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.slow
def test_killed_ten_times_it_ends_with_the_same_bytes():
    """SIGKILL a random moment after each of its steps has begun; finished shards are not made again."""
    write_long(200)
    random, argv = Random(4), words(**LONG | {"shard_tokens": 120_000})
    assert main([*argv, "data.dir=undisturbed"]) == 0
    total, kept = len(shards("undisturbed")), dict[str, tuple[int, int]]()
    reading, training = "reading for the tokenizer: 25%", "reading for the tokenizer: done"
    assert total >= 40
    for step in ["", reading, training, "tokenizer.model", *["a shard"] * 6]:
        with subprocess.Popen([*COMMAND, *argv], stderr=subprocess.PIPE, text=True) as process:
            if step == "tokenizer.model" or step == "a shard":
                while not Path("corpus", "tokenizer.model").exists() or step == "a shard" and shards("corpus") == kept:
                    assert process.poll() is None, process.communicate()
                    time.sleep(0.002)
            elif step:
                assert any(line.startswith(step) for line in process.stderr)
            time.sleep(random.uniform(0, 0.2 if step != "a shard" else 0.03))
            process.kill()
        now = shards("corpus")
        assert kept.items() <= now.items() and not Path("corpus", "manifest.json").exists()
        kept = now
    assert 6 <= len(kept) < total and main(argv) == 0
    assert kept.items() <= shards("corpus").items()
    assert whole("corpus") == whole("undisturbed")


def shards(folder: str) -> dict[str, tuple[int, int]]:
    """The finished ones, each with what tells a file from one that was made again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path(folder).glob("*.shard")}


def workers_of(process: subprocess.Popen) -> list[int]:
    """The ids of the processes that encode, as soon as there are some."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("finding the processes takes /proc/PID/task/*/children")
    while not Path("corpus/train-00000.shard.partial").exists() or len(children.read_text().split()) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    return [int(pid) for pid in children.read_text().split()]


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them():
    write_long(600)
    argv = [*COMMAND, *words(**LONG, tokenizer=model(STORIES))]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        workers = [Path(f"/proc/{pid}") for pid in workers_of(process)]
        process.kill()
    for _ in range(100):
        if not any(worker.exists() and "Z" not in (worker / "stat").read_text().split()[2] for worker in workers):
            break
        time.sleep(0.05)
    else:
        raise AssertionError("a process outlives prepare")


@pytest.mark.slow
def test_a_process_that_is_killed_is_one_line():
    write_long(600)
    argv = [*COMMAND, *words(**LONG, tokenizer=model(STORIES))]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for pid in workers_of(process):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
                break
        out, err = process.communicate(timeout=200)
    said = [line for line in err.splitlines() if not line.startswith("encoding")]
    assert (process.returncode, out, len(said)) == (2, "", 1), err
    assert said[0].startswith("a process that encodes was killed")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text():
    """Ten and forty million bytes: all of it in memory would take thirty more at least, in one process or the other."""
    code = (
        "import re, resource, sys; from pathlib import Path; from data.prepare import main\n"
        "if __name__ == '__main__':\n"
        "    assert main(sys.argv[1:]) == 0\n"
        "    here = int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "    print(here // 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process stands in /proc/self/status")
    Path("measure.py").write_text(code)
    peaks = []
    for times in (200, 800):
        write_long(times)
        argv = words(**LONG | {"tokenizer": model(STORIES), "dir": f"corpus-{times}"})
        done = subprocess.run([sys.executable, "measure.py", *argv], capture_output=True, text=True, check=True)
        peaks.append([int(size) for size in done.stdout.splitlines()[-1].split()])
    assert all(more < less + 20 for less, more in zip(*peaks, strict=True)), peaks


def test_one_process_or_many_give_the_same_tokens():
    from data.encode import encode
    from data.sources.base import Document
    from data.tokenizer import Tokenizer

    tokenizer = Tokenizer(model(STORIES))
    stories = [Document("train", STORIES[i % len(STORIES)] * (1 + i % 7), -float(i)) for i in range(40)]
    with mock.patch("data.encode.BATCH_BYTES", 200):
        one, two = (list(encode(stories, tokenizer, processes)) for processes in (1, 2))
    assert len(one) == len(two) == len(stories)
    for a, b, story in zip(one, two, stories, strict=True):
        assert a.ids.tolist() == b.ids.tolist() == tokenizer.encode(story.text) and a[2:] == b[2:]
        assert a.text_bytes == len(story.text.encode()) and a.log_prob == story.log_prob and not a.missed


@pytest.mark.parametrize("changed", ["a setting", "the stories"])
def test_what_was_begun_of_something_else_begins_anew(capsys, changed):
    assert main(words(shard_tokens=100)) == 0
    manifest = json.loads(Path("corpus/manifest.json").read_text())
    Path("corpus/manifest.json").unlink()
    kept = {key: manifest[key] for key in ("version", "settings", "source", "tokenizer_hash", "splits")}
    Path("corpus/progress.json").write_text(json.dumps(kept))
    if changed == "the stories":
        Path("s.txt").write_bytes(Path("s.txt").read_bytes() + b"\n<|endoftext|>\nOne more.")
    argv = words(shard_tokens=100 if changed == "the stories" else 90)
    capsys.readouterr()
    assert main(argv) == 0
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith("data.dir=corpus: begun of something else (") and said.endswith("); beginning anew")
    assert ("s.txt: " if changed == "the stories" else "data.shard_tokens 100 -> 90") in said
    assert main([*argv, "data.dir=other"]) == 0
    assert whole("corpus") == whole("other")


def test_stories_that_change_while_they_are_read_are_refused(capsys):
    from data import prepare

    skip = prepare.skip

    def meanwhile(documents, past):
        yield from skip(documents, past)
        with open("s.txt", "a") as file:
            file.write("!")

    with mock.patch("data.prepare.skip", meanwhile):
        said = refusal(capsys, words())
    assert said == "data.source=s.txt: it changed while it was read; the same command begins anew"
    assert not Path("corpus/manifest.json").exists() and main(words()) == 0
    assert main(words(dir="other")) == 0 and whole("corpus") == whole("other")


def test_a_process_killed_in_the_middle_of_its_answer_is_not_waited_for():
    from data.encode import _Encoder

    with _Encoder(Path(model(STORIES))) as encoder:
        encoder._pipe.send(STORIES * 1000)  # an answer that no pipe holds at once
        assert encoder._pipe.poll(60)
        encoder._process.kill()
        with pytest.raises(UserError, match="was killed"):
            encoder([])
