"""Reads and writes safetensors files one tensor at a time, within little memory.

safetensors reads; it maps a file into memory. It can only write files whose tensors are all in
memory, so `ShardWriter` writes the format itself.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

# The format's names of dtypes. Those that torch lacks are listed by `inspect` and never read.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
NAME_OF = {dtype: name for name, dtype in DTYPES.items()}

_OTHER_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}  # of dtypes that are not read

_ALIGNMENT = 64  # bytes, of the first tensor of a file
_CHUNK = 16 << 20  # bytes that one call writes; also after which a mapped file is mapped anew


class CheckpointError(ValueError):
    """A checkpoint, or what was asked of it, is wrong.

    Attributes:
        problems: one sentence for each problem found, with the names of file and tensor.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(f"torchext.checkpoint: {problem}" for problem in problems))
        self.problems = problems


@dataclasses.dataclass(frozen=True)
class Spec:
    """Name, dtype (as the format spells it) and shape of a tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        dtype = DTYPES.get(self.dtype)
        bits = dtype.itemsize * 8 if dtype else _OTHER_BITS.get(self.dtype, 8)
        return math.prod(self.shape) * bits // 8

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype} {list(self.shape)})"


@dataclasses.dataclass(frozen=True)
class Entry(Spec):
    """A tensor of a checkpoint; `file` holds it."""

    file: Path

    @property
    def where(self) -> str:
        """`TENSOR in FILE`, for errors."""
        return f"{self.name} in {self.file.name}"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What the headers and the configuration of a checkpoint say; no tensor was read.

    Attributes:
        path: the folder, or the one file.
        entries: every tensor by name, in the order of the files.
        files: the safetensors files, in order.
        config: config.json, or {}.
    """

    path: Path
    entries: Mapping[str, Entry]
    files: tuple[Path, ...]
    config: Mapping[str, Any]

    @property
    def folder(self) -> Path | None:
        """The folder, or None if the checkpoint is a file of its own."""
        return self.path if self.path.is_dir() else None


def safe_open(file: Path) -> Any:
    """safetensors.safe_open for torch, with errors that name the file."""
    try:
        import safetensors
    except ImportError:
        raise ImportError(
            "torchext.checkpoint: safetensors must be installed (got no module of that name); run "
            "pip install safetensors"
        ) from None
    try:
        return safetensors.safe_open(os.fspath(file), framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{file} must exist (got no such file); download it") from None
    except (safetensors.SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise CheckpointError(
            f"{file} must be a whole safetensors file (got {size:,} bytes that are none: {error}); "
            "it is truncated or damaged, so download or copy it again"
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(
            f"{file} must be JSON (got a damaged file: {error}); download or copy it again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file} must hold a JSON object (got {type(value).__name__}); download or copy it "
            "again"
        )
    return value


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads the headers of every safetensors file of a folder, or those of one file.

    If the folder has a model.safetensors.index.json, the files are those that it names, and both
    must name the same tensors.

    Raises:
        CheckpointError: a file is missing, truncated or damaged; a tensor of the index is not in
            its file; a tensor of a file is not in the index, or is in two files.
        ImportError: safetensors is not installed.
    """
    path = Path(path)
    if path.is_file():
        found = _headers(path)
        return Checkpoint(path, {entry.name: entry for entry in found}, (path,), {})
    if not path.is_dir():
        raise CheckpointError(
            f"{path} must be a folder or a safetensors file (got no such path); correct the path"
        )
    weight_map = _weight_map(path / INDEX) if (path / INDEX).exists() else None
    names = sorted(set(weight_map.values()) if weight_map else {f.name for f in _weights_in(path)})
    if not names:
        raise CheckpointError(
            f"{path} must hold safetensors files (got none); point to the folder that holds "
            "model.safetensors or its index"
        )
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for name in names:
        for entry in _headers(path / name):
            if weight_map is not None and weight_map.get(entry.name) != name:
                says = weight_map.get(entry.name)
                problems.append(
                    f"{entry.where} must be in {INDEX} with this file (got "
                    f"{says or 'no such name'}); correct the index, or remove the tensor"
                )
            elif entry.name in entries:
                problems.append(
                    f"{entry.where} must be in one file only (got {entries[entry.name].file.name} "
                    "too); remove one of them, or add an index"
                )
            entries.setdefault(entry.name, entry)
    for tensor, name in (weight_map or {}).items():
        if tensor not in entries:
            problems.append(
                f"{tensor} of {INDEX} must be in {name} (got a file without it); download the file "
                "again, or correct the index"
            )
    if problems:
        raise CheckpointError(*problems)
    config = read_json(path / CONFIG) if (path / CONFIG).exists() else {}
    return Checkpoint(path, entries, tuple(path / name for name in names), config)


def _weights_in(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    whole = [file for file in files if file.name == "model.safetensors"]
    return whole or files


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} must have a weight_map of tensors to files (got {weight_map!r}); download or "
            "copy it again"
        )
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                f"{tensor} of {INDEX} must name a file beside the index (got {name!r}); correct "
                "the index"
            )
    return weight_map


def _headers(file: Path) -> list[Entry]:
    handle = safe_open(file)
    slices = ((name, handle.get_slice(name)) for name in handle.offset_keys())
    return [Entry(name, part.get_dtype(), tuple(part.get_shape()), file) for name, part in slices]


class Reader:
    """Reads tensors as views of mapped files.

    Pages of a mapped file count as this process's memory once they are read. They are given up by
    mapping the file anew after every 16 MiB.

    Attributes:
        names: of the tensors that were read.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._file: Path | None = None
        self._handle: Any = None
        self._read = 0

    def read(self, entry: Entry, nbytes: int | None = None) -> Tensor:
        """The tensor, of which the caller reads `nbytes` (all of it if None) before the next
        call. It stays valid, but holds memory."""
        if entry.file != self._file or self._read > _CHUNK:
            self._handle = None  # unmap before mapping anew
            self._handle, self._file, self._read = safe_open(entry.file), entry.file, 0
        self.names.add(entry.name)
        self._read += entry.nbytes if nbytes is None else nbytes
        tensor: Tensor = self._handle.get_tensor(entry.name)
        return tensor


class ShardWriter:
    """Writes a safetensors file, its tensors in any order and in parts.

    The file has a temporary name until `with` ends without an error. Tensors of wide dtypes come
    first, and the first one is 64-byte aligned, so that tensors of multiples of 16 bytes are
    16-byte aligned when the file is mapped.
    """

    def __init__(self, file: Path, specs: Iterable[Spec]) -> None:
        ordered = sorted(specs, key=lambda spec: -spec.itemsize)
        self._specs = {spec.name: spec for spec in ordered}
        self._final, self._temporary = file, file.with_name(file.name + ".part")
        self._written = dict.fromkeys(self._specs, 0)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        offset = 0
        for spec in ordered:
            self._offsets[spec.name] = offset
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        self._begin, self._size = len(text) + 8, len(text) + 8 + offset
        self._header = len(text).to_bytes(8, "little") + text

    def __enter__(self) -> ShardWriter:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
        self._descriptor = os.open(self._temporary, flags, 0o644)
        os.truncate(self._descriptor, self._size)
        os.pwrite(self._descriptor, self._header, 0)
        return self

    def write(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Writes `tensor`'s elements from element `start` on of the tensor `name` of the file."""
        spec = self._specs[name]
        if NAME_OF.get(tensor.dtype) != spec.dtype:
            raise AssertionError(f"{spec} was written as {tensor.dtype}")
        tensor = tensor.detach().cpu().contiguous()
        position = self._begin + self._offsets[name] + start * spec.itemsize
        address, left = tensor.data_ptr(), tensor.nbytes
        self._written[name] += left
        while left:
            # numpy is no dependency, and torch has no other buffer of a tensor's memory.
            part = (ctypes.c_char * min(left, _CHUNK)).from_address(address)
            count = os.pwrite(self._descriptor, part, position)
            address, position, left = address + count, position + count, left - count

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
        if kind is None:
            for name, written in self._written.items():
                if written != self._specs[name].nbytes:
                    raise AssertionError(f"{self._specs[name]}: {written} bytes were written")
            os.replace(self._temporary, self._final)
