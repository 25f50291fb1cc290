"""Operands for tests of fp8_linear: an x that is not quantized, and an FP8 weight."""

from __future__ import annotations

import torch

from support.gemm_testing import E4M3, Operand, unquantized
from torchext import ops

BLOCKS, GROUPS, ROWS, WHOLE = GRANULARITIES = ["blocks", "1x128", "rowwise", "tensorwise"]
QUANTIZERS = {
    BLOCKS: ops.quantize_128x128,
    GROUPS: ops.quantize_1x128,
    ROWS: ops.quantize_rowwise,
    WHOLE: ops.quantize_tensorwise,
}


def quantize(granularity, w, dtype=E4M3):
    return Operand.of(*QUANTIZERS[granularity](w, dtype=dtype), 128 if granularity == BLOCKS else 1)


def operands(
    granularity, m, n, k, device, *, dtype=torch.bfloat16, fp8=E4M3
) -> tuple[torch.Tensor, Operand]:
    kind = {BLOCKS: "1d2d", GROUPS: "1d1d"}.get(granularity, granularity)
    x, w = (unquantized(kind, (rows, k)).to(device) for rows in (m, n))
    return x.to(dtype), quantize(granularity, w, fp8)
