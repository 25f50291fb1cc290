"""The ops as Python functions: their signatures, the layout of what they return, and chains of them
under torch.compile. tests/test_catalog.py compiles each op."""

from __future__ import annotations

import inspect

import pytest
import torch

from support.op_testing import FUSED, overload, quantized, random
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
