"""`torchext.memory_report`: bytes of parameters, of FP8 weights, and of what backward keeps."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .nn.weight_cache import WeightCache


@dataclasses.dataclass(frozen=True)
class ModuleMemory:
    """Bytes of one module, without those of the modules within it.

    Attributes:
        name: the fully qualified name; "" for the model itself.
        kind: the name of its class.
        parameters: bytes of its parameters, those of torchext.nn.FP8Linear included; those that
            modules share count at the first.
        fp8_weights: bytes of FP8 weights that it keeps between forwards, with scales.
        saved: bytes that its forward saved for backward, at the time when the model's total was
            largest. Parameters and kept FP8 weights do not count, and memory that several modules
            save counts at the first that saved it. An FP8 weight that only the graph holds, as on
            CUDA and in compiled code, does count.
    """

    name: str
    kind: str
    parameters: int
    fp8_weights: int
    saved: int


class MemoryReport:
    """What `torchext.memory_report` measured; `print` it for a table.

    Attributes:
        modules: each module that has, keeps or saves anything, in the model's order. Empty until
            the context ends.
    """

    def __init__(self) -> None:
        self.modules: tuple[ModuleMemory, ...] = ()

    @property
    def parameters(self) -> int:
        """Bytes of all parameters."""
        return sum(module.parameters for module in self.modules)

    @property
    def fp8_weights(self) -> int:
        """Bytes of all FP8 weights that layers keep."""
        return sum(module.fp8_weights for module in self.modules)

    @property
    def saved(self) -> int:
        """Bytes of everything saved for backward, when they were most."""
        return sum(module.saved for module in self.modules)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, dicts, strings and numbers."""
        return {
            "parameters": self.parameters,
            "fp8_weights": self.fp8_weights,
            "saved": self.saved,
            "modules": [dataclasses.asdict(module) for module in self.modules],
        }

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict()` as JSON; `indent` as in json.dumps."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("module", "", "parameters", "FP8 weights", "saved for backward")
        ]
        for module in self.modules:
            figures = (module.parameters, module.fp8_weights, module.saved)
            rows.append((module.name or "the model itself", module.kind, *map(_bytes, figures)))
        figures = (self.parameters, self.fp8_weights, self.saved)
        rows.append(("total", "", *map(_bytes, figures)))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )

    def __repr__(self) -> str:
        return (
            f"<MemoryReport: {_bytes(self.parameters)} of parameters, {_bytes(self.fp8_weights)} "
            f"of FP8 weights, {_bytes(self.saved)} saved for backward; print() shows all>"
        )


@contextmanager
def memory_report(model: torch.nn.Module) -> Iterator[MemoryReport]:
    """Measures what `model` keeps for backward within this context, and what it holds:

        with torchext.memory_report(model) as report:
            loss(model(batch)).backward()
        print(report)

    Every tensor that autograd saves counts for the module whose forward is running, by the bytes of
    its memory, until backward frees it. What is saved outside of `model` does not count. Of a
    function under torch.utils.checkpoint only the inputs count, as only they are kept.
    Compiled code counts for the module that was compiled.

    Args:
        model: any module, FP8 or not.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"torchext.memory_report: model must be a torch.nn.Module (got {type(model).__name__})"
            "; pass the model whose memory is to be measured"
        )
    report = MemoryReport()
    saved = _Saved(model)
    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(saved.entering(name)))
        handles.append(module.register_forward_hook(saved.leaving, always_call=True))
    try:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            yield report
    finally:
        for handle in handles:
            handle.remove()
        report.modules = tuple(_modules(model, saved.at_peak()))


class _Saved:
    """Bytes that are saved for backward, by the name of the module that saved them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._running: list[tuple[str, torch.nn.Module]] = []  # the innermost module last
        self._parameters = {_memory(part) for p in model.parameters() for part in _parts(p)}
        self._held: dict[int, tuple[str, int, int]] = {}  # memory: name, bytes, how often saved
        self._bytes: dict[str, int] = {}
        self._total = self._peak = 0
        self._at_peak: dict[str, int] | None = {}  # None while the peak lasts
        self._lock = threading.RLock()  # freeing memory may free an autograd graph

    def entering(self, name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any) -> None:
            if not torch.compiler.is_compiling():
                self._running.append((name, module))

        return hook

    def leaving(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and self._running:
            self._running.pop()

    def pack(self, tensor: Tensor) -> Any:
        if not self._running:
            return tensor
        name, module = self._running[-1]
        cache = module.__dict__.get("_weight_cache")
        kept = {_memory(t) for t in cache.tensors()} if isinstance(cache, WeightCache) else set()
        memory = {
            _memory(part): part.untyped_storage().nbytes()
            for part in _parts(tensor)
            if _memory(part) not in kept and _memory(part) not in self._parameters
        }
        return _Packed(self, name, tensor, memory)

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        return packed.tensor if isinstance(packed, _Packed) else packed

    def hold(self, name: str, memory: dict[int, int]) -> None:
        with self._lock:
            for key, size in memory.items():
                owner, _, times = self._held.get(key, (name, size, 0))
                self._held[key] = (owner, size, times + 1)
                if times == 0:
                    self._bytes[owner] = self._bytes.get(owner, 0) + size
                    self._total += size
            if self._total > self._peak:
                self._peak, self._at_peak = self._total, None

    def release(self, memory: dict[int, int]) -> None:
        with self._lock:
            for key in memory:
                owner, size, times = self._held[key]
                if times > 1:
                    self._held[key] = (owner, size, times - 1)
                    continue
                self.at_peak()
                del self._held[key]
                self._bytes[owner] -= size
                self._total -= size

    def at_peak(self) -> dict[str, int]:
        """Bytes by module when the total was largest."""
        with self._lock:
            if self._at_peak is None:
                self._at_peak = dict(self._bytes)
            return self._at_peak


class _Packed:
    """A saved tensor. It dies when autograd frees it."""

    def __init__(self, saved: _Saved, name: str, tensor: Tensor, memory: dict[int, int]) -> None:
        self.tensor = tensor
        self._saved, self._memory = saved, memory
        saved.hold(name, memory)

    def __del__(self) -> None:
        self._saved.release(self._memory)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with memory that `tensor` consists of."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    elif not is_lazy(tensor):
        yield tensor


def _memory(tensor: Tensor) -> int:
    """Identifies the memory of `tensor` while a tensor uses it."""
    return tensor.untyped_storage()._cdata


def _modules(model: torch.nn.Module, saved: dict[str, int]) -> Iterator[ModuleMemory]:
    seen: set[int] = set()

    def new_bytes(tensors: Iterable[Tensor]) -> int:
        total = 0
        for part in (part for tensor in tensors for part in _parts(tensor)):
            if id(part) not in seen:
                seen.add(id(part))
                total += part.nbytes
        return total

    for name, module in model.named_modules():
        cache = module.__dict__.get("_weight_cache")
        kept = cache.tensors() if isinstance(cache, WeightCache) else []
        figures = (
            new_bytes(module.parameters(recurse=False)),
            sum(tensor.nbytes for tensor in kept),
            saved.get(name, 0),
        )
        if any(figures):
            yield ModuleMemory(name, type(module).__name__, *figures)


def _bytes(count: int) -> str:
    if count < 10_000:
        return f"{count:,} B"
    return f"{count / 1024:,.1f} KiB" if count < 10_000_000 else f"{count / 2**20:,.1f} MiB"
