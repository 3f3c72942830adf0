"""The first step of the journey: wherever stories lie -> one stream of (split, text, log-probability).

1. `open_source` reads `data.source` and `data.validation`: the built-in storybook, or files (.jsonl, .txt, also .gz).
2. A source has a `fingerprint`, which tells whether it is still what a corpus was made of.
3. Iterating reads story by story in constant memory, any number of times, always in the same order. Without a
   validation path the hash of a text decides its side, so equal texts never part, on any machine.
"""

import contextlib
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

from data.config import DataConfig, UserError

TRAIN, VALIDATION = "train", "validation"
STORYBOOK_SEED = 0
SEPARATOR = "<|endoftext|>"  # a line of its own in a .txt file, between two stories
READABLE = ".jsonl or .txt, also .gz"


class Document(NamedTuple):
    """One story."""

    split: str  # TRAIN or VALIDATION
    text: str  # never blank
    log_prob: float | None  # nats, where the source knows it


def side(text: str, held_out: float) -> str:
    """The split of a text by its hash: VALIDATION with the chance `held_out`."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return VALIDATION if number < held_out * 2**64 else TRAIN


class Storybook:
    """Stories 0 to data.stories - 1 of the built-in grammar, with their log-probability in the validation split.

    `total` and `position` count stories, `empty` is 0.
    """

    unit = " stories"

    def __init__(self, config: DataConfig) -> None:
        assert config.held_out is not None  # the config sees to it
        self.total, self.held_out = config.stories, config.held_out
        self.position = self.empty = 0

    def fingerprint(self) -> dict[str, str]:
        """Its hash changes with the grammar: it is taken over a hundred stories."""
        from data.storybook import story

        some = "\0".join(story(STORYBOOK_SEED, index) for index in range(100))
        return {"storybook": f"{self.total} stories, seed {STORYBOOK_SEED}, sha256 {_sha256(some.encode())}"}

    def training_texts(self) -> Iterator[str]:
        """What to train a tokenizer on: a part is as good as all, since stories are drawn alike."""
        from data.storybook import story

        texts = (story(STORYBOOK_SEED, index) for index in range(min(self.total, 10_000)))
        return (text for text in texts if side(text, self.held_out) == TRAIN)

    def __iter__(self) -> Iterator[Document]:
        from data.storybook import log_prob, story

        for index in range(self.total):
            text = story(STORYBOOK_SEED, index)
            split = side(text, self.held_out)
            self.position = index + 1
            yield Document(split, text, log_prob(text) if split == VALIDATION else None)


class Files:
    """The stories of local files. `total` and `position` count bytes on disk, `empty` the blank stories passed over."""

    unit = "B"

    def __init__(self, config: DataConfig) -> None:
        """Raises UserError when there are no files to read."""
        self.held_out, self.text_field = config.held_out, config.text_field
        self.validation = [] if self.held_out is not None else find("data.validation", config.validation)
        aside = {path.resolve() for path in self.validation}
        self.train = [path for path in find("data.source", config.source) if path.resolve() not in aside]
        if not self.train:
            raise UserError(
                f"data.validation={config.validation}: takes every file of data.source={config.source}; "
                "give other files, or a fraction such as 0.02"
            )
        self.total = sum(path.stat().st_size for path in self.train + self.validation)
        self.empty = self._before = 0
        self._file: io.BufferedReader | None = None

    @property
    def position(self) -> int:
        return self._before + (self._file.tell() if self._file and not self._file.closed else 0)

    def fingerprint(self) -> dict[str, str]:
        """Size and sha256 of each file, by its name below the folder that holds them all."""
        prints = {}
        for files, label in ((self.train, ""), (self.validation, "validation ")):
            root = os.path.commonpath([path.parent for path in files]) if files else ""
            for path in files:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                name = label + path.relative_to(root).as_posix()
                prints[name] = f"{path.stat().st_size} bytes, sha256 {digest}"
        return prints

    def training_texts(self) -> Iterator[str]:
        """What to train a tokenizer on."""
        return (document.text for document in self if document.split == TRAIN)

    def __iter__(self) -> Iterator[Document]:
        """Raises UserError, with file and line, on what cannot be read."""
        self.empty = self._before = 0
        for files, split in ((self.train, TRAIN), (self.validation, VALIDATION)):
            for path in files:
                with contextlib.closing(self._lines(path)) as lines:
                    for text in self._stories(path, lines):
                        if not text.strip():
                            self.empty += 1
                        elif self.held_out is None:
                            yield Document(split, text, None)
                        else:
                            yield Document(side(text, self.held_out), text, None)
                self._before += path.stat().st_size

    def _stories(self, path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[str]:
        kind = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
        if not kind:  # a bare .gz tells by its first line
            first = next(lines, (1, ""))
            lines = itertools.chain([first], lines)
            kind = ".jsonl" if first[1].lstrip()[:1] == "{" else ".txt"
        return self._jsonl(path, lines) if kind.lower() == ".jsonl" else _txt(lines)

    def _lines(self, path: Path) -> Generator[tuple[int, str], None, None]:
        """(number from 1, line with its end); gzip is known by its first bytes."""
        number = 0
        with path.open("rb") as file:
            self._file = file
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            unpacked = io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 18) if packed else file
            try:
                for number, line in enumerate(unpacked, 1):
                    yield number, line.decode("utf-8" if number > 1 else "utf-8-sig")
            except UnicodeDecodeError:
                raise UserError(f"{path}, line {number}: not UTF-8; convert the file to UTF-8") from None
            except (EOFError, zlib.error, gzip.BadGzipFile):
                raise UserError(f"{path}: the gzip is cut or damaged after line {number}; fetch it anew") from None

    def _jsonl(self, path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[str]:
        for number, line in lines:
            if line.isspace():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f'{where}: not JSON; each line is one object, such as {{"text": "..."}}') from None
            if not isinstance(record, dict):
                raise UserError(f'{where}: not a JSON object; each line is one, such as {{"text": "..."}}')
            text = record.get(self.text_field)
            if not isinstance(text, str):
                fields = [name for name, value in record.items() if isinstance(value, str)]
                mend = f"text stands in: {', '.join(fields)} (data.text_field=...)" if fields else "no field holds text"
                raise UserError(f"{where}: data.text_field={self.text_field} is no text there; {mend}")
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(f"{where}: half a surrogate pair in the text, which no UTF-8 can hold") from None
            yield text


def _txt(lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    """Stories between separators; the newlines next to a separator belong to it, all others to the story."""
    story: list[str] = []
    for _, line in lines:
        if line.rstrip("\r\n") == SEPARATOR:
            yield "".join(story).strip("\r\n")
            story = []
        else:
            story.append(line)
    if story:
        yield "".join(story).strip("\r\n")


def find(key: str, given: str) -> list[Path]:
    """Files that a path, folder (with all below it) or glob means, in sorted order. UserError when there are none."""
    path = Path(given).expanduser()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
    else:
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    files = [p for p in found if _readable(p)]
    if not files:
        exists = "not a file of stories" if path.is_file() else "no file of stories there"
        why = exists if found or path.is_dir() else "no such file or folder"
        raise UserError(f"{key}={given}: {why}; give a file, folder or glob ({READABLE})")
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _readable(path: Path) -> bool:
    *inner, last = [suffix.lower() for suffix in path.suffixes] or [""]
    return last in (".jsonl", ".txt") or (last == ".gz" and (not inner or inner[-1] in (".jsonl", ".txt")))


def open_source(config: DataConfig) -> Storybook | Files:
    """What `data.source` means. Raises UserError when it means nothing."""
    if config.source == "storybook":
        return Storybook(config)
    if config.source == "tinystories" and not Path(config.source).exists():
        raise UserError(
            "data.source=tinystories: the hub is not read yet; "
            f"give `storybook`, or a file, folder or glob ({READABLE}) of the stories"
        )
    return Files(config)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
