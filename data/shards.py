"""Tokens on disk: the shard files of a corpus and its manifest.

`data.prepare` writes a corpus through `Writer`; the loader and the evaluation read it through `Corpus`.

A shard is a little-endian file: a header of 128 bytes, followed by these arrays, each at a multiple of 8 bytes:

    tokens      uint16 or uint32, depending on the vocabulary: bos, story, eos, bos, story, eos, ...
    starts      int64, documents + 1: where each story starts, and where the last one ends
    text_bytes  uint32, documents: UTF-8 bytes of each story
    log_probs   float64, documents: log-probability of each story with its end, in nats; only if the source knows it

A corpus is a folder of shards, `tokenizer.model` and `manifest.json`, which is written last: a folder without a
manifest is not a corpus. Until then `progress.json` lists the finished shards. Shards are mapped into memory, and only
a few of them at a time, because each map keeps a file handle open and the pages that were read in memory.
"""

import functools
import hashlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from data.config import DataConfig
from data.settings import UserError
from data.tokenizer import Tokenizer

MAGIC, VERSION = b"STORIES\n", 1
HEADER = struct.Struct("<8sIIIIQQQ32s48x")
BLOCK_BYTES = 1 << 20  # that are written, or read for a checksum, at a time
MAX_OPEN_SHARDS = 16
MANIFEST, PROGRESS, MODEL = "manifest.json", "progress.json", "tokenizer.model"
PREPARE_COMMAND = "python -m data.prepare with the same settings"


class StrictModel(BaseModel):
    """An object in a JSON file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class ShardInfo(StrictModel):
    path: str  # relative to the corpus
    documents: int
    tokens: int
    crc: int


class SplitInfo(StrictModel):
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0  # UTF-8, of all stories
    misses: int = 0  # stories whose tokens do not decode to the story
    shards: list[ShardInfo] = []


class Manifest(StrictModel):
    """The content of a finished corpus, and the settings and source that it was made from."""

    version: int = VERSION
    settings: dict[str, str | int | bool]  # see DataConfig.corpus_settings
    source: dict[str, str]  # fingerprint
    empty: int  # stories skipped because they are empty or only whitespace
    tokenizer_hash: str
    vocab_size: int
    splits: dict[str, SplitInfo]

    @property
    def hash(self) -> str:
        """sha256 of everything except the settings, in hex.

        The settings contain paths, which differ between machines; their effect on the corpus is in the other fields.
        """
        content = self.model_dump(exclude={"settings"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Progress(StrictModel):
    """The finished shards of an unfinished corpus, and the settings and source that they are made from."""

    version: int = VERSION
    settings: dict[str, str | int | bool]
    source: dict[str, str]
    tokenizer_hash: str
    splits: dict[str, SplitInfo] = {}


class Header(NamedTuple):
    """The first 128 bytes of a shard. `crc` covers all other bytes of the file: the arrays, then the header."""

    token_bytes: int  # 2 or 4
    has_log_probs: int
    crc: int
    vocab_size: int
    tokens: int
    documents: int
    tokenizer_hash: str

    def pack(self) -> bytes:
        return HEADER.pack(MAGIC, VERSION, *self[:-1], bytes.fromhex(self.tokenizer_hash))

    def layout(self) -> dict[str, tuple[np.dtype, int, int]]:
        """Array -> (dtype, count, offset in bytes); the offset of `end` is the size of the file."""
        arrays = [
            ("tokens", np.dtype(f"<u{self.token_bytes}"), self.tokens),
            ("starts", np.dtype("<i8"), self.documents + 1),
            ("text_bytes", np.dtype("<u4"), self.documents),
            ("log_probs", np.dtype("<f8"), self.documents * self.has_log_probs),
        ]
        layout = {}
        offset = HEADER.size
        for name, dtype, count in arrays:
            layout[name] = dtype, count, offset
            offset += dtype.itemsize * count
            offset += -offset % 8  # up to a multiple of 8
        layout["end"] = np.dtype("u1"), 0, offset
        return layout


def token_bytes(vocab_size: int) -> int:
    """Bytes per token that can store every id below `vocab_size`: 2 up to 65536, else 4."""
    return 2 if vocab_size <= 1 << 16 else 4


def damage_error(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: {problem}; delete {path.parent} and prepare the corpus again: run {PREPARE_COMMAND}")


def read_header(path: Path) -> Header:
    """Raises UserError if the file is missing, not a shard, of another version, or not as long as it declares."""
    try:
        with path.open("rb") as file:
            raw, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise damage_error(path, f"cannot be read ({error.strerror})") from None
    if len(raw) < HEADER.size:
        raise damage_error(path, f"truncated: {size} bytes, shorter than the header")
    magic, version, size_of_token, has_log_probs, crc, vocab_size, tokens, documents, digest = HEADER.unpack(raw)
    if magic != MAGIC:
        raise damage_error(path, "not a shard file")
    if version != VERSION:
        raise damage_error(path, f"has shard format {version}, but this program reads format {VERSION}")
    header = Header(size_of_token, has_log_probs, crc, vocab_size, tokens, documents, digest.hex())
    if header.pack() != raw or header.token_bytes != token_bytes(header.vocab_size) or header.has_log_probs > 1:
        raise damage_error(path, "its header is damaged")
    _, _, expected_size = header.layout()["end"]
    if size != expected_size:
        problem = "truncated" if size < expected_size else "too long"
        raise damage_error(path, f"{problem}: {size} bytes instead of {expected_size}")
    return header


class Shard:
    """A shard mapped into memory: read-only arrays `tokens`, `starts`, `text_bytes` and `log_probs` (or None)."""

    def __init__(self, path: Path) -> None:
        """Raises UserError as `read_header` does."""
        self.path, self.header = path, read_header(path)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.tokens = self._array("tokens")
        self.starts = self._array("starts")
        self.text_bytes = self._array("text_bytes")
        self.log_probs = self._array("log_probs") if self.header.has_log_probs else None

    def _array(self, name: str) -> np.ndarray:
        dtype, count, offset = self.header.layout()[name]
        return np.frombuffer(self._map, dtype, count, offset)

    def verify(self) -> None:
        """Raises UserError if any byte of the file has changed since it was written."""
        crc = 0
        with self.path.open("rb") as file:
            file.seek(HEADER.size)
            while block := file.read(BLOCK_BYTES):
                crc = zlib.crc32(block, crc)
        if zlib.crc32(self.header._replace(crc=0).pack(), crc) != self.header.crc:
            raise damage_error(self.path, "the checksum does not match, so the file has changed since it was written")


class Writer:
    """Writes the stories of a split to shards, each ended before the story that would exceed `shard_tokens`.

    `add` writes each story to disk. If the `with` block ends without an error, the last shard is completed, and `info`
    describes the split for the manifest. `on_shard_finished` is called when a shard is complete on disk, before it is
    renamed to its final name: then `finished` describes the finished shards. A writer that receives it as `finished`
    continues after them.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        tokenizer: Tokenizer,
        shard_tokens: int,
        finished: SplitInfo | None = None,
        on_shard_finished: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.split, self.tokenizer, self.shard_tokens = folder, split, tokenizer, shard_tokens
        self.dtype = np.dtype(f"<u{token_bytes(tokenizer.vocab_size)}")
        self.finished = finished or SplitInfo()
        self._on_shard_finished = on_shard_finished
        self.info = self.finished.model_copy(deep=True)
        for shard in self.info.shards[-1:]:  # the previous run may have ended before it renamed this shard
            partial = folder / f"{shard.path}.partial"
            if partial.exists():
                partial.replace(folder / shard.path)
        self._start_shard()

    def _start_shard(self) -> None:
        self._path = self.folder / f"{self.split}-{len(self.info.shards):05}.shard"
        self._file = Path(f"{self._path}.partial").open("wb", BLOCK_BYTES)
        self._file.write(bytes(HEADER.size))
        self._crc, self._starts = 0, [0]
        self._text_bytes: list[int] = []
        self._log_probs: list[float] = []

    def add(
        self,
        ids: Sequence[int] | np.ndarray,
        text_bytes: int,
        log_prob: float | None = None,
        roundtrip_failed: bool = False,
    ) -> None:
        """Adds a story, without bos and eos, of `text_bytes` UTF-8 bytes.

        Raises ValueError if an id is outside the vocabulary, and UserError if the story has 4 GiB or more.
        """
        story = np.empty(len(ids) + 2, np.int64)
        story[0], story[1:-1], story[-1] = self.tokenizer.bos, ids, self.tokenizer.eos
        if story.min() < 0 or story.max() >= self.tokenizer.vocab_size:
            raise ValueError(f"ids from {story.min()} to {story.max()}, vocabulary {self.tokenizer.vocab_size}")
        if text_bytes >= 1 << 32:
            raise UserError(f"data.source: a story has {text_bytes} bytes; split it into stories of less than 4 GiB")
        if self._text_bytes and self._starts[-1] + len(story) > self.shard_tokens:
            self._finish_shard()
            self._start_shard()
        self._write(story.astype(self.dtype))
        self._starts.append(self._starts[-1] + len(story))
        self._text_bytes.append(text_bytes)
        if log_prob is not None:
            self._log_probs.append(log_prob)
        self.info.documents += 1
        self.info.tokens += len(story)
        self.info.text_bytes += text_bytes
        self.info.misses += roundtrip_failed

    def _write(self, array: np.ndarray) -> None:
        self._crc = zlib.crc32(array.data, self._crc)
        self._file.write(array.data)

    def _finish_shard(self) -> None:
        documents, tokens = len(self._text_bytes), self._starts[-1]
        has_log_probs = len(self._log_probs) == documents
        header = Header(
            token_bytes=self.dtype.itemsize,
            has_log_probs=has_log_probs,
            crc=0,
            vocab_size=self.tokenizer.vocab_size,
            tokens=tokens,
            documents=documents,
            tokenizer_hash=self.tokenizer.hash,
        )
        log_probs = self._log_probs if has_log_probs else []
        for name, values in (("starts", self._starts), ("text_bytes", self._text_bytes), ("log_probs", log_probs)):
            dtype, _, offset = header.layout()[name]
            self._pad_to(offset)
            self._write(np.array(values, dtype))
        self._pad_to(header.layout()["end"][2])
        header = header._replace(crc=zlib.crc32(header.pack(), self._crc))
        self._file.seek(0)
        self._file.write(header.pack())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.info.shards.append(ShardInfo(path=self._path.name, documents=documents, tokens=tokens, crc=header.crc))
        self.finished = self.info.model_copy(deep=True)
        self._on_shard_finished()
        Path(f"{self._path}.partial").replace(self._path)

    def _pad_to(self, offset: int) -> None:
        self._write(np.zeros(offset - self._file.tell(), np.uint8))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None and self._text_bytes:
            self._finish_shard()
        self._file.close()
        if not self._text_bytes:
            Path(self._file.name).unlink(missing_ok=True)


class Split:
    """The training or the validation stories of a corpus: `shards`, `documents`, `tokens` and `text_bytes`."""

    def __init__(self, folder: Path, info: SplitInfo) -> None:
        self.shards, self.documents, self.tokens = info.shards, info.documents, info.tokens
        self.text_bytes = info.text_bytes
        paths = [folder / shard.path for shard in info.shards]
        self._open = functools.lru_cache(MAX_OPEN_SHARDS)(lambda number: Shard(paths[number]))

    def shard(self, number: int) -> Shard:
        """A shard, mapped again unless it is one of the last few used. Raises UserError if it is damaged."""
        return self._open(number)

    def close(self) -> None:
        """Closes the maps of all shards that are not in use elsewhere."""
        self._open.cache_clear()


class Corpus:
    """A finished corpus: `folder`, `manifest`, and `hash`, which identifies its content."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest, self.hash = folder, manifest, manifest.hash

    @classmethod
    def open(cls, folder: str | Path) -> "Corpus":
        """Raises UserError if it is missing, unfinished or of another version, or a file differs from the manifest."""
        folder = Path(folder)
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
            version = content["version"]
            if version != VERSION:
                raise damage_error(path, f"has corpus format {version}, but this program reads format {VERSION}")
            manifest = Manifest.model_validate(content)
        except (FileNotFoundError, NotADirectoryError):
            is_started = any(folder.glob("*.shard*")) or (folder / MODEL).exists()
            problem = "the corpus here is unfinished" if is_started else "no corpus here"
            raise UserError(f"data.dir={folder}: {problem}; run {PREPARE_COMMAND}") from None
        except (ValueError, KeyError, TypeError):
            raise damage_error(path, "not a manifest") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        model = folder / MODEL
        if not model.exists() or hashlib.sha256(model.read_bytes()).hexdigest() != manifest.tokenizer_hash:
            raise damage_error(model, "not the tokenizer that the corpus was made with")
        for split in manifest.splits.values():
            for info in split.shards:
                header = read_header(folder / info.path)
                expected = (info.tokens, info.documents, info.crc, manifest.vocab_size, manifest.tokenizer_hash)
                found = (header.tokens, header.documents, header.crc, header.vocab_size, header.tokenizer_hash)
                if found != expected:
                    raise damage_error(folder / info.path, "not the shard that the manifest lists")
        return cls(folder, manifest)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.folder / MODEL)

    def split(self, name: str) -> Split:
        """The split `name`, which is `train` or `validation`."""
        return Split(self.folder, self.manifest.splits[name])

    def check(self, config: DataConfig) -> None:
        """Raises UserError about the first setting that differs from those of the corpus."""
        for key, made_with, requested in differences(self.manifest.settings, config.corpus_settings()):
            raise UserError(
                f"data.{key}={requested}: the corpus in {self.folder} was made with {made_with}; "
                f"set data.{key}={made_with}, or give another data.dir and run {PREPARE_COMMAND}"
            )
        given = Path(config.tokenizer).expanduser()
        if config.tokenizer != "train" and given.exists() and Tokenizer(given).hash != self.manifest.tokenizer_hash:
            raise UserError(
                f"data.tokenizer={config.tokenizer}: the file changed after the corpus in {self.folder} was made; "
                f"restore the old file, or give another data.dir and run {PREPARE_COMMAND}"
            )

    def verify(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Reads every byte of every shard. Calls `on_progress(shards done, shards)`. Raises UserError on damage."""
        shards = [shard for split in self.manifest.splits.values() for shard in split.shards]
        for done, info in enumerate(shards, 1):
            Shard(self.folder / info.path).verify()
            on_progress(done, len(shards))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) of each key with different values; a missing value is None."""
    for key in dict.fromkeys([*new, *old]):
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)
