"""The `Source` protocol: what a source of stories must provide, and the documents that it yields.

A source is where stories come from. `data.prepare` reads it twice, once for the tokenizer and once for the tokens, and
uses nothing but this protocol.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from data.sources.clean import Cleaner

TRAIN, VALIDATION = "train", "validation"  # the names of the splits


class Document(NamedTuple):
    """One story."""

    split: str  # TRAIN or VALIDATION
    text: str  # not empty, and not only whitespace
    log_prob: float | None = None  # natural logarithm of the text's probability; None if the source does not know it


class Source(Protocol):
    """A source of stories.

    To add a source:

    1. Write a class with these members in a new file of `data/sources/`. Its constructor receives the `DataConfig`, and
       raises UserError if the source does not exist.
    2. In `open_source` (open.py), return it for the value of `data.source` that selects it; import its module there.
    3. Add it to the description of `data.source` in `DataConfig` (data/config.py). If it has settings of its own, add
       them there, and to `corpus_settings` if they change the stories.

    What a source must guarantee:

    - It can be iterated any number of times, with the same documents in the same order every time: an interrupted run
      resumes by skipping as many documents as it has written.
    - It uses constant memory, however many stories there are.
    - Each text belongs to the same split on every machine. A source without a validation split of its own uses
      `split_of`, so that equal texts are never in both splits.
    """

    unit: str  # of `total` and `position`, for the progress bar: " stories", or "B" for bytes
    empty: int  # number of texts that the last iteration skipped because they were empty or only whitespace
    cleaner: Cleaner  # counts the repairs of the last iteration if `data.clean` is set; else an unused Cleaner()

    @property
    def total(self) -> int:
        """The value of `position` at the end of an iteration; an estimate is enough."""

    @property
    def position(self) -> int:
        """How much of the source the current iteration has read."""

    def fingerprint(self) -> dict[str, str]:
        """Identifies the content, such as {file name: hash}.

        A corpus is reused, and an interrupted run resumed, only if the fingerprint is still the same.
        """

    def training_texts(self) -> Iterator[str]:
        """The texts to train a tokenizer on: those of the training split, or a representative part of them."""

    def __iter__(self) -> Iterator[Document]:
        """All documents. Raises UserError, with file and line if there are any, about a text that cannot be read."""


def split_of(text: str, held_out: float) -> str:
    """The split of a text by its hash: VALIDATION with the probability `held_out`, else TRAIN."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return VALIDATION if number < held_out * 2**64 else TRAIN
