"""Folders in the Hugging Face layout: safetensors in several files with an index, and config.json.

Reading trusts nothing: an index names plain files inside the folder, safetensors checks the header of each before any
tensor is touched, shapes are known before memory is asked for, and no code or pickle is ever looked at. Writing holds
one piece of one tensor at a time.
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

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
SMALL = 1 << 26  # bytes of a JSON file, at most
BUFFER = 1 << 24  # bytes that are cast and written at a time


class Folder:
    """A folder in that layout, opened for reading: `config` and, by tensor, `shapes`. Raises UserError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # as safetensors spells them: F32, BF16
        self._files: dict[str, Any] = {}  # of each tensor
        for name in self._names():
            self._open(name)

    def _names(self) -> list[str]:
        if not (self.path / INDEX).is_file():
            return [SINGLE]
        index = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise UserError(f"{self.path / INDEX}: has no weight_map of file names")
        return sorted(set(index.values()))

    def _open(self, name: str) -> None:
        path = self._inside(name)
        try:
            file = safe_open(path, framework="pt")
            for tensor in file.keys():
                if tensor in self._files:
                    raise UserError(f"{path}: {tensor} is in another file too")
                self._files[tensor] = file
                part = file.get_slice(tensor)
                self.shapes[tensor], self.dtypes[tensor] = tuple(part.get_shape()), part.get_dtype()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read as safetensors ({error})") from None

    def _inside(self, name: str) -> Path:
        """The path of a plain file name. A link may lead to where the hub's own cache keeps files, nowhere else."""
        path, home = self.path / name, self.path.resolve()
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
        if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise UserError(f"{self.path / INDEX}: {name!r} is no plain file name")
        if not path.is_file():
            raise UserError(f"{path}: no such file" + ("" if name != SINGLE else f", and no {INDEX}"))
        if path.resolve().parent not in (home, blobs):
            raise UserError(f"{path}: a link that leads out of the folder")
        return path

    def read(self, name: str, window: Window) -> Tensor:
        """`window` of a tensor."""
        return self._files[name].get_slice(name)[tuple(slice(a, b) for a, b in window)]


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON file that holds an object. Raises UserError."""
    try:
        if path.stat().st_size > SMALL:
            raise UserError(f"{path}: larger than {SMALL:,} bytes")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass
class _File:
    entries: list[Entry] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.entries)

    def layout(self) -> tuple[bytes, dict[str, int]]:
        """The header of the file, and the byte at which each tensor begins."""
        entries = (TensorEntry(entry.name, entry.dtype, entry.shape) for entry in self.entries)
        header = make_header(entries, alignment=8)
        return header.content, header.starts


def write_shards(folder: Path, entries: Sequence[Entry], content: Iterable[tuple[str, Tensor]], limit: int) -> int:
    """Write tensors into files of at most `limit` bytes (a larger tensor has one of its own), and their index.

    `content` gives each tensor once, in the order of the entries. Returns the number of files.
    """
    files = [_File()]
    for entry in entries:
        if files[-1].entries and files[-1].size + entry.size > limit:
            files.append(_File())
        files[-1].entries.append(entry)
    given, index = iter(content), {}
    for number, file in enumerate(files, start=1):
        name = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        header, places = file.layout()
        with (folder / name).open("wb") as out:
            out.write(header)
            out.truncate(len(header) + file.size)
            for entry in file.entries:
                tensor_name, tensor = next(given)
                assert (tensor_name, tuple(tensor.shape)) == (entry.name, entry.shape), (tensor_name, entry)
                out.seek(places[entry.name])
                for part in _parts(tensor):
                    out.write(part.to(entry.dtype).view(torch.uint8).numpy().data)
                del tensor, part  # before the next one comes
                index[entry.name] = name
    assert next(given, None) is None
    if len(files) > 1:
        total = sum(file.size for file in files)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    return len(files)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor by flat runs of BUFFER bytes."""
    return iter(tensor.contiguous().flatten().split(BUFFER // tensor.dtype.itemsize))
