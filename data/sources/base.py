"""What a source of stories provides, and what it yields.

`data.prepare` reads a source twice, once for the tokenizer and once for the tokens, and needs nothing else from it.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from data.sources.clean import Cleaner

TRAIN, VALIDATION = "train", "validation"


class Document(NamedTuple):
    """One story."""

    split: str  # TRAIN or VALIDATION
    text: str  # never empty, and not whitespace alone
    log_prob: float | None  # nats, where the source knows it


class Source(Protocol):
    """Where stories come from.

    Iterating yields each story once, in constant memory, and in the same order every time; a source can be iterated
    any number of times. Every text belongs to the same split on every machine: a source that has no validation split
    of its own decides by `side`, so that equal texts never end up in both splits.

    To add a source, implement this class in `data/sources/`, and return it from `open_source` in open.py.
    """

    unit: str  # what `total` and `position` count, for the progress bar: " stories", or "B" for bytes
    empty: int  # empty stories that the last iteration skipped
    cleaner: Cleaner  # what the last iteration repaired, with data.clean

    @property
    def total(self) -> int:
        """How far `position` counts in one iteration."""

    @property
    def position(self) -> int:
        """How far the current iteration has come."""

    def fingerprint(self) -> dict[str, str]:
        """What identifies the content, by name: a corpus is reused only for a source with the same fingerprint."""

    def training_texts(self) -> Iterator[str]:
        """The texts to train a tokenizer on."""

    def __iter__(self) -> Iterator[Document]:
        """All stories. Raises UserError, with file and line where there is one, for what cannot be read."""


def side(text: str, held_out: float) -> str:
    """The split of a text by its hash: VALIDATION with the probability `held_out`."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return VALIDATION if number < held_out * 2**64 else TRAIN
