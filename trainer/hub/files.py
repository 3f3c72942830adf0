"""Folders in the Hugging Face format: config.json, and safetensors in one file or in several files with an index.

`importer.py` reads such folders with `Folder`, and `export.py` writes them with `write_shards`.

Reading trusts nothing. The index may name only plain files inside the folder, safetensors checks the header of each
file before any tensor is read, shapes are known before memory is allocated, and neither code nor pickles are ever
opened. Writing holds one chunk of one tensor at a time.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.settings import UserError
from model.random import Window
from trainer.safetensors_header import TensorEntry, make_header

CONFIG_FILE, INDEX_FILE, SINGLE_FILE = "config.json", "model.safetensors.index.json", "model.safetensors"
MAX_JSON_BYTES = 1 << 26
WRITE_BYTES = 1 << 24  # converted and written at a time


class Folder:
    """A folder in the Hugging Face format, opened for reading.

    `config` is the content of its config.json; `shapes` and `dtypes` describe its tensors by name. Raises UserError if
    a file is missing or is not what it should be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG_FILE)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # as safetensors names them, such as F32 and BF16
        self._files: dict[str, Any] = {}  # the open file that holds each tensor
        for file_name in self._file_names():
            self._open(file_name)

    def _file_names(self) -> list[str]:
        """The files of weights, as the index names them; without an index there is a single file."""
        index_path = self.path / INDEX_FILE
        if not index_path.is_file():
            return [SINGLE_FILE]
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index_path}: weight_map is missing, or does not map each tensor to a file name")
        return sorted(set(weight_map.values()))

    def _open(self, file_name: str) -> None:
        path = self._checked_path(file_name)
        try:
            file = safe_open(path, framework="pt")
            for tensor in file.keys():
                if tensor in self._files:
                    raise UserError(f"{path}: tensor {tensor} is also in another file of the folder")
                header = file.get_slice(tensor)
                self._files[tensor] = file
                self.shapes[tensor] = tuple(header.get_shape())
                self.dtypes[tensor] = header.get_dtype()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read as safetensors ({error})") from None

    def _checked_path(self, file_name: str) -> Path:
        """The path of a file of the folder. A link may lead only to where the hub's own cache keeps files."""
        path, folder = self.path / file_name, self.path.resolve()
        has_separator = file_name != os.path.basename(file_name) or "\\" in file_name
        if has_separator or file_name in ("", ".", "..") or "\0" in file_name:
            raise UserError(f"{self.path / INDEX_FILE}: {file_name!r} is not a plain file name")
        if not path.is_file():
            hint = f", and no {INDEX_FILE} that names other files" if file_name == SINGLE_FILE else ""
            raise UserError(f"{path}: no such file{hint}")
        is_hub_cache = folder.parent.name == "snapshots"
        allowed = {folder, folder.parent.parent / "blobs"} if is_hub_cache else {folder}
        if path.resolve().parent not in allowed:
            raise UserError(f"{path}: a link to a file outside of the folder; only links of the hub cache are followed")
        return path

    def read(self, name: str, window: Window) -> Tensor:
        """The rows and columns of a tensor that `window` gives as (start, stop) in each dimension."""
        return self._files[name].get_slice(name)[tuple(slice(start, stop) for start, stop in window)]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if the file is missing, damaged or too large, or is not an object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: larger than {MAX_JSON_BYTES:,} bytes, which is too large for this file")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class ShardTensor:
    """A tensor that `write_shards` writes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass
class _File:
    """A file of weights that is to be written."""

    entries: list[ShardTensor] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.entries)

    def header(self) -> tuple[bytes, dict[str, int]]:
        """The header of the file, and the byte at which each tensor begins."""
        entries = (TensorEntry(entry.name, entry.dtype, entry.shape) for entry in self.entries)
        header = make_header(entries, alignment=8)
        return header.content, header.starts


def write_shards(
    folder: Path, entries: Sequence[ShardTensor], tensors: Iterable[tuple[str, Tensor]], max_bytes: int
) -> int:
    """Write tensors into files of at most `max_bytes` bytes of tensors, and the index if there are several files.

    A tensor that is larger than `max_bytes` has its own file. `tensors` yields (name, tensor) once for each
    entry, in the order of the entries. Returns the number of files.
    """
    files = [_File()]
    for entry in entries:
        if files[-1].entries and files[-1].size + entry.size > max_bytes:
            files.append(_File())
        files[-1].entries.append(entry)
    remaining = iter(tensors)
    weight_map = {}
    for number, file in enumerate(files, start=1):
        file_name = SINGLE_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        header, places = file.header()
        with (folder / file_name).open("wb") as out:
            out.write(header)
            out.truncate(len(header) + file.size)
            for entry in file.entries:
                name, tensor = next(remaining)
                assert (name, tuple(tensor.shape)) == (entry.name, entry.shape), (name, entry)
                out.seek(places[name])
                for chunk in _chunks(tensor):
                    out.write(chunk.to(entry.dtype).view(torch.uint8).numpy().data)
                del tensor, chunk  # frees this tensor before the next one is read
                weight_map[name] = file_name
    assert next(remaining, None) is None
    if len(files) > 1:
        total_bytes = sum(file.size for file in files)
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return len(files)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor as flat chunks of WRITE_BYTES bytes."""
    return iter(tensor.contiguous().flatten().split(WRITE_BYTES // tensor.dtype.itemsize))
