"""`data.source` -> the source that it names."""

import re
from pathlib import Path

from data.config import DataConfig
from data.sources.base import Source
from data.sources.files import Files, readable

HUB_NAME = re.compile(
    r"(?P<name>tinystories|[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?",
    re.ASCII,
)


def open_source(config: DataConfig) -> Source:
    """The source that `data.source` names: the storybook, a data set of the hub, or files. Raises UserError.

    A source is imported only if it is used, since reading the grammar and the client of the hub take time.
    """
    if config.source == "storybook":
        from data.sources.storybook import Storybook

        return Storybook(config)
    path = Path(config.source)
    if (named := HUB_NAME.fullmatch(config.source)) and not path.exists() and not readable(path):
        from data.sources.hub import Hub

        return Hub(config, named["name"], named["config"], named["revision"])
    return Files(config)
