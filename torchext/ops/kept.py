"""Private ops that quantize and multiply the operands that a compiled layer keeps for backward.

These operands have the layout of csrc/linear/kept.h: dense tensors, because a compiled graph fixes
strides.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._dispatch.batching import BatchDims, Call, as_products_read, each, each_quantized
from .._dispatch.declaration import declare
from .._dispatch.flops import product_flops
from .._dispatch.layout import GROUP, ceil_div, leading_sizes, round_up
from .._dispatch.sharding_rules import replicated
from . import quantize

Dtype = torch.dtype | None
_OF_LAYERS = "compiled layers call it with plain tensors"


def _fake_quantize(
    x: Tensor, granularity: int, *, dtype: Dtype = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = math.prod(leading_sizes(x)), x.shape[-1]
    quantizers = (
        quantize.quantize_1x128,
        quantize.quantize_rowwise,
        quantize.quantize_tensorwise,
    )
    data, scale = quantizers[granularity](x, dtype=dtype)
    kept_scale = ((ceil_div(rows, GROUP), round_up(columns, 4)), (1, columns), (1, 1))[granularity]
    kept = data.new_empty((columns, round_up(rows, 16)))
    return data, scale, kept, scale.new_empty(kept_scale)


declare(
    "_quantize_kept",
    fake=_fake_quantize,
    flops=None,
    batching=each_quantized,
    sharding=replicated("_quantize_kept", _OF_LAYERS),
)


def _fake_quantize_blocks(
    x: Tensor, *, dtype: Dtype = None, pow2_scale: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    data, scale = quantize.quantize_128x128(x, dtype=dtype)
    return data, scale, data.new_empty((x.shape[1], round_up(x.shape[0], 16)))


declare(
    "_quantize_128x128_kept",
    fake=_fake_quantize_blocks,
    flops=None,
    batching=each_quantized,
    sharding=replicated("_quantize_128x128_kept", _OF_LAYERS),
)


def _fake_product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, out_dtype: Dtype = None
) -> Tensor:
    return a.new_empty((*leading_sizes(a), b.shape[0]), dtype=out_dtype or torch.bfloat16)


def _each_product(call: Call, size: int, dims: BatchDims, *operands: Any) -> tuple[Any, Any]:
    def product(a: Tensor, a_scale: Tensor, *rest: Any) -> Any:
        return call(*as_products_read(a, a_scale), *rest)  # b has kept.h's layout

    return each(product, size, dims, *operands)


declare(
    "_fp8_gemm_nt_kept",
    fake=_fake_product,
    flops=product_flops,
    batching=_each_product,
    sharding=replicated("_fp8_gemm_nt_kept", _OF_LAYERS),
)
