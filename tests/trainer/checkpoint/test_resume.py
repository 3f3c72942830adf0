"""A resume changes neither the loss scale nor skipped steps nor the data order, and logs what differs."""

import numpy as np
import pytest

from data.shards import Corpus
from tests.support import run_cases as cases
from trainer.checkpoint.folder import complete_checkpoints, read_manifest
from trainer.optimizer import LossScale

RUN = "tests.support.run_cases:run_in_pool"


@pytest.mark.slow
def test_a_resumed_run_with_all_features_is_bitwise_the_same(pool, corpus_dir, tmp_path):
    """Experts on two ranks, dropout, router noise, balance bias, fp16 with its loss scale, background saves."""
    words = ["train.steps=8", "train.dtype=float16", "model.dropout=0.1", "model.noisy_top_k=true", "parallel.expert=2"]
    words += ["checkpoint.every=3", "checkpoint.async_save=true"]
    for more in (["run.name=whole"], ["run.name=parts", "train.stop_at=2"], ["run.name=parts", "train.stop_at=5"]):
        pool.run(2, RUN, corpus=str(corpus_dir), runs=str(tmp_path), more=[*words, *more])
    pool.run(2, RUN, corpus=str(corpus_dir), runs=str(tmp_path), more=[*words, "run.name=parts"])
    assert cases.losses(tmp_path / "parts") == cases.losses(tmp_path / "whole")
    newest = [complete_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "parts")]
    for name in ("shard-00000.safetensors", "shard-00001.safetensors"):  # they hold moments and biases, too
        assert (newest[0] / name).read_bytes() == (newest[1] / name).read_bytes()


def test_the_loss_scale_is_resumed(corpus_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(LossScale, "GROWTH_INTERVAL_STEPS", 3)
    words = ["train.steps=9", "train.dtype=float16"]
    assert cases.run(corpus_dir, tmp_path, *words, "run.name=whole") == 0
    for stop in (2, 5, 9):
        assert cases.run(corpus_dir, tmp_path, *words, "run.name=parts", f"train.stop_at={stop}") == 0
        manifest = read_manifest(complete_checkpoints(tmp_path / "parts" / "checkpoints")[-1])
        assert manifest["loss_scale"]["good"] == stop % 3
    scales = [
        read_manifest(complete_checkpoints(tmp_path / n / "checkpoints")[-1])["loss_scale"] for n in ("whole", "parts")
    ]
    assert scales[0] == scales[1] == {"value": 2.0**19, "good": 0, "on": True}
    assert cases.last_digest(tmp_path / "parts") == cases.last_digest(tmp_path / "whole")


@pytest.mark.slow
def test_resuming_on_other_meshes_keeps_the_losses(pool, corpus_dir, tmp_path, capfd):
    """Ten steps are an epoch and a half here, so that a resume crosses the end of an epoch."""
    from data.prepare import main

    data = [f"data.tokenizer={corpus_dir}/tokenizer.model", "data.stories=150", "data.validation=0.05"]
    corpus = tmp_path / "corpus"
    assert main([*data, "data.shard_tokens=40000", f"data.dir={corpus}"]) == 0
    words = [*data, "data.seq_len=128", "train.global_batch_size=56", "train.micro_batch_size=7", "train.steps=10"]
    words += ["model.dropout=0.1"]
    assert cases.run(corpus, tmp_path, *words, "run.name=whole") == 0
    tokens = read_manifest(complete_checkpoints(tmp_path / "whole" / "checkpoints")[-1])["tokens"]
    assert 1.3 < tokens / Corpus.open(corpus).split("train").tokens < 1.7
    for world, expert, stop in ((4, 4, 3), (3, 3, 5), (3, 1, 7), (2, 2, 8), (1, 1, 10)):
        more = [*words, "run.name=chain", f"parallel.expert={expert}", f"train.stop_at={stop}"]
        if world > 1:
            pool.run(world, RUN, corpus=str(corpus), runs=str(tmp_path), more=more)
    capfd.readouterr()
    assert cases.run(corpus, tmp_path, *more) == 0
    np.testing.assert_allclose(cases.losses(tmp_path / "chain"), cases.losses(tmp_path / "whole"), rtol=1e-5)
    lines = [line for line in capfd.readouterr().out.splitlines() if "differ by rounding" in line]
    assert len(lines) == 1 and "world 2 -> 1, degrees {" in lines[0] and "torch" not in lines[0]


def test_a_resume_keeps_the_dtype_that_auto_chose(corpus_dir, tmp_path, monkeypatch):
    words = ["run.name=r", "train.steps=4"]
    assert cases.run(corpus_dir, tmp_path, *words, "train.stop_at=2", "train.dtype=float32") == 0
    monkeypatch.setattr("trainer.machine.bf16_pays", lambda dim: True)  # as another measurement might decide
    assert cases.run(corpus_dir, tmp_path, *words, "train.dtype=auto") == 0
    assert read_manifest(complete_checkpoints(tmp_path / "r" / "checkpoints")[-1])["dtype"] == "float32"


def test_a_resume_logs_what_changed_since_the_save(corpus_dir, tmp_path, capsys):
    words = ["run.name=r", "train.steps=4"]
    assert cases.run(corpus_dir, tmp_path, *words, "train.stop_at=2") == 0
    assert cases.run(corpus_dir, tmp_path, *words, "train.stop_at=3") == 0
    assert "differ by rounding" not in capsys.readouterr().out
    assert cases.run(corpus_dir, tmp_path, *words, "run.threads=2", "train.global_batch_size=8") == 0
    out = capsys.readouterr().out
    assert "because of threads 1 -> 2\n" in out
    assert "train.global_batch_size: 6 -> 8" in out and "rows of this epoch may be repeated" in out
