"""Shared by all tests: a prepared corpus, a config for seconds, and processes for distributed cases."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pool import Pool


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small storybook corpus, prepared by the real command."""
    from data.prepare import main

    folder = tmp_path_factory.mktemp("corpus") / "storybook"
    words = ["data.stories=1200", "data.vocab_size=320", "data.validation=0.05", "data.shard_tokens=40000"]
    assert main([*words, f"data.dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    processes = Pool()
    yield processes
    processes.close()
