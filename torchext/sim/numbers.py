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


def number_bytes(value: bool | int | float, parameter: TypedParameter | None, where: str) -> bytes:
    """`value` in the type of `parameter`; None is a member of a struct, whose type nobody knows.

    Raises TypeError for a kind of number that the parameter does not take, ValueError for one that
    does not fit; both in the name of `where`.
    """
    kind = type(value).__name__
    if parameter is None or parameter.is_array:
        example = "np.float32(0.5)" if isinstance(value, float) else "np.int32(5)"
        if parameter is None:
            remedy = f"a struct's members need one: write {example} or a ctypes value"
        else:
            remedy = (
                f"the parameter is a struct or an array of {parameter.size} bytes: pass "
                f"sim.struct({example}, ...), a ctypes structure or bytes"
            )
        raise TypeError(f"{where}: a Python {kind} has no C type, and {remedy}")
    if parameter.is_pointer:
        raise TypeError(
            f"{where}: expected a pointer (an array, a tensor, or an address as np.uint64); got "
            f"the Python {kind} {value!r}"
        )
    if parameter.type in _FLOATS:
        return _float_bytes(value, parameter, where)
    if parameter.type[0] in "usb" and parameter.type[1:].isdecimal():
        return _integer_bytes(value, parameter, where)
    raise TypeError(
        f"{where}: expected {parameter.size} bytes ({parameter.type}), as a numpy or ctypes value "
        f"or as bytes; got the Python {kind} {value!r}"
    )


def _float_bytes(value: bool | int | float, parameter: TypedParameter, where: str) -> bytes:
    if isinstance(value, bool):
        raise TypeError(f"{where}: expected a number ({parameter.type}); got the bool {value!r}")
    convert = _FLOATS[parameter.type]
    with np.errstate(over="ignore"):
        try:
            number = convert(value)
        except OverflowError:  # an int beyond every float
            number = convert(math.inf)
    infinite = isinstance(value, float) and math.isinf(value)
    if np.isinf(number) and not infinite:
        raise ValueError(f"{where}: {value!r} does not fit in {parameter.type}")
    if isinstance(value, int) and int(number) != value:
        raise ValueError(
            f"{where}: {parameter.type} cannot hold the int {value!r} exactly; pass a float to "
            "have it rounded"
        )
    return number.tobytes()


def _integer_bytes(value: bool | int | float, parameter: TypedParameter, where: str) -> bytes:
    if isinstance(value, float):
        raise TypeError(
            f"{where}: expected an integer ({parameter.type}); got the float {value!r} (a numpy or "
            "ctypes float passes its bits)"
        )
    # Compilers declare signed integers as .u too, so that either range may be meant; .s is signed.
    bits = 8 * parameter.size
    least, most = -(1 << bits - 1), (1 << bits - (parameter.type[0] == "s")) - 1
    if not least <= value <= most:
        raise ValueError(
            f"{where}: {int(value)} does not fit in {parameter.type} ({least} to {most})"
        )
    return (int(value) & (1 << bits) - 1).to_bytes(parameter.size, "little")
