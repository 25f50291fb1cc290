"""Device variables of a module (`__device__`, `__constant__`), read and written by the host."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from torchext import _sim

from .memory import is_array, view_of

# numpy's dtype of a PTX type; what numpy lacks (bf16, packed types) is read as unsigned bits.
_DTYPES = {
    "u8": "u1", "s8": "i1", "b8": "u1", "u16": "u2", "s16": "i2", "b16": "u2", "f16": "f2",
    "bf16": "u2", "u32": "u4", "s32": "i4", "b32": "u4", "f32": "f4", "f16x2": "u4",
    "bf16x2": "u4", "u64": "u8", "s64": "i8", "b64": "u8", "f64": "f8", "b128": "V16",
}  # fmt: skip


@dataclass(frozen=True)
class Variable:
    """A `.global` or `.const` variable: what cudaMemcpyToSymbol and cudaMemcpyFromSymbol reach.

    It belongs to its module and keeps its value from launch to launch, as on a GPU. Initializers,
    kernels and `set` write it.

    Attributes:
        name: as PTX declares it.
        space: "global" or "const".
        type: PTX type of an element, such as "f32"; "b8" for structs.
        shape: shape of the array; () for a scalar. `.v2` and `.v4` add a last dimension.
        size, alignment: in bytes.
        address: the address of its first byte, valid as long as the module lives.
    """

    name: str
    space: str
    type: str
    shape: tuple[int, ...]
    size: int
    alignment: int
    address: int
    _module: _sim.Module = field(repr=False, compare=False)  # owns the memory

    @property
    def dtype(self) -> np.dtype[Any]:
        """numpy's dtype of an element; unsigned integers for PTX's untyped `.b8` to `.b64`."""
        return np.dtype(_DTYPES[self.type])

    def get(self, dtype: DTypeLike | None = None) -> np.ndarray[Any, Any]:
        """The value, copied: an array of `shape`, or with `dtype` the bytes as a flat array of it.

        Raises ValueError if the variable is no whole number of elements of `dtype`.
        """
        data = np.frombuffer(ctypes.string_at(self.address, self.size), np.uint8).copy()
        if dtype is None:
            return data.view(self.dtype).reshape(self.shape)
        if self.size % np.dtype(dtype).itemsize:
            raise ValueError(
                f"torchext.sim.Variable.get of {self.name}: the size of dtype must divide the "
                f"variable's {self.size} bytes (got {np.dtype(dtype)})"
            )
        return data.view(dtype)

    def set(self, value: object, *, offset: int | None = None) -> None:
        """Writes the variable.

        Args:
            value: a numpy array or torch CPU tensor whose elements have the variable's size and
                kind (any, if the variable is untyped: `.b8` to `.b64`), bytes, or numbers that fit
                `dtype`.
            offset: where to write part of the variable, in bytes; None writes all of it.

        Raises:
            TypeError: elements of another kind or size, numbers that are no integers.
            ValueError: too few or too many bytes.
            OverflowError: a number outside the range of `dtype`.
        """
        data = self._bytes_of(value)
        begin = 0 if offset is None else offset
        fits = len(data) == self.size if offset is None else 0 <= begin <= self.size - len(data)
        if not fits:
            where = f"torchext.sim.Variable.set of {self.name}"
            if offset is None:
                raise ValueError(
                    f"{where}: value must have {self.size} bytes (got {len(data)}); pass offset= "
                    "to write a part"
                )
            raise ValueError(
                f"{where}: value must lie within the variable's {self.size} bytes (got {len(data)} "
                f"bytes at offset {offset})"
            )
        ctypes.memmove(self.address + begin, data, len(data))

    def _bytes_of(self, value: object) -> bytes:
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        where = f"torchext.sim.Variable.set of {self.name}"
        if is_array(value) or isinstance(value, np.generic):
            if isinstance(value, np.generic):
                value = np.asarray(value)
            view = view_of(value, f"{where}: value")
            untyped = self.type.startswith("b") and self.type[1:].isdigit()
            floating = "float" in view.dtype
            if not untyped and (view.itemsize, floating) != (
                self.dtype.itemsize,
                "f" in self.type,
            ):
                raise TypeError(
                    f"{where}: value must have elements of type .{self.type} (got {view.dtype}); "
                    f"convert them first, or pass bytes"
                )
            if isinstance(value, np.ndarray):
                return value.tobytes()
            tensor = value.detach().contiguous()
            return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())
        numbers = np.asarray(value)
        if numbers.dtype.kind not in "biuf" or (
            numbers.dtype.kind == "f" and self.dtype.kind != "f"
        ):
            raise TypeError(
                f"{where}: value must be numbers of type .{self.type} (got {numbers.dtype} from "
                f"{type(value).__name__})"
            )
        if self.dtype.kind == "f":
            return numbers.astype(self.dtype).tobytes()
        limits = np.iinfo(self.dtype)
        for number in np.ravel(numbers).tolist():
            if not limits.min <= number <= limits.max:
                raise OverflowError(
                    f"{where}: value must be in the range of .{self.type} (got {number})"
                )
        return numbers.astype(self.dtype).tobytes()
