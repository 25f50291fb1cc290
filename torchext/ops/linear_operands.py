"""Checks of the inputs and parameters of torchext.nn.Linear, and its error messages."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from .._dispatch.errors import python_error

_WIDE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fit(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the layer accepts the operands' shapes, devices and dtypes.

    The GEMM checks the shape and device of bias.
    """
    return (
        input.dim() > 0
        and input.shape[-1] == weight.shape[1]
        and input.device == weight.device
        and input.dtype in _WIDE_DTYPES
        and weight.dtype in _WIDE_DTYPES
        and (bias is None or bias.dtype in _WIDE_DTYPES)
    )


def bias_fits(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether bias has a value for each row of weight, on the same device."""
    return bias is None or (
        bias.dim() == 1 and bias.shape[0] == weight.shape[0] and bias.device == weight.device
    )


def misfit(input: Tensor, weight: Tensor, bias: Tensor | None) -> Exception:
    """The error for operands for which `fit` or `bias_fits` is false."""
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        return RuntimeError(
            f"torchext.nn.Linear: input must have shape [..., {weight.shape[1]}] for a weight of "
            f"shape {list(weight.shape)} (got {list(input.shape)}); make its last dimension "
            "in_features"
        )
    if input.device != weight.device:
        return RuntimeError(
            f"torchext.nn.Linear: input must be on device {weight.device}, where the weight is "
            f"(got {input.device}); move one of them with .to()"
        )
    tensors = {"input": input, "weight": weight, "bias": bias}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _WIDE_DTYPES:
            return TypeError(
                f"torchext.nn.Linear: {name} must be torch.float32, torch.bfloat16 or "
                f"torch.float16 (got {tensor.dtype}); convert it with .to()"
            )
    assert bias is not None
    if bias.device != weight.device:
        return RuntimeError(
            f"torchext.nn.Linear: bias must be on device {weight.device}, where the weight is (got "
            f"{bias.device}); move one of them with .to()"
        )
    return RuntimeError(
        f"torchext.nn.Linear: bias must have shape [{weight.shape[0]}] for a weight of shape "
        f"{list(weight.shape)} (got {list(bias.shape)}); pass one value for each of out_features"
    )


def layer_error(
    error: RuntimeError, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Exception:
    """`error`, which an op raised in the layer's forward, as an error of the layer."""
    if bias_fits(weight, bias):
        return named_after_layer(error)
    return misfit(input, weight, bias)


def named_after_layer(error: RuntimeError) -> Exception:
    """An op's `error` as the class that its message names, with the layer's name in front.

    Errors whose message names no class are returned unchanged.
    """
    converted = python_error(error)
    if converted is error:
        return error
    # The user passed bias, so the op's name in front of it is noise. The layer made all other
    # arguments of the op.
    message = re.sub(r"^\w+: (?=bias )", "", str(converted))
    if not message.startswith("torchext.nn.Linear"):
        message = f"torchext.nn.Linear: {message}"
    return type(converted)(message)
