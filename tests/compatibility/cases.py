"""The recorded run, resumed by the processes of the pool."""

from pathlib import Path

from trainer.config import read_config
from trainer.loop import train

RECORDED = Path(__file__).parent


def resume(runs: str) -> int:
    """Resume a copy of the recorded run, which lies in the folder `run` of `runs`, and train to its last step."""
    words = [f"data.dir={RECORDED / 'corpus'}", f"run.dir={runs}", "run.name=run"]
    return train(read_config(RECORDED / "config.yaml", words))
