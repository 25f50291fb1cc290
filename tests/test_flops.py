"""FlopCounterMode counts two FLOP for each multiplication of a GEMM."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from support.op_samples import FUSED, GROUPINGS, QUANTIZERS, grouped, quantized, random
from torchext import ops


def count(function, *arguments, **options) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*arguments, **options)
    return counter.get_total_flops()


@pytest.mark.parametrize("leading", [None, (4, 5), ()], ids=str)
def test_products(leading, device):
    operands = quantized("1d2d", 20, 40, 200, device=device, leading=leading)
    rows = 1 if leading == () else 20
    expected = 2 * rows * 40 * 200
    bias = random(40, device=device).requires_grad_()
    out = torch.empty(*operands[0].shape[:-1], 40, device=device)
    assert count(ops.fp8_gemm_nt, *operands) == expected
    assert count(ops.fp8_gemm_nt, *operands, bias=bias) == expected
    assert count(ops.fp8_gemm_nt, *operands, out=out) == expected
    assert count(torch.ops.torchext.fp8_gemm_nt, *operands) == expected


@pytest.mark.parametrize("case", GROUPINGS)
def test_grouped_products(case, device):
    """Every row counts, also one of no group; masked groups count all their m rows."""
    name, tensors, options = grouped(case, 20, 40, 208, device=device)
    function = getattr(ops, name)
    expected = 2 * 20 * 40 * 208 * (3 if case == "masked" else 1)
    assert count(function, *tensors, **options) == expected
    out = torch.empty_like(function(*tensors, **options))
    assert count(function, *tensors, out=out, **options) == expected


@pytest.mark.parametrize("name, options", FUSED)
def test_fused_products(name, options, device):
    operands = quantized("1d2d", 20, 40, 200, device=device)
    assert count(getattr(ops, name), *operands, **options) == 2 * 20 * 40 * 200


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_multiply_nothing(name, device):
    assert count(getattr(ops, name), random(20, 200, device=device)) == 0
