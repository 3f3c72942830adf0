"""A source of stories in local files: .jsonl, .parquet and .txt; .jsonl and .txt also compressed as .gz.

Files are read story by story, in constant memory, and always in the same order. With `data.clean` the texts are
repaired while they are read (clean.py).
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
from data.sources.base import TRAIN, VALIDATION, Document, split_of
from data.sources.clean import SEPARATOR, Cleaner

SUPPORTED_FILES = ".jsonl, .parquet or .txt, also .gz"
DOWNLOAD_AGAIN = "download it again"
GZIP_BUFFER_BYTES = 1 << 18
PARQUET_BUFFER_BYTES = 1 << 20
BATCH_ROWS = 256  # of a columnar file, which are decoded at a time


class FileSource:
    """The stories of local files. `total` and `position` count bytes on disk."""

    unit = "B"

    def __init__(self, config: DataConfig) -> None:
        """Raises UserError if there is no file to read."""
        self.held_out, self.text_field, self.clean = config.held_out, config.text_field, config.clean
        self.validation = [] if self.held_out is not None else find_files("data.validation", config.validation)
        validation_paths = {path.resolve() for path in self.validation}
        files = find_files("data.source", config.source)
        self.train = [path for path in files if path.resolve() not in validation_paths]
        if not self.train:
            raise UserError(
                f"data.validation={config.validation}: includes every file of data.source={config.source}, so none is "
                "left for training; give other files, or a fraction such as 0.02"
            )
        self.total = sum(path.stat().st_size for path in self.train + self.validation)
        self.empty = 0
        self.cleaner = Cleaner()
        self._finished_bytes = 0  # size of the files that have been read
        self._position_in_file: Callable[[], int] = lambda: 0  # bytes of the current file that have been read

    @property
    def position(self) -> int:
        return self._finished_bytes + self._position_in_file()

    def fingerprint(self) -> dict[str, str]:
        """Size and sha256 of each file, by its path relative to the folder that contains all of them."""
        fingerprint = {}
        for files, label in ((self.train, ""), (self.validation, "validation ")):
            root = os.path.commonpath([path.parent for path in files]) if files else ""
            for path in files:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                name = label + path.relative_to(root).as_posix()
                fingerprint[name] = f"{path.stat().st_size} bytes, sha256 {digest}"
        return fingerprint

    def training_texts(self) -> Iterator[str]:
        """The texts of the training split."""
        return (document.text for document in self if document.split == TRAIN)

    def __iter__(self) -> Iterator[Document]:
        """All documents. Raises UserError, with file and line, about a text that cannot be read."""
        self.empty = self._finished_bytes = 0
        self.cleaner = Cleaner()
        for files, split in ((self.train, TRAIN), (self.validation, VALIDATION)):
            for path in files:
                with contextlib.closing(self._stories(path)) as stories:
                    for text in self.cleaner(stories) if self.clean else stories:
                        if not text.strip():
                            self.empty += 1
                        elif self.held_out is None:
                            yield Document(split, text)
                        else:
                            yield Document(split_of(text, self.held_out), text)
                self._position_in_file = lambda: 0
                self._finished_bytes += path.stat().st_size

    def _stories(self, path: Path) -> Generator[str, None, None]:
        """The texts of a file, including empty ones."""
        kind = (path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix).lower()
        if kind == ".parquet":
            yield from self._parquet(path)
            return
        with contextlib.closing(self._lines(path)) as lines:
            numbered: Iterator[tuple[int, str]] = lines
            if not kind:  # the name is only .gz: the first line shows the format
                first = next(lines, (1, ""))
                numbered = itertools.chain([first], lines)
                kind = ".jsonl" if first[1].lstrip()[:1] == "{" else ".txt"
            if kind == ".jsonl":
                yield from self._jsonl(path, numbered)
            else:
                yield from _txt(numbered)

    def _lines(self, path: Path) -> Generator[tuple[int, str], None, None]:
        """(number from 1, line with its line end). A gzip file is recognized by its first bytes."""
        number = 0
        with path.open("rb") as file:
            self._position_in_file = lambda: 0 if file.closed else file.tell()
            is_gzip = file.peek(2)[:2] == b"\x1f\x8b"
            lines = io.BufferedReader(gzip.GzipFile(fileobj=file), GZIP_BUFFER_BYTES) if is_gzip else file
            try:
                for number, line in enumerate(lines, 1):
                    yield number, line.decode("utf-8" if number > 1 else "utf-8-sig")
            except UnicodeDecodeError:
                raise UserError(f"{path}, line {number}: not UTF-8; convert the file to UTF-8") from None
            except (EOFError, zlib.error, gzip.BadGzipFile):
                raise UserError(
                    f"{path}: the gzip file is truncated or damaged after line {number}; {DOWNLOAD_AGAIN}"
                ) from None

    def _jsonl(self, path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[str]:
        for number, line in lines:
            if line.isspace():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f'{where}: not JSON; each line must be one object, such as {{"text": "..."}}') from None
            if not isinstance(record, dict):
                raise UserError(f'{where}: not a JSON object; each line must be one, such as {{"text": "..."}}')
            text = record.get(self.text_field)
            if not isinstance(text, str):
                text_fields = [key for key, value in record.items() if isinstance(value, str)]
                raise no_text_error(where, self.text_field, text_fields)
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"{where}: the text contains half a surrogate pair, which cannot be encoded as UTF-8"
                ) from None
            yield text

    def _parquet(self, path: Path) -> Iterator[str]:
        """Reads batches of a fixed number of rows; the size of a whole row group has no limit."""
        import pyarrow
        from pyarrow.parquet import ParquetFile

        done, size = 0, path.stat().st_size
        with path.open("rb") as file:
            try:
                table = ParquetFile(file, buffer_size=PARQUET_BUFFER_BYTES)
                rows = table.metadata.num_rows
                check_field(str(path), self.text_field, table.schema_arrow)
                self._position_in_file = lambda: size * done // rows
                for batch in table.iter_batches(BATCH_ROWS, columns=[self.text_field]):
                    yield from texts_of(str(path), done + 1, batch, self.text_field)
                    done += batch.num_rows
            except (pyarrow.ArrowException, OSError) as error:
                reason = str(error).partition("\n")[0]
                raise UserError(
                    f"{path}: the parquet file is truncated or damaged after row {done} ({reason}); {DOWNLOAD_AGAIN}"
                ) from None


def check_field(where: str, field: str, schema: Any) -> None:
    """Raises UserError unless exactly one column of an Arrow schema has this name, and it contains text."""
    count = schema.names.count(field)
    if count > 1:
        raise UserError(f"{where}: data.text_field={field} is the name of {count} columns; rename all but one")
    text_fields = [column.name for column in schema if str(column.type) in ("string", "large_string", "string_view")]
    if field not in text_fields:
        raise no_text_error(where, field, text_fields)


def texts_of(where: str, first_row: int, batch: Any, field: str) -> Iterator[str]:
    """The texts of an Arrow batch that starts with row `first_row`. Raises UserError if a row has no text."""
    for row, cell in enumerate(batch.column(field), first_row):
        try:
            text = cell.as_py()
        except UnicodeDecodeError:
            raise UserError(f"{where}, row {row}: not UTF-8; convert the file to UTF-8") from None
        if text is None:
            raise UserError(f"{where}, row {row}: no text in data.text_field={field}; fill it in, or delete the row")
        yield text


def no_text_error(where: str, field: str, text_fields: Iterable[str]) -> UserError:
    """The error about a field without text; names the fields that contain text."""
    names = ", ".join(text_fields)
    fix = f"set data.text_field to a field with text: {names}" if names else "no field contains text"
    return UserError(f"{where}: data.text_field={field} is not a field with text; {fix}")


def _txt(lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    """Stories between separators. Newlines next to a separator are part of it; all others are part of the story."""
    story: list[str] = []
    for _, line in lines:
        if line.rstrip("\r\n") == SEPARATOR:
            yield "".join(story).strip("\r\n")
            story = []
        else:
            story.append(line)
    if story:
        yield "".join(story).strip("\r\n")


def find_files(key: str, given: str) -> list[Path]:
    """The story files of a path, a folder (with all folders in it) or a glob, sorted.

    Raises UserError about the setting `key` if there are none.
    """
    path = Path(given).expanduser()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path)))
    else:
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    files = [p for p in found if is_story_file(p)]
    if files:
        return files
    if path.is_file():
        problem = "not a story file"
    elif found or path.is_dir():
        problem = "no story files there"
    else:
        problem = "no such file or folder"
    raise UserError(f"{key}={given}: {problem}; give a file, folder or glob ({SUPPORTED_FILES})")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def is_story_file(path: Path) -> bool:
    """Whether the name of a file is that of a format that FileSource reads."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        return len(suffixes) == 1 or suffixes[-2] in (".jsonl", ".txt")
    return bool(suffixes) and suffixes[-1] in (".jsonl", ".parquet", ".txt")
