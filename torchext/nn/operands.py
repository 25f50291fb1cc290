"""Which inputs and parameters a layer takes, and what it says of others."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fit(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the layer takes them: by shape, device and dtype."""
    return (
        input.dim() > 0
        and input.shape[-1] == weight.shape[1]
        and input.device == weight.device
        and input.dtype in _WIDE_DTYPES
        and weight.dtype in _WIDE_DTYPES
        and (bias is None or bias.dtype in _WIDE_DTYPES)
    )


def misfit(input: Tensor, weight: Tensor, bias: Tensor | None) -> Exception:
    """The error for operands that do not fit."""
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        return RuntimeError(
            f"torchext.nn.Linear: input: expected shape [..., {weight.shape[1]}] for a weight of "
            f"shape {list(weight.shape)}; got {list(input.shape)}; its last dimension must be "
            "in_features"
        )
    if input.device != weight.device:
        return RuntimeError(
            f"torchext.nn.Linear: input: expected device {weight.device}, where the weight is; got "
            f"{input.device}; move one of them with .to()"
        )
    tensors = {"input": input, "weight": weight, "bias": bias}
    name, dtype = next(
        (name, tensor.dtype)
        for name, tensor in tensors.items()
        if tensor is not None and tensor.dtype not in _WIDE_DTYPES
    )
    return TypeError(
        f"torchext.nn.Linear: {name}: expected torch.float32, torch.bfloat16 or torch.float16; got "
        f"{dtype}; convert it with .to()"
    )
