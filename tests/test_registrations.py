"""Gradients of the ops, in numbers, and where there are none. tests/test_catalog.py has what holds
for every op: fake kernels, opcheck, `out`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from support.op_testing import (
    FUSED,
    M_GROUPINGS,
    QUANTIZERS,
    assert_same,
    grouped,
    metadata,
    overload,
    quantized,
    random,
)
from torchext import ops, reference

# ---- gradients ----


@pytest.mark.parametrize("name", QUANTIZERS)
def test_gradients_stop_at_quantizers(name, device):
    x = random(37, 300, device=device).requires_grad_()
    assert not any(t.requires_grad for t in getattr(ops, name)(x))
    data, scale = getattr(ops, name)(x)[:2]
    if name != "quantize_1x128_t":
        y = ops.dequantize(data, scale, out_dtype=torch.float32)
        with pytest.raises(RuntimeError, match="does not require grad"):
            y.sum().backward()
        (x.float() * y).sum().backward()  # gradients that bypass the quantizer still arrive
        torch.testing.assert_close(x.grad.float(), y, rtol=2**-8, atol=0)


GRANULARITY_OF_SCALES = {
    "1x128": (ops.quantize_1x128, (3, 50, 300)),
    "1x128, one group": (ops.quantize_1x128, (50, 100)),
    "1x128, one row": (ops.quantize_1x128, (300,)),
    "128x128": (ops.quantize_128x128, (150, 300)),
    "128x128, one block row": (ops.quantize_128x128, (20, 300)),
    "rowwise": (ops.quantize_rowwise, (3, 50, 300)),
    "tensorwise": (ops.quantize_tensorwise, (3, 50, 300)),
    "empty": (ops.quantize_1x128, (0, 300)),
    "no columns": (ops.quantize_1x128, (5, 0)),
}


@pytest.mark.parametrize("case", GRANULARITY_OF_SCALES)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_dequantize(case, out_dtype, device):
    quantize, shape = GRANULARITY_OF_SCALES[case]
    data, scale = quantize(random(*shape, device=device))
    scale.requires_grad_()
    weight = torch.randn(shape, device=device)
    (gradient,) = torch.autograd.grad(
        ops.dequantize(data, scale, out_dtype=out_dtype), scale, weight.to(out_dtype)
    )
    scale64 = scale.detach().double().requires_grad_()
    y64 = reference.dequantize(data, scale64, out_dtype=torch.float64)
    (expected,) = torch.autograd.grad(y64, scale64, weight.to(out_dtype).double())
    assert gradient.dtype == torch.float32 and gradient.shape == scale.shape
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("leading", [None, (3, 5), (), (0,)])
@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32])
def test_gradient_of_bias(leading, bias_dtype, device):
    operands = quantized("1d2d", 150, 40, 300, device=device, leading=leading)
    bias = random(40, device=device, dtype=bias_dtype).requires_grad_()
    y = ops.fp8_gemm_nt(*operands, bias=bias, out_dtype=torch.float32)
    weight = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, bias, weight)
    expected = weight.double().reshape(weight.shape[:-1].numel(), 40).sum(0)
    assert gradient.dtype == bias_dtype
    torch.testing.assert_close(
        gradient.double(), expected, rtol=2**-8 if bias_dtype == torch.bfloat16 else 1e-5, atol=1e-4
    )


def in_groups(case, grad, tensors, options):
    """The rows of a gradient that belong to each group."""
    if case == "masked":
        return [rows[:count] for rows, count in zip(grad, tensors[4].tolist(), strict=True)]
    if case == "group ids":
        return [grad[options["group_ids"] == group] for group in range(3)]
    ends = tensors[4].tolist()
    return [grad[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", M_GROUPINGS)
def test_gradient_of_the_bias_of_groups(case, bias_dtype, device):
    """A group's bias gradient is the sum over its rows. Rows of no group (NaN) do not count."""
    name, tensors, options = grouped(case, 150, 40, 200, device=device)
    none: dict[str, Any] = {
        "offsets": slice(140, None),
        "group ids": slice(5, 9),
        "masked": (1, slice(30, None)),
    }
    if case == "offsets":
        tensors[4][2] = 140
    elif case == "group ids":
        options["group_ids"][none[case]] = -1
    else:
        tensors[4][1] = 30
    bias = random(3, 40, device=device, dtype=bias_dtype).requires_grad_()
    y = getattr(ops, name)(*tensors, bias=bias, out_dtype=torch.float32, **options)
    weight = torch.randn_like(y)
    weight[none[case]] = torch.nan
    (gradient,) = torch.autograd.grad(y, bias, weight)
    groups = in_groups(case, weight.double(), tensors, options)
    expected = torch.stack([rows.sum(0) for rows in groups])
    assert gradient.dtype == bias_dtype
    torch.testing.assert_close(
        gradient.double(), expected, rtol=2**-8 if bias_dtype == torch.bfloat16 else 1e-5, atol=1e-4
    )


def test_gradients_stop_at_fused_gemms(device):
    operands = quantized("1d2d", 20, 40, 300, device=device)
    bias = random(40, device=device).requires_grad_()
    for name, options in FUSED:
        outputs = getattr(ops, name)(*operands, bias=bias, **options)
        assert not any(t.requires_grad for t in outputs)


def test_bias_changes_nothing_but_the_gradient(device):
    operands = quantized("1d2d", 20, 40, 300, device=device)
    bias = random(40, device=device)
    without = ops.fp8_gemm_nt(*operands, bias=bias)
    assert_same(ops.fp8_gemm_nt(*operands, bias=bias.clone().requires_grad_()).detach(), without)
    assert not without.requires_grad
    with torch.no_grad():
        assert not ops.fp8_gemm_nt(*operands, bias=bias.clone().requires_grad_()).requires_grad


def test_ops_themselves_have_the_gradients_of_their_functions(device):
    """Ops have their functions' gradients; calls that need none reach below-autograd aliases."""
    a, a_scale, b, b_scale = quantized("1d2d", 20, 40, 300, device=device)
    bias = random(40, device=device).requires_grad_()
    for name, arguments, options, tensor in (
        ("fp8_gemm_nt", (a, a_scale, b, b_scale), {"bias": bias}, bias),
        ("dequantize", (a,), {"scale": a_scale.requires_grad_(), "out_dtype": bias.dtype}, a_scale),
    ):
        y = overload(name)(*arguments, **options)
        (gradient,) = torch.autograd.grad(y.square().sum(), tensor)
        same = getattr(ops, name)(*arguments, **options)
        (expected,) = torch.autograd.grad(same.square().sum(), tensor)
        assert_same(gradient, expected)
        with torch.no_grad():
            assert_same(overload(name)(*arguments, **options), y.detach())
            assert_same(getattr(ops, name)(*arguments, **options), y.detach())


def test_fakes_under_inference_mode(device):
    """Inference tensors have no autograd keys, so their calls do not reach an alias."""
    with torch.inference_mode():
        operands = quantized("1d2d", 12, 40, 200, device=device)
        with FakeTensorMode() as mode:
            fakes = tree_map_only(torch.Tensor, mode.from_tensor, operands)
            fake = overload("fp8_gemm_nt")(*fakes)
            wide = overload("dequantize")(*fakes[:2], out_dtype=torch.float16)
        assert metadata(fake) == metadata(overload("fp8_gemm_nt")(*operands))
        assert metadata(wide) == metadata(ops.dequantize(*operands[:2], out_dtype=torch.float16))


def test_scales_of_a_gemm_get_no_gradient(device):
    a, a_scale, b, b_scale = quantized("1d2d", 20, 40, 300, device=device)
    assert not ops.fp8_gemm_nt(a, a_scale.requires_grad_(), b, b_scale).requires_grad
