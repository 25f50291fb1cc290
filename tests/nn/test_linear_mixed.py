"""torchext.nn.Linear with recipes that run some of the three GEMMs wide."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from support.linear_testing import (
    QUANTIZE_ACTIVATION,
    QUANTIZE_WEIGHT,
    OpCounter,
    gradient,
    normal,
    normal_linear,
    saved_tensors,
    sqnr,
)
from torchext import Recipe, fixed_weights
from torchext.nn import Linear

RECIPES = [
    Recipe.parse(text)
    for text in (
        "blockwise + fprop wide",
        "blockwise + dgrad wide",
        "blockwise + wgrad wide",
        "rowwise + dgrad wide + wgrad wide",
        "tensorwise + grad e5m2 + fprop wide + wgrad wide",
        "blockwise + fprop wide + dgrad wide + wgrad wide",
    )
]
mixed_recipes = pytest.mark.parametrize("recipe", RECIPES, ids=str)
pytestmark = pytest.mark.large  # the choice of GEMMs does not depend on the kernels
ALL_WIDE = RECIPES[-1]


def in_fp8(recipe: Recipe) -> Recipe:
    return Recipe(
        recipe.granularity,
        recipe.input_dtype,
        recipe.weight_dtype,
        recipe.grad_dtype,
        recipe.pow2_scale,
    )


def results(layer, x, dy):
    """y, dx, dw and db."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)


def layers(device, recipe, dtype):
    """The layer, the same layer with every GEMM in FP8, and as a torch.nn.Linear; x and dy."""
    mixed = normal_linear(device, recipe=recipe, dtype=dtype)
    fp8 = Linear.convert_(copy.deepcopy(mixed).revert_(), in_fp8(recipe))
    wide = copy.deepcopy(mixed).revert_()
    x = normal(3, 24, 200, device=device, dtype=dtype)
    return mixed, fp8, wide, x


def assert_composed(recipe, mixed, fp8, wide):
    """Each GEMM has the bits of the layer that it stands for; the bias's gradient, of any."""
    for gemm, got, quantized, unquantized in zip(
        ("fprop", "dgrad", "wgrad"), mixed, fp8, wide, strict=False
    ):
        expected = unquantized if gemm in recipe.wide_gemms else quantized
        assert torch.equal(got, expected), gemm
        assert not torch.equal(quantized, unquantized)
    assert torch.equal(mixed[3], fp8[3])


@mixed_recipes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_gemm_is_the_wide_or_the_fp8_one(device, recipe, dtype):
    *three, x = layers(device, recipe, dtype)
    dy = normal(3, 24, 136, device=device, dtype=dtype)
    assert_composed(recipe, *(results(layer, x, dy) for layer in three))


@mixed_recipes
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast(device, recipe, weight_dtype):
    *three, x = layers(device, recipe, weight_dtype)
    dy = normal(3, 24, 136, device=device, dtype=torch.bfloat16)
    with torch.autocast(device.type, torch.bfloat16):
        got = [results(layer, x.float(), dy) for layer in three]
    assert got[0][0].dtype == torch.bfloat16 and got[0][2].dtype == weight_dtype
    assert_composed(recipe, *got)


@mixed_recipes
def test_wide_gemms_are_exact_and_the_others_close_to_float64(device, recipe):
    layer, _, wide, x = layers(device, recipe, torch.float32)
    dy = normal(3, 24, 136, device=device)
    got, exact = results(layer, x, dy), results(wide.double(), x.double(), dy.double())
    for gemm, value, reference in zip(("fprop", "dgrad", "wgrad"), got, exact, strict=False):
        noise = sqnr(reference, value)
        assert noise > 120 if gemm in recipe.wide_gemms else 20 < noise < 60, gemm


@mixed_recipes
def test_backward_keeps_what_its_gemms_read(device, recipe):
    layer = normal_linear(device, recipe=recipe)
    x = normal(24, 200, device=device, grad=True)
    with saved_tensors() as saved:
        layer(x)
    addresses = {tensor.data_ptr() for tensor in saved}
    assert (x.data_ptr() in addresses) == ("wgrad" in recipe.wide_gemms)
    assert (layer.weight.data_ptr() in addresses) == ("dgrad" in recipe.wide_gemms)
    quantized = [tensor for tensor in saved if tensor.itemsize == 1]
    assert len(quantized) == 2 - sum(gemm in recipe.wide_gemms for gemm in ("dgrad", "wgrad"))


def test_nothing_is_quantized_for_wide_gemms(device):
    layer = normal_linear(device, recipe=ALL_WIDE)
    with OpCounter() as counter:
        layer(normal(24, 200, device=device, grad=True)).sum().backward()
        with torch.no_grad(), fixed_weights(layer):
            layer.eval()(normal(24, 200, device=device))
    assert not any(counter.of(name) for name in ("fp8_gemm_nt", *QUANTIZE_WEIGHT))
    assert not counter.of(*QUANTIZE_ACTIVATION)
    # A wide wgrad needs neither x nor dy transposed. The sum for a bias makes both.
    layer = normal_linear(device, recipe=Recipe.parse("blockwise+wgrad=bf16"), bias=False)
    with OpCounter() as counter:
        layer(normal(24, 200, device=device, grad=True)).sum().backward()
    assert counter.calls["quantize_1x128"] == 2 and counter.of(*QUANTIZE_ACTIVATION) == 2
    assert counter.of("mm") == 1


def test_a_weight_for_dgrad_alone_is_kept(device):
    layer = normal_linear(device, recipe=Recipe(fprop="wide"))
    x = normal(24, 200, device=device, grad=True)
    with fixed_weights(layer), OpCounter() as counter:
        layer(x).sum().backward()
        layer(x).sum().backward()
        assert counter.of(*QUANTIZE_WEIGHT) == 1


def test_a_weight_changed_before_backward_is_refused_where_backward_reads_it(device):
    layer = normal_linear(device, recipe=Recipe(dgrad="wide"))
    y = layer(normal(4, 200, device=device, grad=True))
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_errors_name_the_layer(device):
    layer = normal_linear(device, recipe=ALL_WIDE)
    with pytest.raises(
        RuntimeError, match=r"^torchext.nn.Linear: input must have shape \[\.\.\., "
    ):
        layer(normal(4, 100, device=device))
    layer.bias = nn.Parameter(torch.zeros(100, device=device))
    with pytest.raises(RuntimeError, match=r"^torchext.nn.Linear: bias must have shape \[136\]"):
        layer(normal(4, 200, device=device))


# ---- graphs, transforms and tensor subclasses ----


def through_op(layer, x, dy):
    """`results` by torch.func.vjp, which calls the layer's op."""

    def call(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    y, pull, *_ = torch.func.vjp(call, x, layer.weight.detach(), layer.bias.detach())
    return y, *pull(dy)


@mixed_recipes
def test_transforms_compute_the_same_bits(device, recipe):
    layer = normal_linear(device, recipe=recipe)
    x, dy = normal(24, 200, device=device), normal(24, 136, device=device)
    with OpCounter() as counter:
        got = through_op(layer, x, dy)
    assert counter.calls["linear_mixed"] == 1
    for value, expected in zip(got, results(layer, x, dy), strict=True):
        assert torch.equal(value, expected)
    batched = torch.vmap(layer)(x.view(2, 12, 200))
    torch.testing.assert_close(batched.flatten(0, 1), got[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="must have no tangent"):
        torch.func.jvp(layer, (x,), (x,))


@mixed_recipes
def test_export_and_tracing(device, recipe):
    layer = normal_linear(device, recipe=recipe)
    x = normal(24, 200, device=device)
    exported = torch.export.export(layer, (x,))
    called = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert called == ["torchext._linear_mixed.default"]
    expected = torch.autograd.grad(layer(x).square().sum(), tuple(layer.parameters()))
    module = exported.module()
    got = torch.autograd.grad(module(x).square().sum(), tuple(module.parameters()))
    assert all(map(torch.equal, got, expected))
    assert torch.equal(torch.jit.trace(layer, x)(x), layer(x))


@mixed_recipes
def test_compiled(device, recipe):
    torch._dynamo.reset()
    layer = normal_linear(device, recipe=recipe)
    x, dy = normal(24, 200, device=device), normal(24, 136, device=device)
    expected = results(layer, x, dy)
    layer.compile(backend="aot_eager", fullgraph=True)
    for got, value in zip(results(layer, x, dy), expected, strict=True):
        assert torch.equal(got, value)


def test_the_op_passes_opcheck(device):
    options = (0, torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e4m3fn, False, "wgrad")
    x, weight = normal(24, 200, device=device), normal(136, 200, device=device)
    torch.library.opcheck(torch.ops.torchext._linear_mixed.default, (x, weight, None, *options))


@mixed_recipes
def test_one_rank_has_the_same_bits(mesh, recipe):
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    device = torch.device("cpu")
    layer = normal_linear(device, 256, 128, recipe)
    x = normal(24, 256, device=device, grad=True)
    layer(x).square().sum().backward()
    expected = gradient(layer.weight)
    layer.zero_grad()
    parallelize_module(layer, mesh, ColwiseParallel())
    layer(x).square().sum().backward()
    got: Any = layer.weight.grad
    assert torch.equal(got.full_tensor(), expected)
