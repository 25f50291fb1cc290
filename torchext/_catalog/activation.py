"""Activations fused with quantization, and their gradients, whose results are specified to the
bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .entry import BITS, E4M3, E5M2, Entry, Sample, random, sample


def special(rows: int, columns: int) -> Tensor:
    """Gates at which exponentials overflow and underflow, zeros, a NaN, an Inf, huge and subnormal
    numbers, each kind in its own scale groups."""
    x = random(rows, columns, dtype=torch.float32)
    x[0] = torch.linspace(-120, 120, columns)
    x[1] = torch.linspace(-14, 14, columns)
    x[2] = 0
    x[3, 5] = torch.nan
    x[4, 133] = torch.inf
    x[5, 7] = -torch.inf
    x[6] *= 1e38
    x[7] *= 1e-40
    return x


def _forward(operands: int, **options: Any) -> Mapping[str, Callable[[], Sample]]:
    """operands: columns of the input for each column of the result."""
    return {
        "ragged": lambda: sample(random(140, operands * 200), **options),
        "e5m2, powers of two": lambda: sample(
            random(67, operands * 129, dtype=torch.float32), dtype=E5M2, pow2_scale=True, **options
        ),
        "special numbers": lambda: sample(special(20, operands * 300), **options),
        "every other element": lambda: sample(
            random(20, operands * 300, dtype=torch.float16)[::2, ::3], **options
        ),
        "stack": lambda: sample(random(2, 5, operands * 48), **options),
        "vector": lambda: sample(random(operands * 130), **options),
        "one element": lambda: sample(random(1, operands), **options),
        "no rows": lambda: sample(random(0, operands * 40), **options),
        "no columns": lambda: sample(random(7, 0), **options),
    }


def _sized(operands: int, **options: Any) -> Callable[[int, int], Sample]:
    return lambda rows, columns: sample(random(rows, operands * columns), **options)


TANH = {"tanh_approximation": True}
POW2 = {"pow2_scale": True}


def _for(name: str, samples: Mapping[str, Callable[[], Sample]]) -> dict[str, Callable[[], Sample]]:
    """All samples for the ops of SwiGLU, some for others: these differ only in their function."""
    some = {"ragged", "e5m2, powers of two", "special numbers", "fp8, ragged", "vector", "no rows"}
    return {k: make for k, make in samples.items() if k in some or name.startswith("silu_mul")}


def forward(name: str, operands: int, results: int) -> Entry:
    """results: FP8 values for each activated element."""
    has_tanh = name.startswith("gelu")
    sized = {"exact" if has_tanh else "matrix": _sized(operands)}
    samples = _for(name, _forward(operands))
    if has_tanh:
        sized["tanh"] = _sized(operands, **TANH)
        tanh = _forward(operands, **TANH)
        samples |= {f"tanh, {label}": tanh[label] for label in ("ragged", "special numbers")}
    return Entry(
        name,
        samples=samples,
        sized=sized,
        shape=lambda x, **_: (math.prod(x.shape[:-1]), x.shape[-1] // operands),
        bytes=lambda rows, columns: (2 * operands + results * (1 + 4 / 128)) * rows * columns,
        flops=lambda rows, columns: 0,
        bound=BITS,
    )


def _backward(operands: int, **options: Any) -> Mapping[str, Callable[[], Sample]]:
    scale_name = "gate_up_scale" if operands == 2 else "x_scale"
    every_result = {"bias_grad": True, "activation_dtype": E4M3, **options}

    def wide(*shape: int, grad: torch.dtype = torch.bfloat16, **more: Any) -> Sample:
        *rows, columns = shape
        x = random(*rows, operands * columns, dtype=grad)
        return sample(random(*shape, dtype=grad), x, **every_result, **more)

    def fp8(rows: int, columns: int, dtype: torch.dtype, grad: torch.dtype) -> Sample:
        x, scale = reference.quantize_1x128(random(rows, operands * columns), dtype=dtype)
        scales = {scale_name: scale}
        return sample(random(rows, columns, dtype=grad), x, **scales, **every_result)

    return {
        "ragged": lambda: wide(140, 208),
        "whole groups": lambda: wide(200, 128, grad=torch.float16),
        "e5m2, powers of two": lambda: wide(67, 129, grad=torch.float32, dtype=E5M2, **POW2),
        "fp8": lambda: fp8(140, 128, E4M3, torch.bfloat16),
        "fp8, ragged": lambda: fp8(20, 203, E5M2, torch.float32),
        "special numbers": lambda: sample(
            random(20, 300, dtype=torch.float32), special(20, operands * 300), **every_result
        ),
        "every other element": lambda: sample(
            random(20, 300)[::2, ::3], random(20, operands * 300)[::2, ::3], **every_result
        ),
        "stack": lambda: wide(2, 5, 48),
        "vector": lambda: wide(130),
        "no rows": lambda: wide(0, 40),
        "no columns": lambda: wide(7, 0),
    }


def _sized_backward(operands: int, **options: Any) -> Callable[[int, int], Sample]:
    return lambda rows, columns: sample(
        random(rows, columns),
        random(rows, operands * columns),
        bias_grad=True,
        activation_dtype=E4M3,
        **options,
    )


def backward(name: str, operands: int) -> Entry:
    has_tanh = name.startswith("gelu")
    sized = {"exact" if has_tanh else "matrix": _sized_backward(operands)}
    samples = _for(name, _backward(operands))
    if has_tanh:
        sized["tanh"] = _sized_backward(operands, **TANH)
        tanh = _backward(operands, **TANH)
        samples |= {f"tanh, {label}": tanh[label] for label in ("ragged", "special numbers")}
    # Bytes of an activated element: its gradient, its operands, their gradients both ways, itself.
    per_element = 2 + 2 * operands + 2 * operands * (1 + 4 / 128) + 1 + 4 / 128
    return Entry(
        name,
        samples=samples,
        sized=sized,
        shape=lambda grad, x, **_: (math.prod(grad.shape[:-1]), grad.shape[-1]),
        bytes=lambda rows, columns: per_element * rows * columns + 4 * operands * columns,
        flops=lambda rows, columns: 0,
        bound=BITS,
    )


ENTRIES = (
    forward("silu_mul_quantize_1x128", operands=2, results=1),
    forward("silu_mul_quantize_1x128_t", operands=2, results=1),
    forward("silu_mul_quantize_1x128_dual", operands=2, results=2),
    forward("gelu_mul_quantize_1x128", operands=2, results=1),
    forward("gelu_mul_quantize_1x128_t", operands=2, results=1),
    forward("gelu_mul_quantize_1x128_dual", operands=2, results=2),
    forward("gelu_quantize_1x128", operands=1, results=1),
    forward("gelu_quantize_1x128_t", operands=1, results=1),
    forward("gelu_quantize_1x128_dual", operands=1, results=2),
    forward("relu2_quantize_1x128", operands=1, results=1),
    forward("relu2_quantize_1x128_t", operands=1, results=1),
    forward("relu2_quantize_1x128_dual", operands=1, results=2),
    backward("silu_mul_backward_quantize_1x128_dual", operands=2),
    backward("gelu_mul_backward_quantize_1x128_dual", operands=2),
    backward("gelu_backward_quantize_1x128_dual", operands=1),
    backward("relu2_backward_quantize_1x128_dual", operands=1),
)
