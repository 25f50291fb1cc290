"""Launch specifications: TOML files that say how to launch a kernel.

kernel = "scale_rows"
grid = [2, 1, 1]                             # or one number
block = 128
smem = 0                                     # optional, as are the lines below
cluster = 1
seeds = [0, 1, 2]                            # the default
completion = ["late", "eager", "random"]     # the default: nine runs together

[arrays.x]
shape = [100, 64]
dtype = "float8_e4m3fn"       # any dtype of torch
fill = "normal"               # zeros, ones, normal, uniform, arange or a number
access = "read"               # read, write or read_write (the default)

[arrays.y]
file = "y.npy"                # instead of shape, dtype and fill; path from the TOML file
save = "y_out.npy"            # write the array here after the first run

[[args]]                      # one for each parameter, in order
array = "x"

[[args]]
tensor_map = "x"
box = [64, 64]
swizzle = 64                  # optional, as are element_strides and oob_fill

[[args]]
scalar = 100
type = "int32"                # optional: any scalar type of numpy; else the parameter's own
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .arguments import Argument, pointer, tensor_map


class SpecError(ValueError):
    """A launch specification that cannot be used; the message names the entry."""


@dataclass(frozen=True)
class ArraySpec:
    """A buffer: its content before a run, and the kernel's access to it."""

    make: Callable[[], torch.Tensor]
    access: str
    save: Path | None


@dataclass(frozen=True)
class LaunchSpec:
    """A parsed specification; `arguments` makes fresh buffers for every run."""

    kernel: str
    grid: int | Sequence[int]
    block: int | Sequence[int]
    smem: int
    cluster: int | Sequence[int] | None
    seeds: list[int]
    completion: list[str]
    arrays: dict[str, ArraySpec]
    args: list[dict[str, Any]] = field(repr=False)

    def arguments(self) -> tuple[list[Any], dict[str, torch.Tensor]]:
        """(the kernel's arguments, the arrays that they point to); the arrays are filled anew."""
        tensors = {name: array.make() for name, array in self.arrays.items()}
        return [self._argument(entry, tensors) for entry in self.args], tensors

    def _argument(self, entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
        if "scalar" in entry:
            scalar = entry["scalar"]
            return np.dtype(entry["type"]).type(scalar) if "type" in entry else scalar
        name = entry.get("array") or entry["tensor_map"]
        target: Argument = pointer(tensors[name], self.arrays[name].access, name)
        if "array" in entry:
            return target
        options = {k: v for k, v in entry.items() if k != "tensor_map"}
        return tensor_map(target, **options)


def _take(
    table: dict[str, Any], where: str, required: Sequence[str], optional: Sequence[str]
) -> None:
    for key in required:
        if key not in table:
            raise SpecError(f"{where} must have the key '{key}' (got {', '.join(table) or 'none'})")
    for key in table:
        if key not in (*required, *optional):
            raise SpecError(
                f"{where}: keys must be among {', '.join((*required, *optional))} (got '{key}')"
            )


_FILLS: dict[str, Callable[[tuple[int, ...]], torch.Tensor]] = {
    "zeros": torch.zeros,
    "ones": torch.ones,
    "normal": lambda shape: torch.randn(shape, generator=torch.Generator().manual_seed(0)),
    "uniform": lambda shape: torch.rand(shape, generator=torch.Generator().manual_seed(0)),
    "arange": lambda shape: torch.arange(int(np.prod(shape))).reshape(shape),
}


def _array(table: dict[str, Any], where: str, folder: Path) -> ArraySpec:
    shared = ("access", "save")
    if "file" in table:
        _take(table, where, ("file",), shared)
        path = folder / table["file"]
        if not path.is_file():
            raise SpecError(
                f"{where}: file must be an .npy file (got {path}); there is no such file"
            )
        try:
            stored = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise SpecError(
                f"{where}: file must be an .npy file of numbers (got {path}: {error})"
            ) from None

        def make() -> torch.Tensor:
            return torch.from_numpy(stored.copy())
    else:
        _take(table, where, ("shape", "dtype"), ("fill", *shared))
        shape, fill = tuple(table["shape"]), table.get("fill", "zeros")
        dtype = getattr(torch, table["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise SpecError(f"{where}: dtype must be one of torch's (got '{table['dtype']}')")
        if isinstance(fill, str) and fill not in _FILLS:
            raise SpecError(
                f"{where}: fill must be a number or one of {', '.join(_FILLS)} (got '{fill}')"
            )

        def make() -> torch.Tensor:
            if isinstance(fill, str):
                return _FILLS[fill](shape).to(dtype)
            return torch.full(shape, fill, dtype=torch.float64).to(dtype)

    access = table.get("access", "read_write")
    if access not in ("read", "write", "read_write"):
        raise SpecError(f"{where}: access must be read, write or read_write (got '{access}')")
    return ArraySpec(make, access, folder / table["save"] if "save" in table else None)


def _check_argument(entry: dict[str, Any], where: str, arrays: dict[str, ArraySpec]) -> None:
    if "scalar" in entry:
        _take(entry, where, ("scalar",), ("type",))
        if not isinstance(entry["scalar"], int | float):
            raise SpecError(f"{where}: scalar must be a number (got {entry['scalar']!r})")
        try:
            np.dtype(entry.get("type", "float64")).type(entry["scalar"])
        except (TypeError, ValueError, OverflowError) as error:
            raise SpecError(
                f"{where}: scalar must be a value of its type (got {entry['scalar']!r}: {error})"
            ) from None
        return
    if "array" in entry:
        _take(entry, where, ("array",), ())
    else:
        _take(entry, where, ("tensor_map", "box"), ("swizzle", "element_strides", "oob_fill"))
    name = entry.get("array") or entry["tensor_map"]
    if name not in arrays:
        raise SpecError(
            f"{where}: {'array' if 'array' in entry else 'tensor_map'} must name an array of the "
            f"file (got {name!r}); there is no [arrays.{name}]"
        )


def _load_toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        try:
            import tomli as tomllib  # type: ignore[no-redef]
        except ModuleNotFoundError:
            raise SpecError(
                "tomllib must be importable (got Python 3.10); use Python 3.11 or "
                "`pip install tomli`"
            ) from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"the file must be TOML (got: {error})") from None


def load_spec(path: Path) -> LaunchSpec:
    """Reads and checks a specification; raises SpecError, or OSError if it cannot be read."""
    try:
        table = _load_toml(path.read_text("utf-8-sig"))
    except UnicodeDecodeError:
        raise SpecError(f"{path}: the file must be TOML (got text that is not UTF-8)") from None
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None
    _take(
        table, str(path), ("kernel", "grid", "block"),
        ("smem", "cluster", "seeds", "completion", "arrays", "args"),
    )  # fmt: skip
    arrays = {
        name: _array(entry, f"{path}: [arrays.{name}]", path.parent)
        for name, entry in table.get("arrays", {}).items()
    }
    args = table.get("args", [])
    for index, entry in enumerate(args):
        _check_argument(entry, f"{path}: args[{index}]", arrays)
    return LaunchSpec(
        kernel=table["kernel"],
        grid=table["grid"],
        block=table["block"],
        smem=table.get("smem", 0),
        cluster=table.get("cluster"),
        seeds=table.get("seeds", [0, 1, 2]),
        completion=table.get("completion", ["late", "eager", "random"]),
        arrays=arrays,
        args=args,
    )
