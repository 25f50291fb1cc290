"""Division by a number as torch's CUDA kernels compute it, emulated on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_DIVISIONS = (_aten.div.Tensor, _aten.div_.Tensor)
# What makes a tensor from numbers alone. It stays on the CPU unless the caller names a device.
_FACTORIES = (_aten.lift_fresh.default, _aten.full.default, _aten.scalar_tensor.default)


class CudaDivision(TorchDispatchMode):
    """Computes x / d as x * (1 / d), rounded twice, if d is a number or a 0-dim CPU tensor.

    The other tensors count as CUDA tensors, and so does what is made from them, such as
    `x.new_full((), d)`. A division by these is rounded once, on the GPU as on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self._on_cpu: list[Tensor] = []

    def __torch_dispatch__(
        self,
        func: Callable,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _DIVISIONS and self._is_cpu_scalar(args[1]):
            x, divisor = args
            wide = torch.promote_types(x.dtype, torch.float32)  # in which the kernel computes
            reciprocal = torch.full((), 1.0, dtype=wide) / torch.full((), divisor, dtype=wide)
            quotient = (x.to(wide) * reciprocal).to(x.dtype)
            return x.copy_(quotient) if func is _aten.div_.Tensor else quotient
        result = func(*args, **(kwargs or {}))
        if func in _FACTORIES and result.dim() == 0:
            self._on_cpu.append(result)
        return result

    def _is_cpu_scalar(self, divisor: Any) -> bool:
        return not isinstance(divisor, Tensor) or any(divisor is t for t in self._on_cpu)
