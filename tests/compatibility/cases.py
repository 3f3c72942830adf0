"""Resumes the recorded run, in processes of the pool."""

from pathlib import Path

from trainer.config import read_config
from trainer.loop import train

RECORDED = Path(__file__).parent


def resume(runs: str) -> int:
    """Resume a copy of the recorded run, the folder `run` in `runs`, and train to its last step."""
    words = [f"data.dir={RECORDED / 'corpus'}", f"run.dir={runs}", "run.name=run"]
    return train(read_config(RECORDED / "config.yaml", words))
