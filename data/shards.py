"""Tokens on disk: the shard files of a corpus, its manifest, and reading both without ever holding much of them.

A shard, little endian: a header of 128 bytes, then, each at a multiple of 8,

    tokens      uint16 or uint32, by the vocabulary: bos, story, eos, and so on
    starts      int64, documents + 1: where each story begins, and the end of the last
    text_bytes  uint32, documents: UTF-8 bytes of each story
    log_probs   float64, documents: nats, end included; only where the source knows them

A corpus is a folder of shards, `tokenizer.model` and, written last, `manifest.json`: no manifest, no corpus. Until then
`progress.json` tells which shards are finished. Shards are mapped into memory, a few at a time, since each map holds a
file handle and the pages that were touched.
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
BLOCK = 1 << 20  # bytes of a checksum at a time
OPEN_SHARDS = 16
MANIFEST, PROGRESS, MODEL = "manifest.json", "progress.json", "tokenizer.model"
MAKE = "python -m data.prepare --config FILE, with the same words as here"


class Record(BaseModel):
    """A part of the manifest."""

    model_config = ConfigDict(extra="forbid")


class ShardInfo(Record):
    path: str  # relative to the corpus
    documents: int
    tokens: int
    crc: int


class SplitInfo(Record):
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0  # UTF-8, of all stories
    misses: int = 0  # stories that do not decode to themselves
    shards: list[ShardInfo] = []


class Manifest(Record):
    """What a finished corpus holds and what it was made of."""

    version: int = VERSION
    settings: dict[str, str | int | bool]  # keys of the data section that shape a corpus
    source: dict[str, str]  # fingerprint
    empty: int  # blank stories passed over
    tokenizer_hash: str
    vocab_size: int
    splits: dict[str, SplitInfo]

    @property
    def hash(self) -> str:
        """sha256 hex of all but the settings: paths differ between machines, and what they made is covered."""
        content = self.model_dump(exclude={"settings"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Progress(Record):
    """How far an unfinished corpus has come: its finished shards, and what they are made of."""

    version: int = VERSION
    settings: dict[str, str | int | bool]
    source: dict[str, str]
    tokenizer_hash: str
    splits: dict[str, SplitInfo] = {}


class Header(NamedTuple):
    """The first 128 bytes of a shard; `crc` covers all else in the file, the rest of the header last."""

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
        """Array -> (dtype, count, offset in bytes); `end` is the size of the file."""
        arrays = [
            ("tokens", np.dtype(f"<u{self.token_bytes}"), self.tokens),
            ("starts", np.dtype("<i8"), self.documents + 1),
            ("text_bytes", np.dtype("<u4"), self.documents),
            ("log_probs", np.dtype("<f8"), self.documents * self.has_log_probs),
        ]
        places, offset = {}, HEADER.size
        for name, dtype, count in arrays:
            places[name] = dtype, count, offset
            offset += dtype.itemsize * count
            offset += -offset % 8
        places["end"] = np.dtype("u1"), 0, offset
        return places


def token_bytes(vocab_size: int) -> int:
    """Bytes that hold every id below `vocab_size`: 2 up to 65536, else 4."""
    return 2 if vocab_size <= 1 << 16 else 4


def damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path}: {why}; delete {path.parent} and make the corpus again: {MAKE}")


def read_header(path: Path) -> Header:
    """Raises UserError when the file is missing, no shard, of another version, or not as long as it says."""
    try:
        with path.open("rb") as file:
            raw, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from None
    if len(raw) < HEADER.size:
        raise damaged(path, f"cut off: {size} bytes, less than a header")
    magic, version, size_of_token, has_log_probs, crc, vocab_size, tokens, documents, digest = HEADER.unpack(raw)
    if magic != MAGIC:
        raise damaged(path, "not a shard")
    if version != VERSION:
        raise damaged(path, f"shard format {version}, this program reads {VERSION}")
    header = Header(size_of_token, has_log_probs, crc, vocab_size, tokens, documents, digest.hex())
    if header.pack() != raw or header.token_bytes != token_bytes(header.vocab_size) or header.has_log_probs > 1:
        raise damaged(path, "its header is damaged")
    if size != (expected := header.layout()["end"][2]):
        raise damaged(path, f"{'cut off' if size < expected else 'too long'}: {size} bytes where {expected} should be")
    return header


class Shard:
    """A mapped shard: `tokens`, `starts`, `text_bytes`, `log_probs` (or None), read-only arrays over the file."""

    def __init__(self, path: Path) -> None:
        """Raises UserError as `read_header` does."""
        self.path, self.header = path, read_header(path)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.tokens, self.starts, self.text_bytes = map(self._array, ("tokens", "starts", "text_bytes"))
        self.log_probs = self._array("log_probs") if self.header.has_log_probs else None

    def _array(self, name: str) -> np.ndarray:
        dtype, count, offset = self.header.layout()[name]
        return np.frombuffer(self._map, dtype, count, offset)

    def verify(self) -> None:
        """Raises UserError when any byte of the file is not as it was written."""
        crc = 0
        with self.path.open("rb") as file:
            file.seek(HEADER.size)
            while block := file.read(BLOCK):
                crc = zlib.crc32(block, crc)
        if zlib.crc32(self.header._replace(crc=0).pack(), crc) != self.header.crc:
            raise damaged(self.path, "its checksum does not match: the file changed after it was written")


class Writer:
    """Stories of a split -> its shards, each ended before the story that would exceed `shard_tokens`.

    Tokens go to disk as they come. Leaving the `with` block without an error completes the last shard; `info` is then
    the split for the manifest. `finished` is called when a shard is on disk, before it gets its name: then `done` is
    the split as far as its shards are finished, and given that a writer goes on after them.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        tokenizer: Tokenizer,
        shard_tokens: int,
        done: SplitInfo | None = None,
        finished: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.split, self.tokenizer, self.shard_tokens = folder, split, tokenizer, shard_tokens
        self.dtype = np.dtype(f"<u{token_bytes(tokenizer.vocab_size)}")
        self.done, self._finished = done or SplitInfo(), finished
        self.info = self.done.model_copy(deep=True)
        for shard in self.info.shards[-1:]:  # ended between being finished and having its name
            if (partial := folder / f"{shard.path}.partial").exists():
                partial.replace(folder / shard.path)
        self._begin()

    def _begin(self) -> None:
        self._path = self.folder / f"{self.split}-{len(self.info.shards):05}.shard"
        self._file = Path(f"{self._path}.partial").open("wb", BLOCK)
        self._file.write(bytes(HEADER.size))
        self._crc, self._starts = 0, [0]
        self._text_bytes: list[int] = []
        self._log_probs: list[float] = []

    def add(
        self, ids: Sequence[int] | np.ndarray, text_bytes: int, log_prob: float | None = None, missed: bool = False
    ) -> None:
        """One story, without bos and eos, of `text_bytes` UTF-8 bytes. ValueError on an id outside the vocabulary."""
        story = np.empty(len(ids) + 2, np.int64)
        story[0], story[1:-1], story[-1] = self.tokenizer.bos, ids, self.tokenizer.eos
        if story.min() < 0 or story.max() >= self.tokenizer.vocab_size:
            raise ValueError(f"ids from {story.min()} to {story.max()}, vocabulary {self.tokenizer.vocab_size}")
        if text_bytes >= 1 << 32:
            raise UserError(f"data.source: a story of {text_bytes} bytes; a story has less than 4 GiB")
        if self._text_bytes and self._starts[-1] + len(story) > self.shard_tokens:
            self._end()
            self._begin()
        self._write(story.astype(self.dtype))
        self._starts.append(self._starts[-1] + len(story))
        self._text_bytes.append(text_bytes)
        if log_prob is not None:
            self._log_probs.append(log_prob)
        self.info.documents += 1
        self.info.tokens += len(story)
        self.info.text_bytes += text_bytes
        self.info.misses += missed

    def _write(self, array: np.ndarray) -> None:
        self._crc = zlib.crc32(array.data, self._crc)
        self._file.write(array.data)

    def _end(self) -> None:
        documents, tokens = len(self._text_bytes), self._starts[-1]
        all_known = len(self._log_probs) == documents
        header = Header(
            self.dtype.itemsize, all_known, 0, self.tokenizer.vocab_size, tokens, documents, self.tokenizer.hash
        )
        log_probs = self._log_probs if all_known else []
        for name, values in (("starts", self._starts), ("text_bytes", self._text_bytes), ("log_probs", log_probs)):
            dtype, _, offset = header.layout()[name]
            self._pad(offset)
            self._write(np.array(values, dtype))
        self._pad(header.layout()["end"][2])
        header = header._replace(crc=zlib.crc32(header.pack(), self._crc))
        self._file.seek(0)
        self._file.write(header.pack())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.info.shards.append(ShardInfo(path=self._path.name, documents=documents, tokens=tokens, crc=header.crc))
        self.done = self.info.model_copy(deep=True)
        self._finished()
        Path(f"{self._path}.partial").replace(self._path)

    def _pad(self, offset: int) -> None:
        self._write(np.zeros(offset - self._file.tell(), np.uint8))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None and self._text_bytes:
            self._end()
        self._file.close()
        if not self._text_bytes:
            Path(self._file.name).unlink(missing_ok=True)


class Split:
    """Stories of one side of a corpus: `shards`, `documents`, `tokens`, `text_bytes`, and the shards themselves."""

    def __init__(self, folder: Path, info: SplitInfo) -> None:
        self.shards, self.documents, self.tokens = info.shards, info.documents, info.tokens
        self.text_bytes = info.text_bytes
        paths = [folder / shard.path for shard in info.shards]
        self._open = functools.lru_cache(OPEN_SHARDS)(lambda number: Shard(paths[number]))

    def shard(self, number: int) -> Shard:
        """A shard, mapped anew unless it is among the last few asked for. Raises UserError when it is damaged."""
        return self._open(number)

    def close(self) -> None:
        """Drops all maps that nobody else holds."""
        self._open.cache_clear()


class Corpus:
    """A finished corpus: `folder`, `manifest`, and `hash`, which names its content."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest, self.hash = folder, manifest, manifest.hash

    @classmethod
    def open(cls, folder: str | Path) -> "Corpus":
        """Raises UserError when it is missing, unfinished, of another version, or its files are not the manifest's."""
        folder = Path(folder)
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
            if content["version"] != VERSION:
                raise damaged(path, f"corpus format {content['version']}, this program reads {VERSION}")
            manifest = Manifest.model_validate(content)
        except (FileNotFoundError, NotADirectoryError):
            begun = any(folder.glob("*.shard*")) or (folder / MODEL).exists()
            state = "the corpus there is unfinished" if begun else "no corpus there"
            raise UserError(f"data.dir={folder}: {state}; make it first: {MAKE}") from None
        except (ValueError, KeyError, TypeError):
            raise damaged(path, "not a manifest") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        model = folder / MODEL
        if not model.exists() or hashlib.sha256(model.read_bytes()).hexdigest() != manifest.tokenizer_hash:
            raise damaged(model, "not the tokenizer that the corpus was made with")
        for info in (shard for split in manifest.splits.values() for shard in split.shards):
            header = read_header(folder / info.path)
            expected = (info.tokens, info.documents, info.crc, manifest.vocab_size, manifest.tokenizer_hash)
            if (header.tokens, header.documents, header.crc, header.vocab_size, header.tokenizer_hash) != expected:
                raise damaged(folder / info.path, "not the shard that the manifest names")
        return cls(folder, manifest)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.folder / MODEL)

    def split(self, name: str) -> Split:
        """`train` or `validation`."""
        return Split(self.folder, self.manifest.splits[name])

    def check(self, config: DataConfig) -> None:
        """Raises UserError on the first setting that the corpus was not made with."""
        for key, made, asked in differences(self.manifest.settings, settings_of(config)):
            raise UserError(
                f"data.{key}={asked}: the corpus in {self.folder} was made with {made}; "
                f"set data.{key}={made}, or make another: give another data.dir, then {MAKE}"
            )
        given = Path(config.tokenizer).expanduser()
        if config.tokenizer != "train" and given.exists() and Tokenizer(given).hash != self.manifest.tokenizer_hash:
            raise UserError(
                f"data.tokenizer={config.tokenizer}: the file changed after the corpus in {self.folder} was made; "
                f"bring the old one back, or make another: give another data.dir, then {MAKE}"
            )

    def verify(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Reads every byte of every shard; `progress` is told (shards done, of). Raises UserError on damage."""
        shards = [shard for split in self.manifest.splits.values() for shard in split.shards]
        for done, info in enumerate(shards, 1):
            Shard(self.folder / info.path).verify()
            progress(done, len(shards))


def settings_of(config: DataConfig) -> dict[str, str | int | bool]:
    """The settings that shape a corpus; the others may change from run to run."""
    keys = ["source", *(["stories"] if config.source == "storybook" else ["text_field", "clean"]), "validation"]
    keys += ["tokenizer", "vocab_size"] if config.tokenizer == "train" else ["tokenizer"]
    return {key: getattr(config, key) for key in [*keys, "shard_tokens"]}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) of what differs; None where there is none."""
    for key in dict.fromkeys([*new, *old]):
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)
