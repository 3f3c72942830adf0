"""Stories in local files: .jsonl, .parquet and .txt, the first and the last also compressed as .gz.

Files are read story by story in constant memory, always in the same order. With `data.clean` the texts are repaired as
they are read (clean.py).
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
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from data.config import DataConfig
from data.settings import UserError
from data.sources.base import TRAIN, VALIDATION, Document, side
from data.sources.clean import SEPARATOR, Cleaner

READABLE = ".jsonl, .parquet or .txt, also .gz"
BATCH_ROWS = 256  # of a columnar file, decoded at a time


class Files:
    """The stories of local files.

    `total` and `position` count bytes on disk, `empty` the blank stories passed over, `cleaner` what was repaired.
    """

    unit = "B"

    def __init__(self, config: DataConfig) -> None:
        """Raises UserError when there are no files to read."""
        self.held_out, self.text_field, self.clean = config.held_out, config.text_field, config.clean
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
        self.cleaner = Cleaner()
        self._within: Callable[[], int] = lambda: 0  # bytes of the file at hand

    @property
    def position(self) -> int:
        return self._before + self._within()

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
        self.cleaner = Cleaner()
        for files, split in ((self.train, TRAIN), (self.validation, VALIDATION)):
            for path in files:
                with contextlib.closing(self._stories(path)) as stories:
                    for text in self.cleaner(stories) if self.clean else stories:
                        if not text.strip():
                            self.empty += 1
                        elif self.held_out is None:
                            yield Document(split, text, None)
                        else:
                            yield Document(side(text, self.held_out), text, None)
                self._within = lambda: 0
                self._before += path.stat().st_size

    def _stories(self, path: Path) -> Generator[str, None, None]:
        kind = (path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix).lower()
        if kind == ".parquet":
            yield from self._parquet(path)
            return
        with contextlib.closing(self._lines(path)) as lines:
            numbered: Iterator[tuple[int, str]] = lines
            if not kind:  # a bare .gz tells by its first line
                first = next(lines, (1, ""))
                numbered = itertools.chain([first], lines)
                kind = ".jsonl" if first[1].lstrip()[:1] == "{" else ".txt"
            yield from self._jsonl(path, numbered) if kind == ".jsonl" else _txt(numbered)

    def _lines(self, path: Path) -> Generator[tuple[int, str], None, None]:
        """(number from 1, line with its end); gzip is known by its first bytes."""
        number = 0
        with path.open("rb") as file:
            self._within = lambda: 0 if file.closed else file.tell()
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
                raise no_text(where, self.text_field, [k for k, value in record.items() if isinstance(value, str)])
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(f"{where}: half a surrogate pair in the text, which no UTF-8 can hold") from None
            yield text

    def _parquet(self, path: Path) -> Iterator[str]:
        """Row by row, in batches of bounded size: a whole row group would not be."""
        import pyarrow
        from pyarrow.parquet import ParquetFile

        done, size = 0, path.stat().st_size
        with path.open("rb") as file:
            try:
                table = ParquetFile(file, buffer_size=1 << 20)
                rows = table.metadata.num_rows
                check_field(str(path), self.text_field, table.schema_arrow)
                self._within = lambda: size * done // rows
                for batch in table.iter_batches(BATCH_ROWS, columns=[self.text_field]):
                    yield from rows_of(str(path), done, batch, self.text_field)
                    done += batch.num_rows
            except (pyarrow.ArrowException, OSError) as error:
                why = str(error).partition("\n")[0]
                raise UserError(
                    f"{path}: the parquet is cut or damaged after row {done} ({why}); fetch it anew"
                ) from None


def check_field(where: str, field: str, schema: Any) -> None:
    """Raises UserError when the columns of an Arrow schema do not hold text under that name, in one column."""
    if (times := schema.names.count(field)) > 1:
        raise UserError(f"{where}: data.text_field={field} names {times} columns there; rename all but one")
    texts = [column.name for column in schema if str(column.type) in ("string", "large_string", "string_view")]
    if field not in texts:
        raise no_text(where, field, texts)


def rows_of(where: str, before: int, batch: Any, field: str) -> Iterator[str]:
    """The texts of an Arrow batch, whose first is row `before` + 1. Raises UserError where there is none."""
    for row, cell in enumerate(batch.column(field), before + 1):
        try:
            text = cell.as_py()
        except UnicodeDecodeError:
            raise UserError(f"{where}, row {row}: not UTF-8; convert the file to UTF-8") from None
        if text is None:
            raise UserError(f"{where}, row {row}: no text in data.text_field={field}; fill it, or leave the row out")
        yield text


def no_text(where: str, field: str, texts: Iterable[str]) -> UserError:
    """The error that names the fields which do hold text."""
    fix = f"text stands in: {', '.join(texts)} (data.text_field=...)" if texts else "no field holds text"
    return UserError(f"{where}: data.text_field={field} is no text there; {fix}")


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
    files = [p for p in found if readable(p)]
    if not files:
        exists = "not a file of stories" if path.is_file() else "no file of stories there"
        why = exists if found or path.is_dir() else "no such file or folder"
        raise UserError(f"{key}={given}: {why}; give a file, folder or glob ({READABLE})")
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def readable(path: Path) -> bool:
    *inner, last = [suffix.lower() for suffix in path.suffixes] or [""]
    return last in (".jsonl", ".parquet", ".txt") or (last == ".gz" and (not inner or inner[-1] in (".jsonl", ".txt")))
