"""Whole runs: the same at any number of processes, and the same if they are stopped and resumed."""

import shutil

import numpy as np
import pytest

from data.settings import UserError
from tests.support import run_cases as cases
from trainer.checkpoint.folder import complete_checkpoints, read_manifest
from trainer.metrics import read_lines

RUN = "tests.support.run_cases:run_words"


@pytest.fixture(scope="module")
def plain(corpus_dir, tmp_path_factory):
    """A run of 20 steps on one process, with dropout."""
    runs = tmp_path_factory.mktemp("runs")
    assert cases.run(corpus_dir, runs, "run.name=plain", "model.dropout=0.1", "checkpoint.every=7") == 0
    return runs / "plain"


@pytest.mark.parametrize("world, words", [(2, []), (3, []), (2, ["train.micro_batch_size=1", "train.reduce=every"])])
def test_losses_agree_at_any_number_of_processes(pool, corpus_dir, plain, tmp_path, world, words):
    words = ["run.name=many", "model.dropout=0.1", *words]
    pool.run(world, RUN, corpus=str(corpus_dir), runs=str(tmp_path), more=words)
    np.testing.assert_allclose(cases.losses(tmp_path / "many"), cases.losses(plain), rtol=1e-5)


@pytest.mark.parametrize("words", [["data.pack=false"], ["data.mask_documents=true"], ["train.dtype=bfloat16"]])
def test_losses_agree_for_every_row_format_and_in_bf16(pool, corpus_dir, tmp_path, words):
    words = ["model.dropout=0.1", "train.steps=6", *words]
    assert cases.run(corpus_dir, tmp_path, "run.name=one", *words) == 0
    pool.run(2, RUN, corpus=str(corpus_dir), runs=str(tmp_path), more=["run.name=two", *words])
    tolerance = 1e-2 if "bfloat16" in words[-1] else 1e-5
    np.testing.assert_allclose(cases.losses(tmp_path / "two"), cases.losses(tmp_path / "one"), rtol=tolerance)


def test_loss_falls_and_metrics_are_complete(plain):
    losses = cases.losses(plain)
    assert len(losses) == 20 and np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.3
    line = read_lines(plain / "metrics.jsonl")[5]
    for key in ("kind", "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "expert_load_max"):
        assert key in line
    # on a CPU no peak is known, so there is no MFU, and no allocator reserves memory
    assert line["tflops"] > 0 and line["memory_gib"] > 0.1 and not {"mfu", "memory_reserved_gib"} & line.keys()
    lines = [x for x in read_lines(plain / "metrics.jsonl") if x["kind"] == "train"]
    flops_per_token = {1e12 * x["tflops"] / x["tokens_per_second"] for x in lines}
    assert max(flops_per_token) == pytest.approx(min(flops_per_token))
    tokens = [x["tokens"] for x in lines]
    assert 6 * 32 * 20 * 0.95 < tokens[-1] <= 6 * 32 * 20


@pytest.mark.parametrize("world", [1, 2])
def test_resumed_runs_equal_uninterrupted_ones(pool, corpus_dir, plain, tmp_path, world):
    """Stopped at 7 and at 13 and resumed: bitwise the same losses and weights."""

    def train(name, *words):
        words = [f"run.name={name}", "model.dropout=0.1", "checkpoint.every=100", *words]
        if world == 1:
            assert cases.run(corpus_dir, tmp_path, *words) == 0
        else:
            pool.run(world, RUN, corpus=str(corpus_dir), runs=str(tmp_path), more=words)

    train("parts", "train.stop_at=7")
    train("parts", "train.stop_at=13")
    assert [p.name for p in complete_checkpoints(tmp_path / "parts" / "checkpoints")] == [
        "step-00000007",
        "step-00000013",
    ]
    train("parts")
    train("whole")
    assert cases.losses(tmp_path / "parts") == cases.losses(tmp_path / "whole")
    assert cases.last_digest(tmp_path / "parts") == cases.last_digest(tmp_path / "whole")
    counts = [
        read_manifest(complete_checkpoints(tmp_path / n / "checkpoints")[-1])["tokens"] for n in ("parts", "whole")
    ]
    assert counts[0] == counts[1]
    if world == 1:
        assert cases.last_digest(plain) == cases.last_digest(tmp_path / "whole")


MOVES = [[(3, 1, 1, 7), (2, 1, 1, 13)], [(4, 1, 4, 4), (3, 1, 3, 8), (4, 2, 2, 11), (4, 1, 2, 14), (2, 1, 2, 17)]]


@pytest.mark.parametrize("moves", MOVES)
def test_resume_at_another_number_of_processes(pool, corpus_dir, plain, tmp_path, moves):
    words = ["run.name=move", "model.dropout=0.1"]
    for world, replicate, expert, stop in moves:
        more = [*words, f"parallel.replicate={replicate}", f"parallel.expert={expert}", f"train.stop_at={stop}"]
        pool.run(world, RUN, corpus=str(corpus_dir), runs=str(tmp_path), more=more)
    assert cases.run(corpus_dir, tmp_path, *words) == 0
    np.testing.assert_allclose(cases.losses(tmp_path / "move"), cases.losses(plain), rtol=1e-5)


def test_evaluation_changes_nothing_and_is_equal_at_any_world(pool, corpus_dir, plain, tmp_path):
    words = ["run.name=eval", "model.dropout=0.1", "eval.every=5", "eval.batches=all", "eval.final=all"]
    words += ["sample.every=5", "data.seq_len=32"]
    assert cases.run(corpus_dir, tmp_path / "1", *words) == 0
    assert cases.losses(tmp_path / "1" / "eval") == cases.losses(plain)
    assert cases.last_digest(tmp_path / "1" / "eval") == cases.last_digest(plain)
    more = [*words, "parallel.expert=3"]  # samples and evaluations use the all-to-all exchange
    pool.run(3, RUN, corpus=str(corpus_dir), runs=str(tmp_path / "3"), more=more)
    one, three = ([x for x in read_lines(tmp_path / w / "eval" / "metrics.jsonl") if x["kind"] == "eval"] for w in "13")
    assert [x["step"] for x in one] == [5, 10, 15, 20]
    for a, b in zip(one, three, strict=True):
        assert a["stories"] == b["stories"] and a["tokens"] == b["tokens"] and a["cut"] == b["cut"] > 0
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert (tmp_path / "1" / "eval" / "samples" / "step-00000005.txt").read_text().startswith("Once upon a time")


def test_resume_logs_what_it_does(corpus_dir, plain, tmp_path, capsys):
    shutil.copytree(plain, tmp_path / "again")
    words = ["run.name=again", "model.dropout=0.1", "checkpoint.every=7"]
    assert cases.run(corpus_dir, tmp_path, *words) == 0
    out = capsys.readouterr().out
    assert "finished at step 20" in out and "run.name=" in out and "train.steps=" in out
    assert cases.run(corpus_dir, tmp_path, *words, "train.steps=22", "train.clip=0.5") == 0
    out = capsys.readouterr().out
    assert "train.steps: 20 -> 22" in out and "train.clip: 1.0 -> 0.5" in out and "learning rate" in out
    assert out.splitlines()[0] == "resumed from step 20"
    assert len(cases.losses(tmp_path / "again")) == 22


def test_torn_lines_and_lines_after_the_checkpoint_are_removed(corpus_dir, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "torn")
    shutil.rmtree(tmp_path / "torn" / "checkpoints" / "step-00000020")
    with open(tmp_path / "torn" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    assert cases.run(corpus_dir, tmp_path, "run.name=torn", "model.dropout=0.1", "checkpoint.every=7") == 0
    assert cases.losses(tmp_path / "torn") == cases.losses(plain)


def test_a_checkpoint_after_an_evaluation_is_complete(pool, corpus_dir, tmp_path):
    """After an evaluation the weights stay gathered, and a checkpoint must contain the sharded ones."""
    words = ["run.name=e", "train.steps=3", "eval.every=1", "eval.batches=2", "checkpoint.every=1"]
    pool.run(2, RUN, corpus=str(corpus_dir), runs=str(tmp_path), more=[*words, "train.stop_at=2"])
    shutil.rmtree(complete_checkpoints(tmp_path / "e" / "checkpoints")[-1])
    pool.run(2, RUN, corpus=str(corpus_dir), runs=str(tmp_path), more=words)  # resumes from step 1
    assert len(cases.losses(tmp_path / "e")) == 3


def test_a_partial_checkpoint_is_ignored(corpus_dir, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "half")
    folder = tmp_path / "half" / "checkpoints"
    (folder / "step-00000020").rename(folder / ".partial-step-00000020")
    (folder / ".partial-step-00000020" / "manifest.json").unlink()
    (folder / "notes of mine").mkdir()
    assert cases.run(corpus_dir, tmp_path, "run.name=half", "model.dropout=0.1", "checkpoint.every=7") == 0
    assert cases.last_digest(tmp_path / "half") == cases.last_digest(plain)
    assert (folder / "notes of mine").is_dir()


@pytest.mark.parametrize(
    "words, message",
    [
        (["model.dim=32"], r"made with another model \(model.dim: 16 -> 32\); choose another run.name="),
        (["train.global_batch_size=100000"], "train.global_batch_size=100000: the corpus holds"),
        (["data.vocab_size=400"], "data.vocab_size"),
        (["data.dir=nowhere"], "data.prepare"),
        (["parallel.shard=3"], "parallel.shard=3: must be 1, the 1 processes"),
        (["run.device=cuda"], "run.device=cuda: 1 process on this machine, 0 CUDA devices"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(corpus_dir, plain, tmp_path, words, message):
    shutil.copytree(plain, tmp_path / "same")
    before = {p: p.read_bytes() for p in (tmp_path / "same").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=message) as error:
        cases.run(corpus_dir, tmp_path, "run.name=same", "model.dropout=0.1", *words)
    assert "\n" not in str(error.value)
    assert before == {p: p.read_bytes() for p in (tmp_path / "same").rglob("*") if p.is_file()}


def test_fewer_sequences_than_processes_are_refused(corpus_dir, tmp_path, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 8, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="train.global_batch_size=6: fewer sequences than the 8 processes"):
        cases.run(corpus_dir, tmp_path)


def test_a_damaged_shard_ends_the_run_before_it_starts(corpus_dir, tmp_path):
    shutil.copytree(corpus_dir, tmp_path / "flipped")
    shard = sorted((tmp_path / "flipped").glob("train*.shard"))[1]
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=shard.name):
        cases.run(tmp_path / "flipped", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_31_experts_resume_on_other_numbers_of_ranks(pool, corpus_dir, tmp_path):
    """Experts over 2 of 6 ranks, each sharded over 3 in another dimension; over all 6; over 4; and on one rank."""
    words = ["model.n_experts=31", "model.expert_dim=24", "train.steps=4", "train.global_batch_size=12"]
    assert cases.run(corpus_dir, tmp_path, "run.name=one", *words) == 0
    for world, expert, stop in ((6, 2, 1), (6, 6, 2), (4, 4, 3), (1, 1, 4)):
        more = ["run.name=many", *words, f"parallel.expert={expert}", f"train.stop_at={stop}"]
        if world > 1:
            pool.run(world, RUN, corpus=str(corpus_dir), runs=str(tmp_path), more=more)
    assert cases.run(corpus_dir, tmp_path, *more) == 0
    np.testing.assert_allclose(cases.losses(tmp_path / "many"), cases.losses(tmp_path / "one"), rtol=1e-5)


def test_unused_expert_slots_are_not_saved(pool, corpus_dir, tmp_path):
    from safetensors import safe_open

    more = ["run.name=dead", "train.steps=3", "parallel.expert=4"]
    pool.run(4, RUN, corpus=str(corpus_dir), runs=str(tmp_path), more=more)
    names = [f"{kind}blocks.0.feed_forward.experts.down" for kind in ("", "optim.exp_avg.", "optim.exp_avg_sq.")]
    rows = []
    for path in complete_checkpoints(tmp_path / "dead" / "checkpoints")[-1].glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            rows += [(name, len(file.get_tensor(name))) for name in names if name in file.keys()]  # noqa: SIM118
    for name in names:
        assert sum(count for row_name, count in rows if row_name == name) == 5, name


def test_plan_names_a_better_expert_degree(corpus_dir, tmp_path, monkeypatch, capsys):
    from trainer.dryrun import print_plan

    for name, value in {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    print_plan(cases.config(corpus_dir, tmp_path, "parallel.expert=4"))
    out = capsys.readouterr().out
    assert "experts     5 over 4 ranks, 2 slots per rank (60% more than needed)" in out
    assert out.count("set parallel.expert=1 to reduce this to 0%") == 1


def test_checkpoints_hold_logical_shapes_and_no_pickle(pool, corpus_dir, tmp_path):
    from safetensors import safe_open

    words = ["run.name=c", "train.steps=4", "checkpoint.every=1", "checkpoint.keep=2"]
    pool.run(3, RUN, corpus=str(corpus_dir), runs=str(tmp_path), more=words)
    found = complete_checkpoints(tmp_path / "c" / "checkpoints")
    assert [p.name for p in found] == ["step-00000003", "step-00000004"]
    assert {p.suffix for p in found[-1].iterdir()} == {".safetensors", ".json", ".model"}
    manifest = read_manifest(found[-1])
    assert manifest["world"] == 3 and manifest["config"]["model"]["n_experts"] == 5
    rows = 0
    for path in found[-1].glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if "optim.exp_avg.blocks.0.feed_forward.experts.down" in file.keys():  # noqa: SIM118
                rows += file.get_slice("optim.exp_avg.blocks.0.feed_forward.experts.down").get_shape()[0]
    assert rows == 5


def test_epochs_are_passes_over_the_corpus(corpus_dir, tmp_path):
    """On the command line `epochs` replaces `steps`; rows that do not fill a last step are not used."""
    from data.loader import training_rows
    from data.shards import Corpus

    config = cases.config(corpus_dir, tmp_path)
    rows = len(training_rows(Corpus.open(corpus_dir).split("train"), config.data, 1, 0))
    assert cases.run(corpus_dir, tmp_path, "run.name=e", "train.epochs=0.01") == 0
    assert len(cases.losses(tmp_path / "e")) == int(0.01 * rows / 6) > 0
