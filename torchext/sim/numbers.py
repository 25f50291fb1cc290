"""Python numbers as the bytes of a kernel's parameter, where its type says what is meant."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

_FLOATS: dict[str, type[np.floating]] = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


class TypedParameter(Protocol):
    """A kernel's parameter, as `module.Parameter` has it."""

    @property
    def type(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def is_array(self) -> bool: ...
    @property
    def is_pointer(self) -> bool: ...


def number_bytes(value: bool | int | float, parameter: TypedParameter | None, what: str) -> bytes:
    """`value` in the type of `parameter`, which is None for a struct's members: PTX does not say
    what type they have.

    Raises TypeError for a kind of number that the parameter does not take, and ValueError for a
    number that does not fit. Messages start with `what`, such as "torchext.sim.struct: member 1".
    """
    kind = type(value).__name__
    if parameter is None or parameter.is_array:
        example = "np.float32(0.5)" if isinstance(value, float) else "np.int32(5)"
        if parameter is None:
            expected, remedy = "a value with a C type", f"write {example} or a ctypes value"
        else:
            expected = f"a struct or an array of {parameter.size} bytes"
            remedy = f"pass sim.struct({example}, ...), a ctypes structure or bytes"
        raise TypeError(f"{what} must be {expected} (got the Python {kind} {value!r}); {remedy}")
    if parameter.is_pointer:
        raise TypeError(
            f"{what} must be a pointer: an array, a tensor, or an address as np.uint64 (got the "
            f"Python {kind} {value!r})"
        )
    if parameter.type in _FLOATS:
        return _float_bytes(value, parameter, what)
    if parameter.type[0] in "usb" and parameter.type[1:].isdecimal():
        return _integer_bytes(value, parameter, what)
    raise TypeError(
        f"{what} must be a numpy or ctypes value or bytes, {parameter.size} bytes of "
        f"{parameter.type} (got the Python {kind} {value!r})"
    )


def _float_bytes(value: bool | int | float, parameter: TypedParameter, what: str) -> bytes:
    if isinstance(value, bool):
        raise TypeError(
            f"{what} must be a number of type {parameter.type} (got the bool {value!r})"
        )
    convert = _FLOATS[parameter.type]
    with np.errstate(over="ignore"):
        try:
            number = convert(value)
        except OverflowError:  # an int beyond every float
            number = convert(math.inf)
    infinite = isinstance(value, float) and math.isinf(value)
    if np.isinf(number) and not infinite:
        raise ValueError(f"{what} must be in the range of {parameter.type} (got {value!r})")
    if isinstance(value, int) and int(number) != value:
        raise ValueError(
            f"{what} must be an int that {parameter.type} holds exactly (got {value!r}); pass a "
            "float to have it rounded"
        )
    return number.tobytes()


def _integer_bytes(value: bool | int | float, parameter: TypedParameter, what: str) -> bytes:
    if isinstance(value, float):
        raise TypeError(
            f"{what} must be an integer of type {parameter.type} (got the float {value!r}); pass a "
            "numpy or ctypes float to pass its bits"
        )
    # Compilers declare signed integers as .u too, so .u takes both ranges. An .s is always signed.
    bits = 8 * parameter.size
    least, most = -(1 << bits - 1), (1 << bits - (parameter.type[0] == "s")) - 1
    if not least <= value <= most:
        raise ValueError(
            f"{what} must be in the range of {parameter.type}, {least} to {most} (got {int(value)})"
        )
    return (int(value) & (1 << bits) - 1).to_bytes(parameter.size, "little")
