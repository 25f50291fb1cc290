"""Kernel arguments: buffers, scalars with their C type, tensor maps, structs."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

import numpy as np

from torchext import _sim

from .memory import Arena, Array, View, is_array, view_of
from .numbers import TypedParameter, number_bytes


class Argument(ABC):
    """An argument of a kernel: bytes of a given size and alignment. Their value is known once the
    launch has placed its memory."""

    size: int
    alignment: int

    @abstractmethod
    def register(self, arena: Arena, name: str) -> None:
        """Adds the arrays that the argument points to to the arena."""

    @abstractmethod
    def to_bytes(self, arena: Arena) -> bytes:
        """The argument's value, with addresses in the arena."""


class _Scalar(Argument):
    def __init__(self, data: bytes, alignment: int) -> None:
        self._data = data
        self.size = len(data)
        self.alignment = alignment

    def register(self, arena: Arena, name: str) -> None:
        pass

    def to_bytes(self, arena: Arena) -> bytes:
        return self._data


class _Pointer(Argument):
    size = alignment = 8

    def __init__(self, view: View, access: str, name: str | None) -> None:
        if access != "read" and not view.writable:
            raise ValueError(
                f"torchext.sim.pointer: array must be writable for access {access!r} (got one that "
                "numpy marks read-only); pass a copy"
            )
        self.view, self.access, self._name = view, access, name

    def register(self, arena: Arena, name: str) -> None:
        arena.add(self.view, self.access, self._name or name)

    def address(self, arena: Arena) -> int:
        return arena.address_of(self.view)

    def to_bytes(self, arena: Arena) -> bytes:
        return self.address(arena).to_bytes(8, "little")


class _Window(_Pointer):
    def __init__(self, view: View, access: str, name: str | None, device: int) -> None:
        super().__init__(view, access, name or "window")
        self.device = device

    def register(self, arena: Arena, name: str) -> None:
        arena.add(self.view, self.access, self._name or name, self.device)

    def address(self, arena: Arena) -> int:
        return arena.address_of(self.view, self.device)


class _Struct(Argument):
    def __init__(self, members: Sequence[Argument]) -> None:
        self._members: list[tuple[int, Argument]] = []
        offset = 0
        self.alignment = max((m.alignment for m in members), default=1)
        for member in members:
            offset = -(-offset // member.alignment) * member.alignment
            self._members.append((offset, member))
            offset += member.size
        self.size = max(-(-offset // self.alignment) * self.alignment, 1)

    def register(self, arena: Arena, name: str) -> None:
        for index, (_, member) in enumerate(self._members):
            member.register(arena, f"{name}, member {index}")

    def to_bytes(self, arena: Arena) -> bytes:
        data = bytearray(self.size)
        for offset, member in self._members:
            data[offset : offset + member.size] = member.to_bytes(arena)
        return bytes(data)


# The driver's CUtensorMapDataType by numpy's or torch's name.
_TENSOR_MAP_TYPES = {
    "uint8": 0, "int8": 0, "bool": 0, "float8_e4m3fn": 0, "float8_e5m2": 0, "float8_e8m0fnu": 0,
    "uint16": 1, "int16": 1, "uint32": 2, "int32": 3, "uint64": 4, "int64": 5, "float16": 6,
    "float32": 7, "float64": 8, "bfloat16": 9,
}  # fmt: skip
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_OOB_FILLS = {"zero": 0, "nan": 1}


class _TensorMap(Argument):
    size, alignment = 128, 64

    def __init__(
        self,
        pointer: _Pointer,
        box: Sequence[int],
        swizzle: int,
        element_strides: Sequence[int],
        oob_fill: str,
    ) -> None:
        view = pointer.view
        self._pointer = pointer
        self._encode = partial(
            _sim.encode_tensor_map,
            data_type=_TENSOR_MAP_TYPES[view.dtype],
            global_dim=view.shape[::-1],
            global_strides=[stride * view.itemsize for stride in view.strides[-2::-1]],
            box_dim=box[::-1],
            element_strides=element_strides[::-1],
            swizzle=_SWIZZLES[swizzle],
            oob_fill=_OOB_FILLS[oob_fill],
        )
        # Raises for a rule that is broken. Allocations are aligned on the device, so the offset
        # alone decides the alignment of the address.
        self._encode(global_address=4096 + view.offset)

    def register(self, arena: Arena, name: str) -> None:
        self._pointer.register(arena, name)

    def to_bytes(self, arena: Arena) -> bytes:
        return self._encode(global_address=self._pointer.address(arena))


def pointer(array: Array, access: str = "read_write", name: str | None = None) -> Argument:
    """A device pointer to a numpy array or torch CPU tensor.

    Args:
        array: the array. A view keeps its offset in the allocation that it is part of.
        access: "read" (a store is a finding), "write" (the bytes start out as unwritten, so a load
            of a byte before the kernel has stored it is a finding) or "read_write".
        name: the name of the buffer in findings. The default is the argument's position.

    Raises:
        TypeError: array is no array of numbers in CPU memory with non-negative strides.
        ValueError: access is unknown, or asks to write an array that numpy marks read-only.
    """
    if access not in ("read", "write", "read_write"):
        raise ValueError(
            f"torchext.sim.pointer: access must be read, write or read_write (got {access!r})"
        )
    return _Pointer(view_of(array, "torchext.sim.pointer: array"), access, name)


def read_only(array: Array, name: str | None = None) -> Argument:
    """`pointer(array, "read", name)`: the kernel must not write the array."""
    return pointer(array, "read", name)


def output(array: Array, name: str | None = None) -> Argument:
    """`pointer(array, "write", name)`: bytes count as unwritten until the kernel writes them."""
    return pointer(array, "write", name)


def window(
    array: Array, device: int, access: str = "read_write", name: str | None = None
) -> Argument:
    """Memory of a device that the kernels of a group's other devices may access, too.

    Pass the window to every launch of the group that uses it: all of them get the same address.

    Args:
        array: as for `pointer`.
        device: the device that the memory belongs to.
        access: as for `pointer`, for all devices. "write": a load of a byte before some device has
            stored it is a finding.
        name: of the buffer in findings; "window" if None.

    Raises as `pointer` does, and ValueError if device is negative.
    """
    if access not in ("read", "write", "read_write"):
        raise ValueError(
            f"torchext.sim.window: access must be read, write or read_write (got {access!r})"
        )
    if device < 0:
        raise ValueError(f"torchext.sim.window: device must be at least 0 (got {device})")
    return _Window(view_of(array, "torchext.sim.window: array"), access, name, device)


def struct(*members: object) -> Argument:
    """A struct passed by value, its members laid out as C does.

    Members are what `Module.launch` takes as arguments: arrays, typed scalars, tensor maps, bytes,
    structs.
    """
    return _Struct(
        [argument_of(m, f"torchext.sim.struct: member {i}") for i, m in enumerate(members)]
    )


def tensor_map(
    array: Array | Argument,
    *,
    box: Sequence[int],
    swizzle: int = 0,
    element_strides: Sequence[int] | None = None,
    oob_fill: str = "zero",
) -> Argument:
    """A tensor map over an array, as cuTensorMapEncodeTiled makes it, for TMA instructions.

    Args:
        array: a numpy array or torch CPU tensor of 1 to 5 dimensions with a contiguous last one, or
            `read_only(...)` / `output(...)` of one. Its dtype becomes the map's data type; FP8 is
            uint8, as for the driver.
        box: elements that one instruction moves along each dimension, in the order of
            `array.shape`.
        swizzle: span of the swizzle in bytes: 0 (none), 32, 64 or 128.
        element_strides: step along each dimension of the box, in the order of `array.shape`.
        oob_fill: "zero" or "nan", for elements outside the array.

    Raises:
        TensorMapError: a rule of cuTensorMapEncodeTiled is broken; the message names it, with the
            driver's dimension order (innermost first).
        TypeError, ValueError: an argument that cuTensorMapEncodeTiled could not even be given.
    """
    where = "torchext.sim.tensor_map"
    target = array if isinstance(array, _Pointer) else argument_of(array, f"{where}: array")
    if not isinstance(target, _Pointer):
        raise TypeError(
            f"{where}: array must be a numpy array, a torch tensor, or read_only(...) or "
            f"output(...) of one (got {type(array).__name__})"
        )
    view = target.view
    if view.dtype not in _TENSOR_MAP_TYPES:
        raise TypeError(
            f"{where}: array must have one of the dtypes {', '.join(_TENSOR_MAP_TYPES)} "
            f"(got {view.dtype})"
        )
    if not view.shape:
        raise ValueError(f"{where}: array must have 1 to 5 dimensions (got a scalar)")
    if view.strides[-1] != 1 and view.shape[-1] != 1:
        raise ValueError(
            f"{where}: the last dimension of array must be contiguous (got a stride of "
            f"{view.strides[-1]} elements); pass the transposed view, or a contiguous copy"
        )
    steps = [1] * len(view.shape) if element_strides is None else list(element_strides)
    for name, values in (("box", box), ("element_strides", steps)):
        if len(values) != len(view.shape):
            raise ValueError(
                f"{where}: {name} must have one number for each of the {len(view.shape)} "
                f"dimensions of array (got {len(values)})"
            )
    if swizzle not in _SWIZZLES:
        raise ValueError(f"{where}: swizzle must be 0, 32, 64 or 128 bytes (got {swizzle!r})")
    if oob_fill not in _OOB_FILLS:
        raise ValueError(f"{where}: oob_fill must be 'zero' or 'nan' (got {oob_fill!r})")
    return _TensorMap(target, tuple(box), swizzle, tuple(steps), oob_fill)


def argument_of(value: object, what: str, parameter: TypedParameter | None = None) -> Argument:
    """`value` as an Argument. A Python number takes the type of `parameter`, which it needs.

    Raises TypeError if `value` cannot be one; the message starts with `what`, such as
    "torchext.sim.struct: member 1".
    """
    if isinstance(value, Argument):
        return value
    if is_array(value):
        view = view_of(value, what)
        return _Pointer(view, "read_write" if view.writable else "read", None)
    if isinstance(value, np.generic):
        return _Scalar(value.tobytes(), value.dtype.alignment)
    if isinstance(value, ctypes._SimpleCData | ctypes.Structure | ctypes.Array):
        return _Scalar(bytes(value), ctypes.alignment(value))
    if isinstance(value, bytes):
        return _Scalar(value, 1)
    if isinstance(value, int | float):
        data = number_bytes(value, parameter, what)
        return _Scalar(data, len(data))
    raise TypeError(
        f"{what} must be an array, a tensor, a number, a numpy or ctypes scalar, a tensor_map, a "
        f"struct or bytes (got {type(value).__name__})"
    )
