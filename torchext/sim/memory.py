"""Host arrays as device buffers: copied into one arena with wide gaps, and back."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, TypeGuard, Union

import numpy as np

if TYPE_CHECKING:
    import torch

try:
    from numpy.lib.array_utils import byte_bounds
except ModuleNotFoundError:  # numpy 1
    from numpy import byte_bounds  # type: ignore[attr-defined,no-redef]

Array: TypeAlias = Union[np.ndarray, "torch.Tensor"]

# Bytes between two buffers. Accesses past a buffer land in the gap and are reported; it is wider
# than any plausible overshoot. Nothing touches the gap, so it takes address space but no memory.
GUARD_BYTES = 1 << 20
ALIGNMENT = 256  # bytes; cudaMalloc gives the same


@dataclass(frozen=True)
class View:
    """Part of an allocation on the host.

    Attributes:
        owner: the array or tensor, kept alive.
        base, size: address and bytes of the whole allocation.
        offset, extent: the bytes of the allocation that the view spans.
        shape, strides: in elements.
        dtype: numpy's or torch's name of it.
        itemsize: bytes of an element.
        writable: numpy may forbid writing.
    """

    owner: Array
    base: int
    size: int
    offset: int
    extent: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    itemsize: int
    writable: bool


def is_array(value: object) -> TypeGuard[Array]:
    """Whether `value` is a numpy array or a torch tensor."""
    return isinstance(value, np.ndarray) or _is_tensor(value)


def _is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    return hasattr(value, "untyped_storage") and hasattr(value, "data_ptr")


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """One past the last element, in units of the strides; the first is element 0."""
    return 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def view_of(value: object, what: str) -> View:
    """The View of a numpy array or a torch CPU tensor.

    Raises TypeError for anything else; the message starts with `what`, such as
    "torchext.sim.pointer: array".
    """
    if isinstance(value, np.ndarray):
        return _numpy_view(value, what)
    if not _is_tensor(value):
        raise TypeError(
            f"{what} must be a numpy array or a torch CPU tensor (got {type(value).__name__})"
        )
    if value.device.type != "cpu":
        raise TypeError(
            f"{what} must be on the CPU, where the simulator runs (got a torch tensor on "
            f"{value.device}); call .cpu() first"
        )
    storage, itemsize = value.untyped_storage(), value.element_size()
    return View(
        owner=value,
        base=storage.data_ptr(),
        size=storage.nbytes(),
        offset=int(value.storage_offset()) * itemsize,
        extent=_span(tuple(value.shape), value.stride()) * itemsize,
        shape=tuple(value.shape),
        strides=tuple(value.stride()),
        dtype=str(value.dtype).removeprefix("torch."),
        itemsize=itemsize,
        writable=True,
    )


def _numpy_view(value: np.ndarray, what: str) -> View:
    if value.dtype.hasobject:
        raise TypeError(f"{what} must be an array of numbers (got dtype {value.dtype})")
    if any(stride < 0 or stride % value.itemsize for stride in value.strides):
        raise TypeError(
            f"{what} must have strides that are non-negative multiples of the element size, "
            f"{value.itemsize} bytes (got {value.strides}); pass a copy"
        )
    root = value
    while isinstance(root.base, np.ndarray):
        root = root.base
    low, high = byte_bounds(root)
    strides = tuple(stride // value.itemsize for stride in value.strides)
    return View(
        owner=value,
        base=low,
        size=high - low,
        offset=value.__array_interface__["data"][0] - low,
        extent=_span(value.shape, strides) * value.itemsize,
        shape=value.shape,
        strides=strides,
        dtype=value.dtype.name,
        itemsize=value.itemsize,
        writable=value.flags.writeable,
    )


@dataclass
class _Range:
    begin: int  # in the allocation
    end: int
    access: str
    names: list[str]


@dataclass
class _Allocation:
    base: int
    size: int
    owner: Array
    address: int = 0  # in the arena
    ranges: list[_Range] = field(default_factory=list)

    def add(self, new: _Range) -> None:
        """Adds a range; ranges that overlap become one, with the access of both."""
        apart = []
        for old in self.ranges:
            if old.end <= new.begin or new.end <= old.begin:
                apart.append(old)
                continue
            new = _Range(
                min(old.begin, new.begin),
                max(old.end, new.end),
                old.access if old.access == new.access else "read_write",
                old.names + [name for name in new.names if name not in old.names],
            )
        self.ranges = [*apart, new]

    def check_apart(self, new: _Range, device: int, own: int) -> None:
        """Raises ValueError if a range of this allocation, which is on device `own`, overlaps one
        of another device, unless both are read-only: then each device has a copy."""
        for old in self.ranges:
            if old.end <= new.begin or new.end <= old.begin or old.access == new.access == "read":
                continue
            raise ValueError(
                f"torchext.sim.launch_group: an array must belong to one device (got "
                f"{old.names[0]} on device {own} and {new.names[0]} on device {device}); pass "
                f"window(array, device={own}) to both launches"
            )


class Arena:
    """The device memory of one launch, or of all devices of a group.

    Attributes:
        device: whose memory `add` and `address_of` mean if they are told none.
    """

    def __init__(self) -> None:
        self._allocations: dict[tuple[int, int], _Allocation] = {}  # by address and device
        self._memory: np.ndarray | None = None
        self.device = 0

    def add(self, view: View, access: str, name: str, device: int | None = None) -> None:
        """Registers a view, to be placed with the allocation that it is part of.

        Raises ValueError if another device may write these bytes.
        """
        if view.extent == 0:
            return
        device = self.device if device is None else device
        new = _Range(view.offset, view.offset + view.extent, access, [name])
        for (base, other), allocation in self._allocations.items():
            if base == view.base and other != device:
                allocation.check_apart(new, device, other)
        key = (view.base, device)
        if key not in self._allocations:
            self._allocations[key] = _Allocation(view.base, view.size, view.owner)
        self._allocations[key].add(new)

    def place(self) -> None:
        """Lays the allocations out and copies the host's bytes in."""
        at = GUARD_BYTES
        for allocation in self._allocations.values():
            allocation.address = at
            at += -(-(allocation.size + GUARD_BYTES) // ALIGNMENT) * ALIGNMENT
        self._memory = np.empty(at + ALIGNMENT, np.uint8)
        start = -(-self._memory.__array_interface__["data"][0] // ALIGNMENT) * ALIGNMENT
        for allocation in self._allocations.values():
            allocation.address += start
            for r in allocation.ranges:
                self._copy(allocation, r, to_host=False)

    def address_of(self, view: View, device: int | None = None) -> int:
        """The device address of a view's first byte; 0, as cudaMalloc(0) gives, if it is empty."""
        allocation = self._allocations.get((view.base, self.device if device is None else device))
        return 0 if allocation is None or view.extent == 0 else allocation.address + view.offset

    def buffers(self) -> list[tuple[int, int, str, str]]:
        """(address, bytes, access, name) of every buffer."""
        return [buffer for buffer, _ in self.buffers_of_devices()]

    def buffers_of_devices(self) -> list[tuple[tuple[int, int, str, str], int]]:
        """(what `buffers` has of it, device) of every buffer."""
        return [
            (
                (allocation.address + r.begin, r.end - r.begin, r.access, " and ".join(r.names)),
                device,
            )
            for (_, device), allocation in self._allocations.items()
            for r in allocation.ranges
        ]

    def copy_back(self) -> None:
        """Copies what the kernel may have written to the host arrays."""
        for allocation in self._allocations.values():
            for r in allocation.ranges:
                if r.access != "read":
                    self._copy(allocation, r, to_host=True)

    @staticmethod
    def _copy(allocation: _Allocation, r: _Range, *, to_host: bool) -> None:
        host, device = allocation.base + r.begin, allocation.address + r.begin
        target, source = (host, device) if to_host else (device, host)
        ctypes.memmove(target, source, r.end - r.begin)
