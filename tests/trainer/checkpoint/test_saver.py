"""Checkpoint folders: complete or absent, verified when read, kept and removed. A save that fails loses nothing."""

import json
import os
import pickle
import shutil
import subprocess
import threading
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.settings import UserError
from tests.support import run_cases as cases
from trainer.checkpoint import layout
from trainer.checkpoint.folder import CHECKSUM_KEY, complete_checkpoints, open_checkpoint, prune_checkpoints
from trainer.checkpoint.load import load_model, weights_digest
from trainer.checkpoint.saver import Saver
from trainer.config import CheckpointConfig
from trainer.fault_tolerance.run_lock import LockLost, RunLock
from trainer.metrics import read_lines

CASES = "tests.support.run_cases:"
RUN = CASES + "run_in_pool"


@pytest.fixture(scope="module")
def finished_run(corpus_dir, tmp_path_factory):
    """The folder of a run of six steps, with checkpoints of steps 2, 4 and 6."""
    runs = tmp_path_factory.mktemp("runs")
    assert cases.run(corpus_dir, runs, "run.name=finished", "train.steps=6", "checkpoint.every=2") == 0
    return runs / "finished"


def make_saver(folder, tensors, on_saved=lambda *result: None, lock=None, **keys):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a tokenizer").write_bytes(b"words")
    return Saver(folder / "checkpoints", tensors, folder / "a tokenizer", CheckpointConfig(**keys), lock, on_saved)


# (world, replicate, expert)
MESHES = [(4, 1, 4), (4, 1, 2), (4, 2, 2), (3, 1, 3), (3, 1, 1), (2, 1, 2), (2, 1, 1), (1, 1, 1)]


@pytest.mark.slow
def test_any_mesh_reads_the_checkpoints_of_any_other(pool, tmp_path):
    """Weights, moments and biases are bitwise equal, saved either way; 31 experts, sharded in dimension 1 or 2."""

    def call(function, mesh, **keys):
        world, replicate, expert = mesh
        keys.update(replicate=replicate, expert=expert)
        return pool.run(world, CASES + function, **keys)

    digest = None
    for number, mesh in enumerate(MESHES):
        folder = str(tmp_path / str(number))
        written = call("save_random", mesh, folder=folder, async_save=number % 2 == 1)
        digest = digest or written[0]
        assert set(written) == {digest}
    for number, mesh in enumerate(MESHES):
        folders = [str(tmp_path / str(n)) for n in range(len(MESHES)) if n != number]
        for found in call("load_all", mesh, folders=folders):
            assert found == [digest] * len(folders)


def test_background_saves_equal_saves_that_wait(pool, corpus_dir, finished_run, tmp_path, monkeypatch):
    """Bit by bit, although weights change while they are written, and although the writer starts late."""
    finish = layout.StagingBuffer.finish
    monkeypatch.setattr(layout.StagingBuffer, "finish", lambda staging: (time.sleep(0.2), finish(staging)))
    words = ["run.name=beside", "train.steps=6", "checkpoint.every=2", "checkpoint.async_save=true"]
    assert cases.run(corpus_dir, tmp_path, *words) == 0
    for a, b in zip(
        complete_checkpoints(finished_run / "checkpoints"),
        complete_checkpoints(tmp_path / "beside" / "checkpoints"),
        strict=True,
    ):
        assert a.name == b.name
        assert (a / "shard-00000.safetensors").read_bytes() == (b / "shard-00000.safetensors").read_bytes()
    saved = [x["at"] for x in read_lines(tmp_path / "beside" / "metrics.jsonl") if x.get("event") == "saved"]
    assert saved == [2, 4, 6]
    both = [["run.name=w"], ["run.name=b", "checkpoint.async_save=true"]]
    for more in both:
        more += ["train.steps=4", "checkpoint.every=1", "checkpoint.keep=9", "parallel.expert=2"]
        pool.run(2, RUN, corpus=str(corpus_dir), runs=str(tmp_path), more=more)
    found = [complete_checkpoints(tmp_path / name / "checkpoints") for name in "wb"]
    assert len(found[0]) == 4
    for a, b in zip(*found, strict=True):
        for name in ("shard-00000.safetensors", "shard-00001.safetensors"):
            assert (a / name).read_bytes() == (b / name).read_bytes()


def test_the_copy_is_complete_before_weights_change(tmp_path):
    """Although the thread that writes has not started to copy."""
    tensors, writer_may_start = {"w": torch.arange(1000.0)}, threading.Event()
    saver = make_saver(tmp_path, tensors, async_save=True)
    saver._thread.submit(writer_may_start.wait)
    saver.save(1, {})
    assert not saver.ready and not complete_checkpoints(tmp_path / "checkpoints")
    saver.wait_for_staging()
    tensors["w"] += 1
    writer_may_start.set()
    saver.finish()
    loaded = load_tensors(tmp_path / "checkpoints" / "step-00000001", w=1000)
    assert torch.equal(loaded["w"], torch.arange(1000.0))
    saver.close()


def load_tensors(path, **sizes):
    found = open_checkpoint(path)
    tensors = {name: torch.zeros(size) for name, size in sizes.items()}
    layout.read(path, found.manifest["files"], found.manifest["tensors"], tensors)
    return tensors


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped byte": (lambda p: flip(p / "shard-00000.safetensors", -1), "block 0 is damaged"),
    "a flipped byte in a header": (lambda p: flip(p / "shard-00000.safetensors", 20), "block 0 is damaged"),
    "a flipped byte in the tokenizer": (
        lambda p: flip(p / "tokenizer.model", 9),
        "tokenizer.model: block 0 is damaged",
    ),
    "a changed manifest": (lambda p: flip_digit(p / "manifest.json"), "manifest.json is damaged"),
    "a path in the manifest": (lambda p: lead_out(p / "manifest.json"), "manifest.json names a file outside"),
    "half a file": (lambda p: os.truncate(p / "shard-00000.safetensors", 2000), "has 2,000 of"),
    "no file": (lambda p: (p / "shard-00000.safetensors").unlink(), "shard-00000.safetensors is missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "incomplete, manifest.json is missing"),
    "half a manifest": (lambda p: os.truncate(p / "manifest.json", 100), "manifest.json cannot be read"),
    "another format": (
        lambda p: (p / "manifest.json").write_text('{"format": 1}'),
        "checkpoint format 1, but this version reads format 2",
    ),
    "no format": (
        lambda p: (p / "manifest.json").write_text("[]"),
        "checkpoint format None, but this version reads format 2",
    ),
}


def flip_digit(path):
    path.write_text(path.read_text().replace('"tokens": ', '"tokens": 1'))


def lead_out(path):
    """Make a manifest name a file outside its folder, with a correct checksum."""
    body, key, _ = path.read_bytes().replace(b'"shard-', b'"../step-00000006/shard-').rpartition(CHECKSUM_KEY)
    path.write_bytes(body + key + f"{zlib.crc32(body)}\n}}\n".encode())


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_and_named(finished_run, tmp_path, kind, capsys):
    shutil.copytree(finished_run, tmp_path / "run")
    newest = complete_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    damage, message = DAMAGE[kind]
    damage(newest)
    before = {p: p.read_bytes() for p in newest.rglob("*") if p.is_file()}
    model, _, _ = load_model(tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("skipped checkpoint step-00000006: ") and message in lines[0] and "step 4" in lines[1]
    assert weights_digest(model) == weights_digest(load_model(finished_run / "checkpoints" / "step-00000004")[0])
    if (newest / "manifest.json").exists():
        with pytest.raises(UserError, match="step-00000006") as error:  # no other is tried if it was requested
            load_model(newest)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert before == {p: p.read_bytes() for p in newest.rglob("*") if p.is_file()}


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(pool, corpus_dir, tmp_path):
    """All ranks agree, although only one reads the damaged file. The run then overwrites the damaged checkpoint."""

    def train(*more):
        more = ["train.steps=6", "checkpoint.every=2", *more]
        pool.run(2, RUN, corpus=str(corpus_dir), runs=str(tmp_path), more=more)

    train("run.name=whole")
    train("run.name=r", "train.stop_at=4")
    folder = tmp_path / "r" / "checkpoints"
    flip(folder / "step-00000004" / "shard-00001.safetensors", -1)
    (folder / "step-00000003").mkdir()
    train("run.name=r")
    starts = [x for x in read_lines(tmp_path / "r" / "metrics.jsonl") if x.get("event") == "start"]
    assert [x["step"] for x in starts] == [0, 2]
    assert cases.last_digest(tmp_path / "r") == cases.last_digest(tmp_path / "whole")
    assert {p.name for p in folder.iterdir()} == {f"step-{n:08d}" for n in (2, 3, 4, 6)}


def test_a_run_without_a_usable_checkpoint_is_refused(corpus_dir, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    for path in complete_checkpoints(tmp_path / "run" / "checkpoints"):
        flip(path / "shard-00000.safetensors", -1)
    with pytest.raises(
        UserError, match="no checkpoint in this folder can be used .*step-00000006: .*step-00000002: "
    ) as error:
        cases.run(corpus_dir, tmp_path, "run.name=run", "train.steps=8")
    assert "\n" not in str(error.value)
    assert len(complete_checkpoints(tmp_path / "run" / "checkpoints")) == 3


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_planted_pickle_is_never_run(corpus_dir, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    evil = pickle.dumps(Evil(tmp_path / "it ran"))
    newest = complete_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    for name in (".metadata", "model.pt", "shard-00001.safetensors", "data.pkl"):
        (newest / name).write_bytes(evil)
    torch.save(Evil(tmp_path / "it ran"), newest / "optimizer.pt")
    assert cases.run(corpus_dir, tmp_path, "run.name=run", "train.steps=8") == 0
    shard = complete_checkpoints(tmp_path / "run" / "checkpoints")[-1] / "shard-00000.safetensors"
    shard.write_bytes(evil + bytes(shard.stat().st_size - len(evil)))
    assert cases.run(corpus_dir, tmp_path, "run.name=run", "train.steps=10") == 0
    assert not (tmp_path / "it ran").exists()
    pickle.loads(evil)
    assert (tmp_path / "it ran").exists()  # the pickle works


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(1, 40), max_size=12), st.integers(1, 4), st.sampled_from([0, 1, 4, 10]), st.integers(1, 40))
def test_the_newest_and_every_nth_checkpoint_are_kept(tmp_path_factory, steps, keep, keep_every, now):
    folder = tmp_path_factory.mktemp("k")
    for step in steps | {now}:
        (folder / f"step-{step:08d}").mkdir()
        (folder / f"step-{step:08d}" / "manifest.json").write_text("{}")
    for name in ("step-00000001.bak", "notes", "step-7", "step-00000000"):  # the last without a manifest
        (folder / name).mkdir()
    prune_checkpoints(folder, now, keep, keep_every)
    left = {int(p.name[5:]) for p in complete_checkpoints(folder)}
    behind = sorted(s for s in steps | {now} if s <= now)
    stays = set(behind[-keep:]) | {s for s in behind if keep_every and s % keep_every == 0}
    assert left == stays | {s for s in steps if s > now}
    assert {"step-00000001.bak", "notes", "step-7", "step-00000000"} <= {p.name for p in folder.iterdir()}


def test_folders_of_killed_saves_are_removed_and_no_others(corpus_dir, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    for name in (".partial-step-00000008-0123456789abcdef", ".old-step-00000002", ".partial-mine", "notes"):
        (folder / name).mkdir()
    assert cases.run(corpus_dir, tmp_path, "run.name=run", "train.steps=7", "checkpoint.keep=4") == 0
    assert {p.name for p in folder.iterdir()} == {*(f"step-0000000{n}" for n in (2, 4, 6, 7)), ".partial-mine", "notes"}


@contextmanager
def small_disk(folder, size):
    folder.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]).returncode:
        pytest.skip("root is needed to mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_drops_the_save_and_nothing_else(tmp_path, async_save):
    tensors, results = {"w": torch.arange(250_000.0)}, []  # 1 MB
    with small_disk(tmp_path / "disk", "2500k"):
        saver = make_saver(
            tmp_path / "disk", tensors, lambda *result: results.append(result), async_save=async_save, keep=1
        )
        folder, filler = tmp_path / "disk" / "checkpoints", tmp_path / "disk" / "filler"
        saver.save(1, {})
        saver.finish()
        filler.write_bytes(bytes(1_000_000))
        saver.save(2, {})
        saver.wait_for_staging()
        tensors["w"] += 1
        saver.finish()
        assert saver.failed and saver.newest == 1
        assert [p.name for p in folder.iterdir()] == ["step-00000001"]
        assert torch.equal(load_tensors(folder / "step-00000001", w=250_000)["w"], torch.arange(250_000.0))
        filler.unlink()
        saver.save(3, {})
        saver.finish()
        saver.close()
        assert not saver.failed and [p.name for p in folder.iterdir()] == ["step-00000003"]
    assert [(step, why) for step, _, why in results] == [(1, None), (2, "No space left on device"), (3, None)]


@pytest.mark.parametrize("words", [[], ["checkpoint.async_save=true"]])
def test_a_run_continues_after_failed_saves_and_exits_with_1(pool, corpus_dir, tmp_path, capsys, words):
    """A disk with room for three checkpoints. On two ranks, one has a limit on the size of files instead."""
    words = [*words, "train.steps=10", "checkpoint.every=2", "checkpoint.keep=9"]
    with small_disk(tmp_path / "disk", "1100k"):
        assert cases.run(corpus_dir, tmp_path / "disk", "run.name=full", *words) == 1
        folder = tmp_path / "disk" / "full"
        saved = sorted(p.name for p in (folder / "checkpoints").iterdir())
        assert saved and saved == [f"step-{2 * n:08d}" for n in range(1, len(saved) + 1)] and len(saved) < 5
        steps = [x["step"] for x in read_lines(folder / "metrics.jsonl") if x["kind"] == "train"]
        # A line is dropped if it needs a new block of the disk while a background save fills it.
        assert steps[-1] == 10 and len(steps) >= (8 if "checkpoint.async_save=true" in words else 10)
    out = capsys.readouterr().out
    assert f"checkpoint of step {2 * len(saved) + 2}: No space left on device; dropped on all ranks" in out
    codes = pool.run(
        2, CASES + "run_on_small_disk", corpus=str(corpus_dir), runs=str(tmp_path), more=["run.name=two", *words]
    )
    assert codes == [1, 1] and len(cases.losses(tmp_path / "two")) == 10
    assert not any((tmp_path / "two" / "checkpoints").iterdir())
    why = [x["why"] for x in read_lines(tmp_path / "two" / "metrics.jsonl") if x.get("event") == "save failed"]
    assert why == ["File too large"] * 5


def test_a_run_that_lost_its_lock_publishes_nothing(tmp_path):
    lock = RunLock(tmp_path / "run")
    saver = make_saver(tmp_path / "run", {"w": torch.ones(9)}, lock=lock, async_save=True)
    saver.save(1, {}, wait=True)
    saver.save(2, {})
    lock.path.write_text(json.dumps({"id": "another", "host": "elsewhere"}))
    with pytest.raises(LockLost):
        saver.finish()
    saver.close()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    lock.release()


@pytest.mark.slow
def test_a_save_needs_little_memory_and_keeps_none(tmp_path):
    """192 MB of tensors; two threads have two buffers of 16 MiB each. The staging buffer is the only full copy."""
    memory = cases.memory_of_saves(str(tmp_path))
    assert memory["waiting"] < 96e6
    assert memory["staged"] < 192e6 + 96e6
    assert memory["after 50"] < 16e6


def test_another_corpus_is_refused_unless_it_is_allowed(corpus_dir, finished_run, tmp_path, capsys):
    from data.prepare import main

    shutil.copytree(finished_run, tmp_path / "run")
    same = ["data.stories=900", "data.validation=0.05", "data.shard_tokens=40000"]
    assert main([*same, f"data.dir={tmp_path}/c", f"data.tokenizer={corpus_dir}/tokenizer.model"]) == 0
    other = [*same, f"data.tokenizer={corpus_dir}/tokenizer.model", "run.name=run", "train.steps=8"]
    with pytest.raises(UserError, match="another corpus .*checkpoint.allow_other_corpus=true"):
        cases.run(tmp_path / "c", tmp_path, *other)
    assert cases.run(tmp_path / "c", tmp_path, *other, "checkpoint.allow_other_corpus=true") == 0
    assert "continuing on another corpus" in capsys.readouterr().out
    assert main([*same, f"data.dir={tmp_path}/d", "data.vocab_size=310"]) == 0
    words = [*same, "data.vocab_size=310", "run.name=run", "checkpoint.allow_other_corpus=true", "train.steps=10"]
    with pytest.raises(UserError, match=r"another tokenizer \(vocabulary 320 -> 310\)"):
        cases.run(tmp_path / "d", tmp_path, *words)
