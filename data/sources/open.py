"""`data.source` -> the source that it selects. A new source is registered here."""

import re
from pathlib import Path

from data.config import DataConfig
from data.sources.base import Source
from data.sources.files import FileSource, is_story_file

HUB_NAME = re.compile(
    r"(?P<name>tinystories|[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?",
    re.ASCII,
)


def open_source(config: DataConfig) -> Source:
    """The source that `data.source` selects: the storybook, a data set of the hub, or files. Raises UserError.

    The modules of the storybook and of the hub are imported only if they are used, because that takes time.
    """
    if config.source == "storybook":
        from data.sources.storybook import StorybookSource

        return StorybookSource(config)
    path = Path(config.source)
    hub_name = HUB_NAME.fullmatch(config.source)
    if hub_name and not path.exists() and not is_story_file(path):
        from data.sources.hub import HubSource

        return HubSource(config, hub_name["name"], hub_name["config"], hub_name["revision"])
    return FileSource(config)
