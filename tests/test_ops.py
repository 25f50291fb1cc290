"""The ops as Python functions: their signatures, the layout of what they return, torch.compile."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from support.op_samples import (
    FUSED,
    GRANULARITIES,
    GROUPINGS,
    M_GROUPINGS,
    QUANTIZERS,
    assert_same,
    grouped,
    overload,
    quantized,
    random,
)
from torchext import ops, reference
from torchext._catalog.entry import E4M3, E5M2


def registered_ops():
    """The names of the public ops; an underscore marks aliases and private ops."""
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    prefix = "torchext::"
    public = {n.removeprefix(prefix) for n in names if n.startswith(prefix)}
    return sorted(name for name in public if not name.startswith("_"))


def test_every_op_has_a_function_and_a_reference():
    assert registered_ops() == sorted(ops.OPS)
    for name in ops.OPS:
        assert callable(getattr(reference, name))


@pytest.mark.parametrize("name", ops.OPS)
def test_functions_have_the_arguments_of_their_schemas(name):
    signature = inspect.signature(getattr(ops, name))
    packet = getattr(torch.ops.torchext, name)
    schemas = [getattr(packet, which)._schema for which in packet.overloads()]
    expected = {a.name: a.kwarg_only for schema in schemas for a in schema.arguments}
    given = {
        p.name: p.kind is inspect.Parameter.KEYWORD_ONLY for p in signature.parameters.values()
    }
    assert given == expected
    for schema in schemas:
        for argument in schema.arguments:
            default = signature.parameters[argument.name].default
            if argument.has_default_value():
                assert default == argument.default_value
            elif argument.name != "out":  # only the out overload has this argument
                assert default is inspect.Parameter.empty


# ---- layout ----


@pytest.mark.parametrize("name", ["quantize_1x128", "quantize_rowwise", "quantize_tensorwise"])
def test_layout_of_data_and_scales(name, device):
    """The documented strides, written out, so that kernel and fake cannot drift together."""
    data, scale = getattr(ops, name)(random(3, 7, 300, device=device))
    assert data.shape == (3, 7, 300) and data.stride() == (7 * 304, 304, 1)
    assert data.dtype == E4M3 and scale.dtype == torch.float32
    shape, strides = {
        "quantize_1x128": ((3, 7, 3), (7, 1, 24)),
        "quantize_rowwise": ((3, 7, 1), (7, 1, 1)),
        "quantize_tensorwise": ((1, 1), (1, 1)),
    }[name]
    assert scale.shape == shape and scale.stride() == strides


def test_layout_of_the_transpose(device):
    data, scale, data_t, scale_t = ops.quantize_1x128_dual(random(3, 7, 300, device=device))
    assert data.stride() == (7 * 304, 304, 1) and scale.stride() == (7, 1, 24)
    assert data_t.shape == (300, 21) and data_t.stride() == (32, 1)
    assert scale_t.shape == (300, 1) and scale_t.stride() == (1, 300)


def test_layout_of_blocks(device):
    data, scale, data_t = ops.quantize_128x128_dual(random(130, 300, device=device), dtype=E5M2)
    assert data.shape == (130, 300) and data.stride() == (304, 1) and data.dtype == E5M2
    assert scale.shape == (2, 3) and scale.stride() == (3, 1)
    assert data_t.shape == (300, 130) and data_t.stride() == (144, 1) and data_t.dtype == E5M2


def test_layout_of_stacked_blocks(device):
    data, scale, data_t = ops.quantize_128x128_dual(random(2, 3, 130, 300, device=device))
    assert data.shape == (2, 3, 130, 300)
    assert data.stride() == (3 * 130 * 304, 130 * 304, 304, 1)
    assert scale.shape == (2, 3, 2, 3) and scale.is_contiguous()
    assert data_t.shape == (2, 3, 300, 130)
    assert data_t.stride() == (3 * 300 * 144, 300 * 144, 144, 1)


@pytest.mark.parametrize("name, options", FUSED)
def test_layout_of_fused_outputs(name, options, device):
    operands = quantized("1d2d", 0, 300, 200, device=device, leading=(3, 7))
    data, scale = getattr(ops, name)(*operands, **options)
    n = 150 if "swiglu" in name else 300
    pitch = -(-n // 16) * 16
    assert data.shape == (3, 7, n) and data.stride() == (7 * pitch, pitch, 1)
    assert scale.shape == (3, 7, -(-n // 128)) and scale.stride() == (7, 1, 24)
    assert data.dtype == E4M3 and scale.dtype == torch.float32


# ---- torch.compile ----


@pytest.fixture
def compiled():
    """Compiles a function to one graph, with AOTAutograd but without code generation."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def compile(function, dynamic=False):
        return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter), counter

    yield compile
    torch._dynamo.reset()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_compile_quantizers(name, compiled, device):
    function, _ = compiled(getattr(ops, name))
    x = random(37, 300, device=device).requires_grad_()
    assert_same(function(x, dtype=E5M2), getattr(ops, name)(x, dtype=E5M2))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_compile_quantizers_once_for_all_sizes(name, compiled, device):
    """One graph serves all sizes that torch's guards do not distinguish. They ask which outputs are
    contiguous, which depends on sizes <= 1, sizes of one group and multiples of 16."""
    function, counter = compiled(getattr(ops, name), dynamic=True)
    for shape in [(137, 300), (301, 135), (1001, 513)]:
        x = random(*shape, device=device)
        assert_same(function(x), getattr(ops, name)(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_compile_gemm_once_for_all_sizes(granularity, compiled, device):
    function, counter = compiled(ops.fp8_gemm_nt, dynamic=True)
    for m, n, k in [(150, 201, 299), (133, 157, 515), (303, 257, 459)]:
        operands = quantized(granularity, m, n, k, device=device)
        bias = random(n, device=device)
        assert_same(function(*operands, bias=bias), ops.fp8_gemm_nt(*operands, bias=bias))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("case", GROUPINGS)
def test_compile_grouped_gemms_once_for_all_sizes(case, compiled, device):
    name, _, _ = grouped(case, 0, 0, 0, device=device)
    function, counter = compiled(getattr(ops, name), dynamic=True)
    # The sizes of the first call must all differ.
    for m, n, k in [(150, 201, 515), (133, 157, 299), (303, 257, 459)]:
        _, tensors, options = grouped(case, m, n, k, device=device)
        assert_same(function(*tensors, **options), getattr(ops, name)(*tensors, **options))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name, options", FUSED)
def test_compile_fused_gemms_once_for_all_sizes(name, options, compiled, device):
    function, counter = compiled(getattr(ops, name), dynamic=True)
    for m, n, k in [(150, 402, 299), (133, 358, 515), (303, 514, 459)]:
        operands = quantized("1d2d", m, n, k, device=device)
        assert_same(function(*operands, **options), getattr(ops, name)(*operands, **options))
    assert counter.frame_count == 1


@pytest.mark.parametrize("case", M_GROUPINGS)
def test_compile_grouped_gemms_with_the_gradient_of_bias(case, compiled, device):
    name, tensors, options = grouped(case, 20, 40, 300, device=device)

    def loss(tensors, options, bias):
        y = getattr(ops, name)(*tensors, bias=bias, out_dtype=torch.float32, **options)
        return y.square().sum()

    bias = random(3, 40, device=device).requires_grad_()
    function, _ = compiled(loss)
    (gradient,) = torch.autograd.grad(function(tensors, options, bias), bias)
    (expected,) = torch.autograd.grad(loss(tensors, options, bias), bias)
    assert_same(gradient, expected)


def test_compile_gemm_into_out(compiled, device):
    def accumulate(a, a_scale, b, b_scale, out):
        return ops.fp8_gemm_nt(a, a_scale, b, b_scale, out=out, accumulate=True) * 2

    function, _ = compiled(accumulate)
    operands = quantized("1d2d", 20, 40, 300, device=device)
    out = random(20, 40, device=device, dtype=torch.float32)
    expected_out = out.clone()
    expected = accumulate(*operands, expected_out)
    assert_same(function(*operands, out), expected)
    assert_same(out, expected_out)


def test_compile_dequantize_with_its_gradient(compiled, device):
    def loss(data, scale):
        return ops.dequantize(data, scale, out_dtype=torch.float32).square().sum()

    data, scale = ops.quantize_1x128(random(37, 300, device=device))
    scale.requires_grad_()
    function, _ = compiled(loss)
    (gradient,) = torch.autograd.grad(function(data, scale), scale)
    (expected,) = torch.autograd.grad(loss(data, scale), scale)
    assert_same(gradient, expected)


def test_compile_gemm_with_the_gradient_of_bias(compiled, device):
    def loss(operands, bias):
        return ops.fp8_gemm_nt(*operands, bias=bias, out_dtype=torch.float32).square().sum()

    operands = quantized("1d2d", 20, 40, 300, device=device)
    bias = random(40, device=device).requires_grad_()
    function, _ = compiled(loss)
    (gradient,) = torch.autograd.grad(function(operands, bias), bias)
    (expected,) = torch.autograd.grad(loss(operands, bias), bias)
    assert_same(gradient, expected)


@pytest.mark.slow
@pytest.mark.large
def test_compile_a_chain_with_inductor(device):
    """Inductor keeps the strides that fakes promise: M-major scales reach the GEMM as they are."""

    def chain(x, w, bias):
        a, a_scale = ops.quantize_1x128(torch.nn.functional.silu(x))
        b, b_scale = ops.quantize_128x128(w)
        return ops.fp8_gemm_nt(a, a_scale, b, b_scale, bias=bias) + 1

    torch._dynamo.reset()
    x, w = random(2, 37, 300, device=device), random(130, 300, device=device)
    bias = random(130, device=device)
    function = torch.compile(chain, fullgraph=True)
    # Inductor computes silu in FP32 without rounding it to BF16 in between, so bits may differ.
    torch.testing.assert_close(function(x, w, bias), chain(x, w, bias), rtol=0.05, atol=0.5)
    torch._dynamo.reset()


def test_the_functions_leave_no_trace_of_their_own_in_a_graph(device):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(ops.quantize_1x128, fullgraph=True, backend=backend)(random(4, 64, device=device))
    calls = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert overload("quantize_1x128") in calls
    torch._dynamo.reset()


# ---- out= ----


def test_out_is_returned_and_written(device):
    operands = quantized("1d2d", 20, 40, 300, device=device)
    out = torch.full((20, 40), torch.nan, device=device, dtype=torch.bfloat16)
    assert ops.fp8_gemm_nt(*operands, out=out) is out
    assert_same(out, ops.fp8_gemm_nt(*operands))
