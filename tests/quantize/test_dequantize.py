"""dequantize, bit for bit: every code and granularity, rounding to the output's dtype, strides."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import torchext  # noqa: F401  (loads the ops)
from support import reference
from torchext._catalog.entry import E4M3, E5M2

WIDE = [torch.bfloat16, torch.float16, torch.float32]


def dequantize(data, scale, out_dtype):
    return torch.ops.torchext.dequantize(data, scale, out_dtype=out_dtype)


def expected(data, scale, row_group, column_group, out_dtype):
    """data * scale in FP32, rounded once to `out_dtype`. row_group, column_group: the rows and
    columns that share a scale, stated rather than inferred."""
    codes = data.view(torch.uint8).reshape(math.prod(data.shape[:-1]), data.shape[-1]).cpu().numpy()
    scales = scale.reshape(math.prod(scale.shape[:-1]), scale.shape[-1]).cpu().numpy()
    values = reference.FORMATS[data.dtype].decode(codes)
    rows, columns = np.indices(codes.shape)
    with np.errstate(all="ignore"):
        product = values * scales[rows // row_group, columns // column_group]
    assert product.dtype == np.float32
    return torch.from_numpy(product).to(out_dtype).reshape(data.shape)


def check(data, scale, row_group, column_group, out_dtype=torch.float32):
    y = dequantize(data, scale, out_dtype)
    want = expected(data, scale, row_group, column_group, out_dtype)
    assert y.dtype == out_dtype
    assert y.shape == data.shape
    assert y.is_contiguous()
    bits = torch.int32 if out_dtype == torch.float32 else torch.int16
    y = y.cpu()
    assert torch.equal(y.isnan(), want.isnan())
    number = ~want.isnan()  # a NaN's payload does not matter
    assert torch.equal(y.view(bits)[number], want.view(bits)[number])


def codes(shape, fp8, device):
    return torch.randint(0, 256, shape, dtype=torch.uint8).to(device).view(fp8)


def scales(shape, device):
    return torch.rand(shape).mul(3).add(0.1).to(device)


@pytest.mark.parametrize("out_dtype", WIDE)
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_every_code_under_hostile_scales(fp8, out_dtype, device):
    data = torch.arange(256, dtype=torch.uint8).view(fp8).to(device)
    hard = [
        1,
        0,
        -0.0,
        -1.5,
        1 / 3,
        2.0**-126,
        2.0**-149,
        2.0**-30,
        *(-1.3 * 2.0**-111, 1.7 * 2.0**-111, 1.7 * 2.0**-110, 1.7 * 2.0**109, 1.7 * 2.0**110),
        1.01 * 2.0**-30,
        1e30,
        3.4e38,
        math.inf,
        math.nan,
    ]
    scale = torch.tensor(hard, device=device)[:, None]
    check(data.expand(len(hard), 256).contiguous(), scale, 1, 256, out_dtype)
    for value in hard:
        check(
            data,
            torch.tensor([value, -value], dtype=torch.float32, device=device),
            1,
            128,
            out_dtype,
        )


@pytest.mark.every_architecture(kernels=["quantize_*"])
@pytest.mark.parametrize("out_dtype", WIDE)
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(130, 300), (5, 48), (1, 129), (2, 1), (128, 128), (200, 3)])
def test_granularities(shape, fp8, out_dtype, device):
    rows, columns = shape
    groups, blocks = -(-columns // 128), -(-rows // 128)
    data = codes(shape, fp8, device)
    check(data, scales((rows, groups), device), 1, 128, out_dtype)
    check(data, scales((blocks, groups), device), 128, 128, out_dtype)
    check(data, scales((rows, 1), device), 1, columns, out_dtype)
    check(data, scales((1, 1), device), rows, columns, out_dtype)


def test_one_row_takes_a_scale_of_groups_or_of_blocks(device):
    data = codes((1, 300), E4M3, device)
    check(data, scales((1, 3), device), 1, 128)


@pytest.mark.parametrize("shape", [(300,), (3, 7, 129), (2, 3, 1, 16), (1, 1, 1)])
def test_leading_dimensions(shape, device):
    x = torch.randn(shape, device=device)
    columns = shape[-1]
    check(*torch.ops.torchext.quantize_1x128(x), 1, 128)
    check(*torch.ops.torchext.quantize_rowwise(x), 1, columns)
    check(*torch.ops.torchext.quantize_tensorwise(x), math.prod(shape[:-1]), columns)


@pytest.mark.parametrize("shape", [(0, 40), (7, 0), (0, 0), (0,), (2, 0, 24), (2, 3, 0)])
def test_empty(shape, device):
    for name in ("quantize_1x128", "quantize_rowwise", "quantize_tensorwise"):
        data, scale = getattr(torch.ops.torchext, name)(torch.ones(shape, device=device))
        y = dequantize(data, scale, torch.bfloat16)
        assert (y.shape, y.dtype) == (shape, torch.bfloat16)


def test_strides(device):
    data, scale = codes((300, 400), E4M3, device), scales((300, 400), device)
    check(data[:130, 5:205], scale[:130, 7:9], 1, 128)
    check(data[:200, :130].t(), scale[:2, :130].t(), 1, 128)
    check(data[::3, ::2], scale[:100, :2], 1, 128)
    check(data[:1].expand(130, 400), scale[:130, :4], 1, 128)
    check(data[:130, :256], scale[:1, :2].expand(130, 2), 1, 128)
    check(data[:, :256], scale[0, 0].expand(3, 2), 128, 128)
    check(data, scale[::3, ::100].t()[:3, :4], 128, 128)


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", WIDE)
def test_round_trip_is_within_half_a_place(dtype, fp8, device):
    """The error is at most half a unit in the last place: of the element, or of the smallest FP8
    value times the scale."""
    x = torch.randn(64, 300, device=device).to(dtype)
    data, scale = torch.ops.torchext.quantize_1x128(x, dtype=fp8)
    error = (dequantize(data, scale, torch.float32) - x.float()).abs()
    relative, least = {E4M3: (2.0**-4, 2.0**-10), E5M2: (2.0**-3, 2.0**-17)}[fp8]
    allowed = (x.float().abs() * relative).maximum(scale.repeat_interleave(128, 1)[:, :300] * least)
    assert (error <= allowed * 1.001).all()


def test_errors(device):
    data, scale = codes((4, 300), E4M3, device), scales((4, 3), device)

    def refused(kind, message, data=data, scale=scale, out_dtype=torch.float32):
        with pytest.raises(RuntimeError, match=rf"^dequantize: .*{message}.*\[{kind}\]$"):
            dequantize(data, scale, out_dtype)

    refused("TypeError", "data must be .*got torch.float32", data=data.float())
    refused("TypeError", "scale must be torch.float32 .*got torch.float64", scale=scale.double())
    refused("TypeError", "out_dtype must be .*got torch.float64", out_dtype=torch.float64)
    refused("ValueError", r"at least one dimension", data=data[0, 0])
    for shape in [(4, 2), (3, 3), (2, 1), (12,), (4, 300), (1, 4, 3, 1)]:
        wanted = r"\[4, 3\] \(1x128\), \[1, 3\] \(128x128\), \[4, 1\] \(row-wise\) or \[1, 1\]"
        refused("ValueError", wanted, scale=torch.ones(shape, device=device))
    cube = codes((4, 5, 300), E4M3, device)
    refused(
        "ValueError", r"fold.*\.contiguous\(\)", data=cube[:, :3], scale=scales((12, 3), device)
    )
    if device.type == "cuda":
        refused("ValueError", r"scale must be on the device of data", scale=scale.cpu())


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_products_are_rounded_to_float32_on_the_way(out_dtype, device):
    """Among many scales, some give products with 13 so near a tie that rounding through FP32 and
    rounding once differ. The op rounds through FP32."""
    scale = torch.rand(1 << 20) + 0.5
    product = scale.double() * 13
    nearest = product.float()
    # FP32 rounded to odd, then rounded to out_dtype, equals the product rounded once.
    toward_zero = nearest.view(torch.int32) - (nearest.double() > product).int()
    odd = torch.where(nearest.double() == product, toward_zero, toward_zero | 1)
    differ = nearest.to(out_dtype) != odd.view(torch.float32).to(out_dtype)
    assert differ.sum() >= 2
    scale = scale[differ][:, None].to(device)
    data = torch.full((len(scale), 1), 13.0).to(E4M3).to(device)
    check(data, scale, 1, 1, out_dtype)
