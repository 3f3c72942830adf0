"""tests/learn.py (`make learn`) on models of a few thousand parameters."""

import pytest

from data.settings import read
from model.config import ModelConfig
from tests.learn import CONFIG, main, variants
from trainer.config import SECTION_TYPES


def test_all_three_models_use_as_many_parameters_per_token():
    """Not counting the routers, which the dense model does not have."""
    active: dict[str, int] = {}
    for name, settings in variants([]).items():
        model = read(SECTION_TYPES, CONFIG, settings)["model"]
        assert isinstance(model, ModelConfig)
        routers = model.n_experts * model.dim * len(model.moe_layers)
        active[name] = model.parameter_counts(1024)[1] - routers
    assert active["bias"] == active["no bias"] == active["dense"]


@pytest.mark.slow
def test_three_runs_are_compared_in_a_table_and_a_plot(tmp_path, capsys):
    small = ["data.stories=300", "data.vocab_size=512", "data.validation=0.1", "data.seq_len=256", "model.dim=16"]
    small += ["model.n_layers=1", "train.global_batch_size=4", "train.micro_batch_size=2", "sample.max_new_tokens=4"]
    small += ["train.warmup_steps=1", "model.expert_dim=16"]
    assert main(["--steps", "4", "--out", str(tmp_path), *small]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| bias", "| no bias", "| dense"]
    assert all(0.5 < float(row[1]) < 10 and float(row[3]) > 0 for row in rows), rows
    assert [row[5] == "-" for row in rows] == [False, False, True]
    assert (tmp_path / "learn.png").stat().st_size > 10_000
