"""Norms that quantize what they return for the FP8 layers that read it."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from ..ops import shared_in_graph as _shared_in_graph  # noqa: F401  (rules for traced graphs)
from ..ops.norm_function import Norm, NormFunction, normed
from ..ops.shared_input import Form, Readers, offer
from .composition import is_composed, is_composed_in_graph

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_GUESS = Form(torch.float8_e4m3fn, pow2_scale=False, transposed=True)
_WITHOUT_READERS = _GUESS._replace(transposed=False)


class ReadersByMode:
    """Those of forwards with gradients, and of those without, which never need a transpose."""

    def __init__(self, guess: Form = _GUESS) -> None:
        self._with_gradients = Readers(guess)
        self._without = Readers(guess._replace(transposed=False))

    def current(self) -> Readers:
        return self._with_gradients if torch.is_grad_enabled() else self._without


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm whose result need not be quantized by the FP8 layers that read it.

    y = x / sqrt(mean(x**2) + eps) * weight, in FP32, rounded to x's dtype; with `unit_offset`,
    times 1 + weight.

    A layer such as q, k, v or a SwiGLU that is called with the very tensor that this layer returned
    finds it quantized with 1x128 scales, by the kernel that computed it. The bits are those that
    the layer would quantize. The norm learns from each forward what the layers need in the next.
    For backward it keeps x and one FP32 value for each row.

    Parameters (`weight` [K]) and `state_dict` keys are those of torch.nn.RMSNorm.
    """

    def __init__(
        self,
        normalized_shape: Any,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        unit_offset: bool = False,
    ) -> None:
        """Allocates and initializes the weight, as torch.nn.RMSNorm does.

        Args:
            normalized_shape, eps, elementwise_affine, device, dtype: as for torch.nn.RMSNorm.
            unit_offset: multiply by 1 + weight, as Gemma does; the weight starts as zeros.
        """
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.unit_offset = unit_offset
        self.reset_parameters()
        self._readers = ReadersByMode()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.elementwise_affine and getattr(self, "unit_offset", False):
            torch.nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The normed x, of its shape and dtype.

        It is computed by torch.nn.functional.rms_norm, and not quantized, if x is not contiguous or
        empty, if normalized_shape has several dimensions, without a weight, under autocast if x is
        not FP32, and under torch.export, other tracers and transforms. Under torch.compile the same
        kernel runs. If gradients are on there, layers that read the result quantize it themselves.

        Args:
            x: [..., K], FP32, BF16 or FP16; others as for torch.nn.RMSNorm.

        Raises:
            RuntimeError: as torch.nn.RMSNorm's forward.
        """
        config = Norm("rms_norm", rms_eps(self.eps), self.unit_offset)
        y = fused_norm(config, self.weight, None, self._readers, x)
        if y is not None:
            return y
        if not self.unit_offset or self.weight is None:
            return super().forward(x)
        weight = 1 + self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, weight, config.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", unit_offset=True" if self.unit_offset else "")


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm whose result need not be quantized by the FP8 layers that read it.

    As torchext.nn.RMSNorm. For backward it keeps x and two FP32 values for each row.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """Allocates and initializes the parameters. Arguments are those of torch.nn.LayerNorm."""
        super().__init__(*args, **options)
        self._readers = ReadersByMode()

    def forward(self, input: Tensor) -> Tensor:
        """The normed input, of its shape and dtype.

        It is computed by torch.nn.functional.layer_norm, and not quantized, where RMSNorm's forward
        says.

        Raises:
            RuntimeError: as torch.nn.LayerNorm's forward.
        """
        config = Norm("layer_norm", self.eps, False)
        y = fused_norm(config, self.weight, self.bias, self._readers, input)
        return super().forward(input) if y is None else y


def rms_eps(eps: float | None) -> float:
    """The eps of a torch.nn.RMSNorm whose attribute is `eps`. PyTorch computes in FP32."""
    return torch.finfo(torch.float32).eps if eps is None else eps


def fused_norm(
    config: Norm,
    weight: Tensor | None,
    bias: Tensor | None,
    readers_by_mode: ReadersByMode,
    x: Tensor,
) -> Tensor | None:
    """The normed x, offered to FP8 layers; None if it cannot be computed so."""
    if weight is None or not _can_fuse(weight, bias, x):
        return None
    wanted = None
    if not torch.compiler.is_compiling():
        readers = readers_by_mode.current()
        wanted = readers.wanted()
    form = wanted or _WITHOUT_READERS
    needs_graph = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if needs_graph:
        operands: list[Any] = []
        keep = None if wanted is None else operands.append
        y = cast("Tensor", NormFunction.apply(x, weight, bias, config, form, keep))
        operand = operands.pop() if operands else None
    else:
        y, _, operand = normed(config, x, weight, bias, form)
    if wanted is not None and operand is not None:
        offer(y, readers, form, operand)
    return y


def _can_fuse(weight: Tensor, bias: Tensor | None, x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        if is_composed_in_graph():
            return False
    elif is_composed() or torch._C._len_torch_function_stack():
        return False
    if type(x) is not Tensor or x.is_nested:
        return False
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else None
    if device is None or x.dtype not in _FLOATS:
        return False
    if x.dtype is not torch.float32 and torch.is_autocast_enabled(device):
        return False  # whether the result is FP32 depends on the kind of norm and on the device
    columns = x.shape[-1:]
    return (
        x.numel() > 0
        and x.is_contiguous()
        and all(
            type(p) is Parameter
            and p.shape == columns
            and p.device == x.device
            and p.dtype in _FLOATS
            and p.is_contiguous()
            for p in (weight, bias)
            if p is not None
        )
    )
