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
from filelock import FileLock

from data.encode import _EncoderProcess, encode
from data.prepare import main, skip_finished
from data.settings import UserError
from data.shards import Corpus
from data.sources.base import Document, split_of
from data.tokenizer import Tokenizer, train

NAMES = ("Tom", "Lily", "Ann", "Bo", "Max", "Mia")
STORIES = [
    f"{name} saw a {size} {thing}.\n\n{name} was {mood}. "
    for name in NAMES
    for size in ("big", "red", "old")
    for thing in ("dog", "cat", "hat", "car", "pond")
    for mood in ("glad", "sad")
]
UNUSUAL = ["<s> </s> <unk> <pad> <0x41>", "\u2581 \u2585\0", " two  spaces ", "tab\tCRLF\r\n🎉 漢字", "x" * 20_000]
RESUME = "run the same command again to resume after the last finished shard"
WAITING = "data.dir=corpus: waiting for another data.prepare that is writing here"
COMMAND = [sys.executable, "-m", "data.prepare"]


@pytest.fixture(autouse=True)
def folder_with_stories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder of each test is a new one with a file of stories."""
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.chdir(tmp_path)
    Path("s.txt").write_bytes("\n<|endoftext|>\n".join([*STORIES, *UNUSUAL]).encode())


def arguments(**changes: object) -> list[str]:
    settings = {"source": "s.txt", "validation": "0.2", "vocab_size": 300, "dir": "corpus"} | changes
    return [f"data.{key}={value}" for key, value in settings.items()]


def refusal(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Runs a command that is refused; returns its one line of output."""
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


def test_every_story_is_stored_unchanged(capsys):
    assert main(arguments()) == 0
    train_stories, validation = stories_in("corpus", "train"), stories_in("corpus", "validation")
    assert train_stories == [s for s in [*STORIES, *UNUSUAL] if split_of(s, 0.2) == "train"]
    assert validation == [s for s in [*STORIES, *UNUSUAL] if split_of(s, 0.2) == "validation"]
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
    assert f"{text_bytes / tokens:.2f} bytes per token, 0 stories do not decode to themselves; " in summary
    assert summary.endswith(" MB/s")
    assert following == f"next: torchrun --nproc_per_node=1 -m trainer.main {' '.join(arguments())}"
    assert err.splitlines()[-1] == "encoding: done" and len(err.splitlines()) <= 10


def test_a_finished_corpus_is_never_changed(capsys):
    assert main(arguments()) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("corpus").iterdir()}
    capsys.readouterr()
    assert main([*arguments(), "data.seq_len=9", "data.pack=false", "train.steps=20"]) == 0
    assert capsys.readouterr() == (f"ready: corpus already holds {len(STORIES) + len(UNUSUAL)} stories\n", "")
    assert {path: path.stat().st_mtime_ns for path in Path("corpus").iterdir()} == before


def test_the_same_stories_give_the_same_corpus():
    assert main(arguments(dir="one")) == main(arguments(dir="two")) == 0
    one, two = ({p.name: p.read_bytes() for p in Path(name).iterdir()} for name in ("one", "two"))
    assert one == two and {"manifest.json", "tokenizer.model", "train-00000.shard"} < set(one)


def test_other_settings_are_refused(capsys):
    assert main(arguments()) == 0
    before = {path.name: path.read_bytes() for path in Path("corpus").iterdir()}
    error = refusal(capsys, arguments(vocab_size=301))
    assert "data.dir=corpus: " in error and "(data.vocab_size 300 -> 301); give another data.dir, or delete" in error
    assert "data.validation 0.2 -> 0.3" in refusal(capsys, arguments(validation=0.3))
    assert "data.source s.txt -> storybook; data.stories None -> 40000" in refusal(
        capsys, arguments(source="storybook")
    )
    assert {path.name: path.read_bytes() for path in Path("corpus").iterdir()} == before


def test_a_changed_source_is_refused(capsys):
    assert main(arguments()) == 0
    with open("s.txt", "a") as file:
        file.write("\n<|endoftext|>\nOne more.")
    error = refusal(capsys, arguments())
    assert "data.dir=corpus: " in error and "(s.txt: " in error and "give another data.dir" in error


def test_stories_may_be_deleted_after_preparing(capsys):
    assert main(arguments()) == 0
    Path("s.txt").unlink()
    capsys.readouterr()
    assert main(arguments()) == 0
    out, err = capsys.readouterr()
    assert out.startswith("ready: ") and err.startswith(
        "data.source=s.txt: not available; using the finished corpus in corpus"
    )


def test_a_damaged_corpus_is_refused(capsys):
    assert main(arguments()) == 0
    os.truncate("corpus/train-00000.shard", 500)
    assert refusal(capsys, arguments()).startswith("corpus/train-00000.shard: truncated: 500 bytes")


def test_an_unfinished_corpus_without_progress_starts_over(capsys):
    assert main(arguments(shard_tokens=100)) == 0
    whole = {path.name: path.read_bytes() for path in Path("corpus").iterdir()}
    Path("corpus/manifest.json").unlink()
    Path("corpus/train-00001.shard").rename("corpus/train-00001.shard.partial")
    Path("corpus/train-09999.shard").write_bytes(b"old")
    Path("corpus/notes.md").write_text("mine")
    assert main(arguments(shard_tokens=100)) == 0
    assert {path.name: path.read_bytes() for path in Path("corpus").iterdir()} == whole | {"notes.md": b"mine"}


def test_arguments_override_the_config_file(capsys):
    Path("c.yaml").write_text("data: {source: s.txt, validation: 0.2, vocab_size: 290, dir: corpus}\ntrain: {}\n")
    argv = ["data.vocab_size=280", "--config", "c.yaml", "model.dim=64", "data.vocab_size=299"]
    assert main(argv) == 0
    assert Corpus.open("corpus").manifest.vocab_size == 299
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"-m trainer.main {' '.join(argv)}")


def test_each_mistake_gives_one_line(capsys):
    assert refusal(capsys, ["data.vocabsize=3"]).endswith("did you mean data.vocab_size?")
    assert refusal(capsys, ["--config", "no.yaml"]).startswith("no.yaml: no such config file")
    assert refusal(capsys, ["steps"]).startswith("steps: not a setting")
    assert "--help" in refusal(capsys, ["--konfig"])
    assert refusal(capsys, arguments(source="none.txt")).startswith("data.source=none.txt: no such file or folder")
    assert not Path("corpus").exists()
    assert refusal(capsys, arguments(tokenizer="none.model")).startswith("none.model: the tokenizer cannot be read")
    assert " at most " in refusal(capsys, arguments(vocab_size=5000))
    Path("s.txt").write_bytes(b"caf\xe9")
    assert refusal(capsys, arguments()).startswith("s.txt, line 1: not UTF-8")
    Path("file").touch()
    assert refusal(capsys, arguments(dir="file/corpus")).startswith("file")


def test_a_split_without_stories_is_refused(capsys):
    Path("s.txt").write_text("\n<|endoftext|>\n".join(STORIES[:9]))
    error = refusal(capsys, arguments(validation=1e-9, vocab_size=280))
    assert error.startswith(
        "data.validation=1e-09: none of the 9 stories of data.source=s.txt is in the validation split"
    )
    assert not Path("corpus/manifest.json").exists()
    error = refusal(capsys, arguments(validation=0.999999, tokenizer=model(STORIES), dir="other"))
    assert "is in the train split" in error


def model(texts: list[str], name: str = "given.model", vocab_size: int = 290) -> str:
    train(texts, vocab_size, Path(name))
    return name


def test_a_given_tokenizer_is_copied(capsys):
    given = model(STORIES)
    assert main(arguments(tokenizer=given)) == 0
    corpus = Corpus.open("corpus")
    assert corpus.tokenizer().hash == Tokenizer(given).hash and corpus.manifest.vocab_size == 290
    assert "vocab_size" not in corpus.manifest.settings
    assert main(arguments(tokenizer=given, vocab_size=9999)) == 0  # does not concern a given model
    model(STORIES, vocab_size=295)
    assert "data.tokenizer=given.model: the file changed" in refusal(capsys, arguments(tokenizer=given))


def test_a_tokenizer_in_the_corpus_folder_may_be_given(capsys):
    Path("corpus").mkdir()
    given = model(STORIES, "corpus/tokenizer.model")
    assert main(arguments(tokenizer=given)) == 0
    assert Corpus.open("corpus").manifest.vocab_size == 290


def test_stories_that_do_not_decode_to_themselves_are_counted(capsys):
    """A model without byte pieces cannot encode characters that it was not trained on."""
    with open("bytes.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(STORIES), model_writer=file, model_type="bpe", vocab_size=60, minloglevel=2
        )
    Path("s.txt").write_text("\n<|endoftext|>\n".join([*STORIES, *["Tom saw 漢."] * 3, "Zoë"]))
    assert main(arguments(tokenizer="bytes.model")) == 0
    splits = Corpus.open("corpus").manifest.splits
    failures = len(STORIES) + 4  # by default such a model turns newlines into spaces
    assert sum(split.misses for split in splits.values()) == failures
    assert f" {failures} stories do not decode to themselves" in capsys.readouterr().out


def test_the_storybook_is_stored_with_its_probabilities(capsys):
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


def test_preparing_needs_no_torch():
    code = "import sys, data.prepare, data.shards, data.sources.open, data.tokenizer; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ctrl_c_ends_with_one_line_and_can_be_repeated():
    argv = arguments(source="storybook", stories=1_000_000, tokenizer=model(STORIES))
    pipe = subprocess.PIPE  # a shell's background jobs ignore Ctrl-C, and so would what they start
    allow_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([*COMMAND, *argv], stdout=pipe, stderr=pipe, text=True, preexec_fn=allow_ctrl_c) as process:
        while not list(Path("corpus").glob("train-*.partial")) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=200)
    assert process.returncode == 130 and out == ""
    assert [line for line in err.splitlines() if line][-1] == f"interrupted; {RESUME}"
    assert "Traceback" not in err
    with pytest.raises(UserError, match="unfinished"):
        Corpus.open("corpus")
    assert main(arguments()) == 0
    Corpus.open("corpus").verify()


def test_a_full_disk_gives_one_line():
    """A limit on the size of files replaces a full disk: writes fail in the same way, with another error number."""
    code = (
        "import resource, sys; from data.prepare import main; resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    limited = subprocess.run([sys.executable, "-c", code, *arguments()], capture_output=True, text=True)
    assert limited.returncode == 2 and limited.stdout == ""
    assert (
        limited.stderr.splitlines()[-1]
        == f"data.dir=corpus: {os.strerror(errno.EFBIG)}; free some space, then {RESUME}"
    )
    assert "Traceback" not in limited.stderr


def test_a_run_resumes_after_a_full_disk():
    """A disk of 400 kB. After it has been enlarged, the same command resumes."""
    write_long(8)
    argv = arguments(source="long.txt", tokenizer=model(STORIES), shard_tokens=40_000)
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
        pytest.skip("a small disk needs unshare, of util-linux")
    if run.returncode in (1, 77) and "code" not in run.stdout:
        pytest.skip(f"a small disk needs the right to mount one: {run.stderr.strip()}")
    assert run.returncode == 0 and run.stdout.startswith("code 2\n"), run
    assert f"data.dir=small/corpus: {os.strerror(errno.ENOSPC)}; free some space, then {RESUME}\n" in run.stderr
    before, after = (set(Path(name).read_text().split("\n")) for name in ("full", "done"))
    kept = {line for line in before if line.endswith(".shard")}
    assert len(kept) >= 2 and kept < after and "resuming after" in run.stderr
    assert whole("roomy") == whole("corpus")


def test_two_runs_at_once_make_one_corpus():
    argv = [*COMMAND, *arguments(source="storybook", stories=600, vocab_size=310)]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum(out.startswith("ready: ") for out, _ in outputs) == 1
    Corpus.open("corpus").verify()


def test_a_run_reports_once_that_it_waits_for_another():
    Path("corpus").mkdir()
    with FileLock("corpus/.lock"):
        argv = [*COMMAND, *arguments(tokenizer=model(STORIES))]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        assert process.stderr.readline() == f"{WAITING}\n"
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and out.startswith("corpus: ") and WAITING not in err


def test_a_killed_run_leaves_no_lock(capsys):
    code = "from filelock import FileLock; FileLock('corpus/.lock').acquire(); print('locked', flush=True); input()"
    Path("corpus").mkdir()
    argv = [sys.executable, "-c", code]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        process.kill()
    assert main(arguments()) == 0
    assert WAITING not in capsys.readouterr().err


LONG = dict(source="long.txt", vocab_size=310, shard_tokens=400_000)


def write_long(times):
    """Stories for some seconds, no two alike."""
    stories = (f"{number} {8 * story}" for number in range(times) for story in STORIES)
    Path("long.txt").write_text("\n<|endoftext|>\n".join(stories))


def whole(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_with_the_same_bytes():
    """SIGKILL at a random moment of each of its steps. Finished shards are not written again."""
    write_long(200)
    random, argv = Random(4), arguments(**LONG | {"shard_tokens": 120_000})
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
    """Finished shards, each with its inode and time, which change if the file is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path(folder).glob("*.shard")}


def workers_of(process: subprocess.Popen) -> list[int]:
    """The ids of the encoding processes, once they have started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("finding the processes needs /proc/PID/task/*/children")
    while not Path("corpus/train-00000.shard.partial").exists() or len(children.read_text().split()) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    return [int(pid) for pid in children.read_text().split()]


@pytest.mark.slow
def test_encoding_processes_end_with_their_parent():
    write_long(600)
    argv = [*COMMAND, *arguments(**LONG, tokenizer=model(STORIES))]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        workers = [Path(f"/proc/{pid}") for pid in workers_of(process)]
        process.kill()
    for _ in range(100):
        if not any(worker.exists() and "Z" not in (worker / "stat").read_text().split()[2] for worker in workers):
            break
        time.sleep(0.05)
    else:
        raise AssertionError("a process is still running after prepare was killed")


@pytest.mark.slow
def test_a_killed_encoding_process_gives_one_line():
    write_long(600)
    argv = [*COMMAND, *arguments(**LONG, tokenizer=model(STORIES))]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for pid in workers_of(process):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
                break
        out, err = process.communicate(timeout=200)
    errors = [line for line in err.splitlines() if not line.startswith("encoding")]
    assert (process.returncode, out, len(errors)) == (2, "", 1), err
    assert errors[0].startswith("a process that encodes stories was killed")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text():
    """10 and 80 million bytes: a process that held them would grow by at least 70 MB, not by batches in its queues."""
    code = (
        "import re, resource, sys; from pathlib import Path; from data.prepare import main\n"
        "if __name__ == '__main__':\n"
        "    assert main(sys.argv[1:]) == 0\n"
        "    peak = int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "    print(peak // 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak memory of a process is in /proc/self/status")
    Path("measure.py").write_text(code)
    peaks = []
    for times in (200, 1600):
        write_long(times)
        argv = arguments(**LONG | {"tokenizer": model(STORIES), "dir": f"corpus-{times}"})
        done = subprocess.run([sys.executable, "measure.py", *argv], capture_output=True, text=True, check=True)
        peaks.append([int(size) for size in done.stdout.splitlines()[-1].split()])
    assert all(large < small + 40 for small, large in zip(*peaks, strict=True)), peaks


def test_any_number_of_processes_gives_the_same_tokens():
    tokenizer = Tokenizer(model(STORIES))
    stories = [Document("train", STORIES[i % len(STORIES)] * (1 + i % 7), -float(i)) for i in range(40)]
    with mock.patch("data.encode.BATCH_CHARS", 200):
        one, two = (list(encode(stories, tokenizer, processes)) for processes in (1, 2))
    assert len(one) == len(two) == len(stories)
    for a, b, story in zip(one, two, stories, strict=True):
        assert a.ids.tolist() == b.ids.tolist() == tokenizer.encode(story.text) and a[2:] == b[2:]
        assert a.text_bytes == len(story.text.encode()) and a.log_prob == story.log_prob and not a.roundtrip_failed


@pytest.mark.parametrize("changed", ["a setting", "the stories"])
def test_an_unfinished_corpus_of_other_content_starts_over(capsys, changed):
    assert main(arguments(shard_tokens=100)) == 0
    manifest = json.loads(Path("corpus/manifest.json").read_text())
    Path("corpus/manifest.json").unlink()
    kept = {key: manifest[key] for key in ("version", "settings", "source", "tokenizer_hash", "splits")}
    Path("corpus/progress.json").write_text(json.dumps(kept))
    if changed == "the stories":
        Path("s.txt").write_bytes(Path("s.txt").read_bytes() + b"\n<|endoftext|>\nOne more.")
    argv = arguments(shard_tokens=100 if changed == "the stories" else 90)
    capsys.readouterr()
    assert main(argv) == 0
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("data.dir=corpus: the unfinished corpus here was started from other settings or stories (")
    assert line.endswith("); starting over")
    assert ("s.txt: " if changed == "the stories" else "data.shard_tokens 100 -> 90") in line
    assert main([*argv, "data.dir=other"]) == 0
    assert whole("corpus") == whole("other")


def test_stories_that_change_while_being_read_are_refused(capsys):
    def change_after_reading(documents, finished):
        yield from skip_finished(documents, finished)
        with open("s.txt", "a") as file:
            file.write("!")

    with mock.patch("data.prepare.skip_finished", change_after_reading):
        error = refusal(capsys, arguments())
    assert error == ("data.source=s.txt: it changed while it was being read; run the same command again to start over")
    assert not Path("corpus/manifest.json").exists() and main(arguments()) == 0
    assert main(arguments(dir="other")) == 0 and whole("corpus") == whole("other")


def test_a_process_killed_while_answering_is_not_waited_for():
    with _EncoderProcess(Path(model(STORIES))) as encoder:
        encoder._pipe.send(STORIES * 1000)  # the answer is larger than the buffer of a pipe
        assert encoder._pipe.poll(60)
        encoder._process.kill()
        with pytest.raises(UserError, match="was killed"):
            encoder.encode([])
