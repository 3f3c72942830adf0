"""Fixtures that all tests share: a prepared corpus, and a pool of processes for distributed tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.configs import CORPUS
from tests.support.pool import Pool


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small storybook corpus, prepared by `python -m data.prepare`."""
    from data.prepare import main

    folder = tmp_path_factory.mktemp("corpus") / "storybook"
    assert main([*CORPUS, f"data.dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Processes that stay alive between tests, and form process groups of any size."""
    processes = Pool()
    yield processes
    processes.close()
