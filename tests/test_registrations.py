"""What is registered for the ops besides kernels: fake kernels, gradients, opcheck."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils._pytree import tree_map_only

from support.op_samples import (
    BLOCKS,
    CASES,
    FOLDING,
    FUSED,
    GRANULARITIES,
    GROUPINGS,
    M_GROUPINGS,
    MATRICES,
    QUANTIZERS,
    TENSORS,
    assert_same,
    grouped,
    metadata,
    opcheck,
    overload,
    quantized,
    random,
)
from torchext import ops, reference
from torchext._catalog.entry import E5M2

# ---- fake kernels ----


@pytest.mark.parametrize("dtype", [None, E5M2])
@pytest.mark.parametrize("name, shape", CASES)
def test_fakes_of_quantizers_equal_the_kernels(name, shape, dtype, device):
    x = random(*shape, device=device)
    real = overload(name)(x, dtype=dtype)
    with FakeTensorMode() as mode:
        fake = overload(name)(mode.from_tensor(x), dtype=dtype)
    meta = overload(name)(x.to("meta"), dtype=dtype)
    assert metadata(fake) == metadata(real)
    assert [m[:3] for m in metadata(meta)] == [m[:3] for m in metadata(real)]
    assert metadata(getattr(reference, name)(x, dtype=dtype)) == metadata(real)


def symbolic(mode, tensor):
    dynamic: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * tensor.dim())
    return mode.from_tensor(tensor, symbolic_context=dynamic)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_fakes_of_quantizers_keep_sizes_symbolic(name, device):
    """No size becomes a constant, and for the example sizes the strides equal the kernels'."""
    shape = (37, 300) if name in BLOCKS else (3, 37, 300)
    x = random(*shape, device=device)
    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env) as mode:
        fake = overload(name)(symbolic(mode, x))
        assert not shape_env.guards
        assert all(isinstance(t.shape[0], torch.SymInt) for t in fake if t.shape != (1, 1))
        found = [
            (tuple(map(int, t.shape)), tuple(map(int, t.stride())), t.dtype, t.device) for t in fake
        ]
    assert found == metadata(overload(name)(x))


@pytest.mark.parametrize("leading", [None, (3, 4), (), (0,), (2, 0)])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_fake_of_gemm_equals_the_kernel(granularity, leading, device):
    operands = quantized(granularity, 12, 40, 200, device=device, leading=leading)
    for options in ({}, {"out_dtype": torch.float32}):
        real = overload("fp8_gemm_nt")(*operands, **options)
        with FakeTensorMode() as mode:
            fakes = tree_map_only(torch.Tensor, mode.from_tensor, operands)
            fake = overload("fp8_gemm_nt")(*fakes, **options)
        assert metadata(fake) == metadata(real)
        assert real.is_contiguous()
        assert real.shape == (*operands[0].shape[:-1], 40)


@pytest.mark.parametrize("shape", [(12, 40, 200), (0, 40, 200), (12, 0, 200), (12, 40, 0)])
@pytest.mark.parametrize("case", GROUPINGS)
def test_fakes_of_grouped_gemms_equal_the_kernels(case, shape, device):
    name, tensors, options = grouped(case, *shape, device=device)
    for out_dtype in (None, torch.float32):
        real = overload(name)(*tensors, out_dtype=out_dtype, **options)
        with FakeTensorMode() as mode:
            fakes = tree_map_only(torch.Tensor, mode.from_tensor, (tensors, options))
            fake = overload(name)(*fakes[0], out_dtype=out_dtype, **fakes[1])
        assert metadata(fake) == metadata(real)
        assert real.is_contiguous()


@pytest.mark.parametrize("leading", [None, (3, 4), (), (0,), (2, 0)])
@pytest.mark.parametrize("name, options", FUSED)
def test_fakes_of_fused_gemms_equal_the_kernels(name, options, leading, device):
    for n in (300, 40, 0):
        operands = quantized("1d2d", 12, n, 200, device=device, leading=leading)
        for dtype in (None, E5M2):
            real = overload(name)(*operands, dtype=dtype, **options)
            with FakeTensorMode() as mode:
                fakes = tree_map_only(torch.Tensor, mode.from_tensor, operands)
                fake = overload(name)(*fakes, dtype=dtype, **options)
            assert metadata(fake) == metadata(real)
            assert metadata(getattr(reference, name)(*operands, dtype=dtype, **options)) == (
                metadata(real)
            )


@pytest.mark.parametrize("shape", MATRICES + TENSORS)
def test_fake_of_dequantize_equals_the_kernel(shape, device):
    data, scale = ops.quantize_1x128(random(*shape, device=device))
    for out_dtype in (torch.bfloat16, torch.float16, torch.float32):
        real = ops.dequantize(data, scale, out_dtype=out_dtype)
        with FakeTensorMode() as mode:
            fake = overload("dequantize")(
                mode.from_tensor(data), mode.from_tensor(scale), out_dtype=out_dtype
            )
        assert metadata(fake) == metadata(real)
        assert real.is_contiguous()


# ---- opcheck ----


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize(
    "make",
    [
        lambda device: (random(37, 300, device=device).requires_grad_(), {}),
        lambda device: (
            random(128, 256, device=device, dtype=torch.float32),
            {"dtype": E5M2, "pow2_scale": True},
        ),
        lambda device: (random(48, 33, device=device, dtype=torch.float16).t(), {}),
        lambda device: (random(60, 40, device=device)[::2, ::3].requires_grad_(), {}),
    ],
    ids=["ragged", "e5m2", "transposed", "strided"],
)
def test_opcheck_quantizers(name, make, device):
    x, options = make(device)
    opcheck(overload(name), (x,), options)


@pytest.mark.parametrize("name", FOLDING)
@pytest.mark.parametrize("shape", [(2, 5, 200), (70,)])
def test_opcheck_quantizers_of_other_ranks(name, shape, device):
    opcheck(overload(name), (random(*shape, device=device),))


@pytest.mark.parametrize(
    "quantize", [ops.quantize_1x128, ops.quantize_128x128, ops.quantize_rowwise]
)
@pytest.mark.parametrize("differentiable", [False, True])
def test_opcheck_dequantize(quantize, differentiable, device):
    data, scale = quantize(random(150, 300, device=device))
    opcheck(
        overload("dequantize"),
        (data, scale.requires_grad_(differentiable)),
        {"out_dtype": torch.float32},
    )


# opcheck clones its arguments, and a clone has no padding between rows. Hence these sizes need no
# padding: K is a multiple of 16, M and N are multiples of 4.
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("leading", [None, (2, 4)])
def test_opcheck_gemm(granularity, leading, device):
    operands = quantized(granularity, 20, 40, 208, device=device, leading=leading)
    bias = random(40, device=device).requires_grad_()
    gemm = overload("fp8_gemm_nt")
    opcheck(gemm, operands)
    opcheck(gemm, operands, {"bias": bias, "out_dtype": torch.float32})


@pytest.mark.parametrize("accumulate", [False, True])
def test_opcheck_gemm_out(accumulate, device):
    operands = quantized("1d2d", 20, 40, 208, device=device)
    out = random(20, 40, device=device, dtype=torch.float32)
    opcheck(overload("fp8_gemm_nt", "out"), operands, {"out": out, "accumulate": accumulate})


@pytest.mark.parametrize("case", GROUPINGS)
def test_opcheck_grouped_gemms(case, device):
    for granularity in GRANULARITIES:
        name, tensors, options = grouped(case, 20, 40, 208, device=device, granularity=granularity)
        opcheck(overload(name), tensors, options)
        if case in M_GROUPINGS:
            options["bias"] = random(3, 40, device=device).requires_grad_()
            opcheck(overload(name), tensors, {**options, "out_dtype": torch.float32})


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("case", GROUPINGS)
def test_opcheck_grouped_gemms_out(case, accumulate, device):
    name, tensors, options = grouped(case, 20, 40, 208, device=device)
    out = torch.randn_like(overload(name)(*tensors, **options))
    options.update(out=out, accumulate=accumulate)
    opcheck(overload(name, "out"), tensors, options)


@pytest.mark.parametrize("name, options", FUSED)
def test_opcheck_fused_gemms(name, options, device):
    operands = quantized("1d2d", 20, 32, 208, device=device)
    bias = random(32, device=device)
    opcheck(overload(name), operands, options)
    opcheck(overload(name), operands, {**options, "bias": bias, "dtype": E5M2, "pow2_scale": True})


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


# ---- out= ----


def test_writing_out_is_seen_by_autograd(device):
    operands = quantized("1d2d", 20, 40, 300, device=device)
    out = torch.ones(20, 40, device=device)
    x = torch.ones(20, 40, device=device, requires_grad=True)
    loss = (x * out).sum()  # saves out
    version = out._version
    ops.fp8_gemm_nt(*operands, out=out)
    assert out._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_out_under_inference_mode(device):
    with torch.inference_mode():
        operands = quantized("1d2d", 20, 40, 300, device=device)
        out = torch.empty(20, 40, device=device)
        ops.fp8_gemm_nt(*operands, out=out)
    assert_same(ops.fp8_gemm_nt(*operands, out=out.clone()), out)


@pytest.mark.parametrize("which", ["out", "bias"])
def test_out_refuses_gradients(which, device):
    operands = quantized("1d2d", 20, 40, 300, device=device)
    tensors = {
        "out": torch.zeros(20, 40, device=device),
        "bias": torch.zeros(40, device=device),
    }
    tensors[which].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{which} must not require a gradient"):
        ops.fp8_gemm_nt(*operands, **tensors)
    with torch.no_grad():
        ops.fp8_gemm_nt(*operands, **tensors)


@pytest.mark.parametrize("case", GROUPINGS)
def test_out_of_grouped_gemms(case, device):
    """Autograd sees the write, and gradients are refused."""
    name, tensors, options = grouped(case, 20, 40, 300, device=device)
    function = getattr(ops, name)
    expected = function(*tensors, **options)
    out = torch.full_like(expected, torch.nan)
    version = out._version
    assert function(*tensors, out=out, **options) is out
    assert out._version == version + 1
    assert_same(out, expected)
    refused = [("out", torch.zeros_like(out).requires_grad_())]
    if case in M_GROUPINGS:
        refused.append(("bias", torch.zeros(3, 40, device=device).requires_grad_()))
    for argument, tensor in refused:
        arguments = {"out": out, **options, argument: tensor}
        with pytest.raises(RuntimeError, match=f"{argument} must not require a gradient"):
            function(*tensors, **arguments)
        with torch.no_grad():
            function(*tensors, **arguments)
