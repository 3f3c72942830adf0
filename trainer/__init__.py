"""Runs: training, evaluation and generation with the packages `data`, `model` and `parallel`.

These names are so generic that other packages may have them, too; the check below refuses to run if another package
has one of these names.
"""

from pathlib import Path

import data
import model
import parallel

for _package in (data, model, parallel):
    if Path(str(_package.__file__)).parent.parent != Path(__file__).parent.parent:
        raise SystemExit(
            f"the package `{_package.__name__}` was imported from {_package.__file__}, which is not this project's; "
            "start in the project's folder, with its own environment"
        )
