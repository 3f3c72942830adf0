"""Checkpoints as folders: complete or not there, verified, kept and dropped; nothing lost by a save that fails."""

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
from trainer import checkpoint
from trainer.checkpoint import layout
from trainer.checkpoint.folder import complete_checkpoints, open_checkpoint, prune_checkpoints
from trainer.checkpoint.saver import Saver
from trainer.config import CheckpointConfig
from trainer.fault_tolerance.run_lock import LockLost, RunLock
from trainer.metrics import read_lines

RUN = "tests.support.run_cases:run_words"
SAVED = "tests.support.run_cases:"


@pytest.fixture(scope="module")
def plain(corpus_dir, tmp_path_factory):
    """A run of six steps and its checkpoints of steps 2, 4 and 6."""
    runs = tmp_path_factory.mktemp("runs")
    assert cases.run(corpus_dir, runs, "run.name=plain", "train.steps=6", "checkpoint.every=2") == 0
    return runs / "plain"


def saver_of(folder, tensors, tell=lambda *a: None, lock=None, **keys):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a tokenizer").write_bytes(b"words")
    return Saver(folder / "checkpoints", tensors, folder / "a tokenizer", CheckpointConfig(**keys), lock, tell)


MESHES = [(4, 1, 4), (4, 1, 2), (4, 2, 2), (3, 1, 3), (3, 1, 1), (2, 1, 2), (2, 1, 1), (1, 1, 1)]


@pytest.mark.slow
def test_any_mesh_reads_what_any_other_wrote(pool, tmp_path):
    """Weights, moments and biases, bitwise, saved either way; 31 experts, cut in the second dimension or the third."""

    def call(function, mesh, **keys):
        world, replicate, expert = mesh
        keys.update(replicate=replicate, expert=expert)
        return pool.run(world, SAVED + function, **keys)

    want = None
    for number, mesh in enumerate(MESHES):
        folder = str(tmp_path / str(number))
        written = call("save_random", mesh, folder=folder, async_save=number % 2 == 1)
        want = want or written[0]
        assert set(written) == {want}
    for number, mesh in enumerate(MESHES):
        folders = [str(tmp_path / str(n)) for n in range(len(MESHES)) if n != number]
        for found in call("load_all", mesh, folders=folders):
            assert found == [want] * len(folders)


def test_saves_beside_the_training_hold_what_saves_that_wait_hold(pool, corpus_dir, plain, tmp_path, monkeypatch):
    """The same steps, bit by bit, though weights move on while they are written, and the writer comes late."""
    help_ = layout.StagingBuffer.help
    monkeypatch.setattr(layout.StagingBuffer, "help", lambda image: (time.sleep(0.2), help_(image)))
    words = ["run.name=beside", "train.steps=6", "checkpoint.every=2", "checkpoint.async_save=true"]
    assert cases.run(corpus_dir, tmp_path, *words) == 0
    for a, b in zip(
        complete_checkpoints(plain / "checkpoints"),
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


def test_a_copy_that_the_writer_has_not_begun_is_made_before_weights_move(tmp_path):
    tensors, go = {"w": torch.arange(1000.0)}, threading.Event()
    saver = saver_of(tmp_path, tensors, async_save=True)
    saver._thread.submit(go.wait)
    saver.save(1, {})
    assert not saver.ready and not complete_checkpoints(tmp_path / "checkpoints")
    saver.wait_for_staging()
    tensors["w"] += 1
    go.set()
    saver.finish()
    back = read_back(tmp_path / "checkpoints" / "step-00000001", w=1000)
    assert torch.equal(back["w"], torch.arange(1000.0))
    saver.close()


def read_back(path, **sizes):
    found = open_checkpoint(path)
    tensors = {name: torch.zeros(size) for name, size in sizes.items()}
    layout.read(path, found.manifest["files"], found.manifest["tensors"], tensors)
    return tensors


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped byte": (lambda p: flip(p / "shard-00000.safetensors", -1), "block 0 is not what was written"),
    "one in a header": (lambda p: flip(p / "shard-00000.safetensors", 20), "block 0 is not what was written"),
    "one in the tokenizer": (lambda p: flip(p / "tokenizer.model", 9), "tokenizer.model: block 0 is not what"),
    "one in the manifest": (lambda p: flip_digit(p / "manifest.json"), "manifest.json is not what was written"),
    "a path in it": (lambda p: lead_out(p / "manifest.json"), "manifest.json is not what was written"),
    "half a file": (lambda p: os.truncate(p / "shard-00000.safetensors", 2000), "has 2,000 of"),
    "no file": (lambda p: (p / "shard-00000.safetensors").unlink(), "shard-00000.safetensors is missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "half a checkpoint, it has no manifest.json"),
    "half a manifest": (lambda p: os.truncate(p / "manifest.json", 100), "manifest.json cannot be read"),
    "another format": (lambda p: (p / "manifest.json").write_text('{"format": 1}'), "format 1, this version reads 2"),
    "no format": (lambda p: (p / "manifest.json").write_text("[]"), "format None, this version reads 2"),
}


def flip_digit(path):
    path.write_text(path.read_text().replace('"tokens": ', '"tokens": 1'))


def lead_out(path):
    """To a file elsewhere, with a checksum that is right."""
    body, seal, _ = path.read_bytes().replace(b'"shard-', b'"../step-00000006/shard-').rpartition(checkpoint.SEAL)
    path.write_bytes(body + seal + f"{zlib.crc32(body)}\n}}\n".encode())


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_passed_over_and_named(plain, tmp_path, kind, capsys):
    from trainer.checkpoint.load import load_model

    shutil.copytree(plain, tmp_path / "run")
    newest = complete_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    break_it, message = DAMAGE[kind]
    break_it(newest)
    before = {p: p.read_bytes() for p in newest.rglob("*") if p.is_file()}
    model, _, _ = load_model(tmp_path / "run")
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("skipped checkpoint step-00000006: ") and message in said[0] and "step 4" in said[1]
    assert cases.digest(model) == cases.digest(load_model(plain / "checkpoints" / "step-00000004")[0])
    if (newest / "manifest.json").exists():
        with pytest.raises(UserError, match="step-00000006") as error:  # asked for by name there is no other
            load_model(newest)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert before == {p: p.read_bytes() for p in newest.rglob("*") if p.is_file()}


def test_a_resume_goes_on_from_the_one_before(pool, corpus_dir, tmp_path):
    """Damage that one rank alone meets is agreed on. Later the damaged ones' places are taken."""

    def go(*more):
        more = ["train.steps=6", "checkpoint.every=2", *more]
        pool.run(2, RUN, corpus=str(corpus_dir), runs=str(tmp_path), more=more)

    go("run.name=whole")
    go("run.name=r", "train.stop_at=4")
    folder = tmp_path / "r" / "checkpoints"
    flip(folder / "step-00000004" / "shard-00001.safetensors", -1)
    (folder / "step-00000003").mkdir()
    go("run.name=r")
    starts = [x for x in read_lines(tmp_path / "r" / "metrics.jsonl") if x.get("event") == "start"]
    assert [x["step"] for x in starts] == [0, 2]
    assert cases.last_digest(tmp_path / "r") == cases.last_digest(tmp_path / "whole")
    assert {p.name for p in folder.iterdir()} == {f"step-{n:08d}" for n in (2, 3, 4, 6)}


def test_nothing_usable_is_refused_and_never_begun_anew(corpus_dir, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "run")
    for path in complete_checkpoints(tmp_path / "run" / "checkpoints"):
        flip(path / "shard-00000.safetensors", -1)
    with pytest.raises(UserError, match="no checkpoint there can be used .*step-00000006: .*step-00000002: ") as error:
        cases.run(corpus_dir, tmp_path, "run.name=run", "train.steps=8")
    assert "\n" not in str(error.value)
    assert len(complete_checkpoints(tmp_path / "run" / "checkpoints")) == 3


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_planted_pickle_is_never_run(corpus_dir, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "run")
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
    assert (tmp_path / "it ran").exists()  # it would have


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(1, 40), max_size=12), st.integers(1, 4), st.sampled_from([0, 1, 4, 10]), st.integers(1, 40))
def test_what_is_kept(tmp_path_factory, steps, keep, keep_every, now):
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


def test_what_killed_saves_leave_is_swept_and_nothing_else(corpus_dir, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    for name in (".partial-step-00000008-0123456789abcdef", ".old-step-00000002", ".partial-mine", "notes"):
        (folder / name).mkdir()
    assert cases.run(corpus_dir, tmp_path, "run.name=run", "train.steps=7", "checkpoint.keep=4") == 0
    assert {p.name for p in folder.iterdir()} == {*(f"step-0000000{n}" for n in (2, 4, 6, 7)), ".partial-mine", "notes"}


@contextmanager
def small_disk(folder, size):
    folder.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("beside", [False, True])
def test_a_full_disk_drops_the_save_and_nothing_else(tmp_path, beside):
    tensors, told = {"w": torch.arange(250_000.0)}, []  # 1 MB
    with small_disk(tmp_path / "disk", "2500k"):
        saver = saver_of(tmp_path / "disk", tensors, lambda *a: told.append(a), async_save=beside, keep=1)
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
        assert torch.equal(read_back(folder / "step-00000001", w=250_000)["w"], torch.arange(250_000.0))
        filler.unlink()
        saver.save(3, {})
        saver.finish()
        saver.close()
        assert not saver.failed and [p.name for p in folder.iterdir()] == ["step-00000003"]
    assert [(step, why) for step, _, why in told] == [(1, None), (2, "No space left on device"), (3, None)]


@pytest.mark.parametrize("words", [[], ["checkpoint.async_save=true"]])
def test_a_run_goes_on_where_saves_fail_and_its_exit_code_tells(pool, corpus_dir, tmp_path, capsys, words):
    """A disk with room for three. On two ranks the limit on a file's size, which one of them has, stands for it."""
    words = [*words, "train.steps=10", "checkpoint.every=2", "checkpoint.keep=9"]
    with small_disk(tmp_path / "disk", "1100k"):
        assert cases.run(corpus_dir, tmp_path / "disk", "run.name=full", *words) == 1
        folder = tmp_path / "disk" / "full"
        saved = sorted(p.name for p in (folder / "checkpoints").iterdir())
        assert saved and saved == [f"step-{2 * n:08d}" for n in range(1, len(saved) + 1)] and len(saved) < 5
        steps = [x["step"] for x in read_lines(folder / "metrics.jsonl") if x["kind"] == "train"]
        # A line that needs a new block of the disk, while a save beside the training fills it, is dropped.
        assert steps[-1] == 10 and len(steps) >= (8 if "checkpoint.async_save=true" in words else 10)
    out = capsys.readouterr().out
    assert f"checkpoint of step {2 * len(saved) + 2}: No space left on device; dropped on all ranks" in out
    codes = pool.run(
        2, SAVED + "run_on_small_disk", corpus=str(corpus_dir), runs=str(tmp_path), more=["run.name=two", *words]
    )
    assert codes == [1, 1] and len(cases.losses(tmp_path / "two")) == 10
    assert not any((tmp_path / "two" / "checkpoints").iterdir())
    why = [x["why"] for x in read_lines(tmp_path / "two" / "metrics.jsonl") if x.get("event") == "save failed"]
    assert why == ["File too large"] * 5


def test_a_writer_that_lost_its_run_publishes_nothing(tmp_path):
    lock = RunLock(tmp_path / "run")
    saver = saver_of(tmp_path / "run", {"w": torch.ones(9)}, lock=lock, async_save=True)
    saver.save(1, {}, wait=True)
    saver.save(2, {})
    lock.path.write_text(json.dumps({"id": "another", "host": "elsewhere"}))
    with pytest.raises(LockLost):
        saver.finish()
    saver.close()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    lock.release()


@pytest.mark.slow
def test_a_save_takes_little_memory_and_keeps_none(tmp_path):
    """192 MB in buffers of 16 MiB, two for each of two threads; the staged copy is the only one of its size."""
    memory = cases.memory_of_saves(str(tmp_path))
    assert memory["waiting"] < 96e6
    assert memory["staged"] < 192e6 + 96e6
    assert memory["after 50"] < 16e6


def test_another_corpus_goes_on_only_where_it_is_allowed(corpus_dir, plain, tmp_path, capsys):
    from data.prepare import main

    shutil.copytree(plain, tmp_path / "run")
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


def test_a_read_only_folder_is_one_line(corpus_dir, tmp_path):
    with small_disk(tmp_path / "disk", "1m"):
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        with pytest.raises(UserError, match="Read-only file system; the run folder cannot be written") as error:
            cases.run(corpus_dir, tmp_path / "disk", "run.name=run")
    assert "\n" not in str(error.value)
