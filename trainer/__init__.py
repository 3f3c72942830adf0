"""The run: composes data, model and parallel. The guard below is for their plain names, which others may use too."""

from pathlib import Path

import data
import model
import parallel

for _package in (data, model, parallel):
    if Path(str(_package.__file__)).parent.parent != Path(__file__).parent.parent:
        raise SystemExit(
            f"the package `{_package.__name__}` was imported from {_package.__file__}, which is not this project's; "
            "start from the project's folder with its own environment"
        )
