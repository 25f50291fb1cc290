"""Chains of ops under torch.vmap, and ops under torch.func and forward-mode derivatives, give the
results of separate calls for each element of a batch. tests/test_catalog.py has each op alone."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_map

from support.op_testing import (
    BLOCKS,
    FUSED,
    GRANULARITIES,
    OPERAND_QUANTIZERS,
    QUANTIZERS,
    opcheck,
    overload,
    quantized,
    random,
)
from torchext import Recipe, ops
from torchext.ops.linear import op_options

pytestmark = pytest.mark.large  # batches do not depend on the kernels


def bits(outputs):
    return tree_map(lambda t: t.float(), outputs)


def assert_elements(batched, elements):
    """Asserts that each element of a batch of results equals the result of its own call."""
    for index, element in enumerate(elements):
        got = tree_map(lambda t, index=index: t[index], bits(batched))
        torch.testing.assert_close(got, bits(element), rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_an_op_refuses_it_refuses_in_a_batch(name, device):
    x = random(3, device=device) if name not in BLOCKS else random(3, 16, device=device)
    with pytest.raises(ValueError, match=name):
        vmap(getattr(ops, name))(x)


# ---- ops in sequence ----


@pytest.mark.parametrize("m", [1, 37])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_products_of_what_was_quantized_in_the_batch(granularity, m, device):
    """Tensors that were quantized in a batch have the layout that GEMMs require."""
    quantize_a, quantize_b = (getattr(ops, q.__name__) for q in OPERAND_QUANTIZERS[granularity])
    x, w = random(3, m, 200, device=device), random(3, 40, 200, device=device)

    def product(x, w):
        return ops.fp8_gemm_nt(*quantize_a(x), *quantize_b(w))

    for in_dims in ((0, 0), (0, None), (None, 0)):
        arguments = (x if in_dims[0] == 0 else x[0], w if in_dims[1] == 0 else w[0])
        batched = vmap(product, in_dims=in_dims)(*arguments)
        elements = [
            product(
                *(t if dim is None else t[i] for t, dim in zip(arguments, in_dims, strict=True))
            )
            for i in range(3)
        ]
        assert_elements(batched, elements)


@pytest.mark.parametrize("name, options", FUSED)
def test_the_result_of_a_batch_is_an_operand_of_the_next_gemm(name, options, device):
    x, w = random(3, 20, 200, device=device), random(40, 200, device=device)
    b = ops.quantize_128x128(w)
    n = getattr(ops, name)(*ops.quantize_1x128(x[0]), *b, **options)[0].shape[-1]
    down = ops.quantize_128x128(random(16, n, device=device))

    def chain(x):
        data, scale = getattr(ops, name)(*ops.quantize_1x128(x), *b, **options)
        return ops.fp8_gemm_nt(data, scale, *down)

    assert_elements(vmap(chain)(x), [chain(element) for element in x])


@pytest.mark.parametrize(
    "quantize",
    [ops.quantize_1x128, ops.quantize_128x128, ops.quantize_rowwise, ops.quantize_tensorwise],
)
def test_dequantize(quantize, device):
    x = random(3, 150, 300, device=device)

    def there_and_back(x):
        return ops.dequantize(*quantize(x), out_dtype=torch.float32)

    for index, got in enumerate(vmap(there_and_back)(x)):
        assert torch.equal(got, there_and_back(x[index]))


# ---- gradients ----


def test_gradients_of_biases_and_scales_at_any_level(device):
    operands = quantized("1d2d", 20, 40, 208, device=device)
    biases = torch.randn(3, 40, device=device)

    def loss(bias):
        return ops.fp8_gemm_nt(*operands, bias=bias, out_dtype=torch.float32).square().sum()

    leaves = biases.clone().requires_grad_()
    sum(loss(leaf) for leaf in leaves).backward()
    expected = leaves.grad
    torch.testing.assert_close(vmap(grad(loss))(biases), expected)
    torch.testing.assert_close(grad(lambda b: vmap(loss)(b).sum())(biases), expected)
    second = grad(lambda b: grad(loss)(b).sum())(biases[0])  # 2 for each row
    torch.testing.assert_close(second, torch.full_like(biases[0], 40.0))

    data, scale = ops.quantize_1x128(random(20, 300, device=device))
    got = grad(lambda s: ops.dequantize(data, s, out_dtype=torch.float32).sum())(scale)
    leaf = scale.clone().requires_grad_()
    y = ops.dequantize(data, leaf, out_dtype=torch.float32)
    (expected,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(got, expected)


def test_forward_derivatives_of_ops_are_refused(device):
    operands = quantized("1d2d", 20, 40, 208, device=device)
    bias = torch.randn(40, device=device)
    with pytest.raises(NotImplementedError, match=r"fp8_gemm_nt: bias .* no forward-mode"):
        jvp(lambda bias: ops.fp8_gemm_nt(*operands, bias=bias), (bias,), (bias,))
    data, scale = operands[:2]
    with pytest.raises(NotImplementedError, match=r"dequantize: scale .* no forward-mode"):
        jvp(lambda s: ops.dequantize(data, s, out_dtype=torch.float32), (scale,), (scale,))


# ---- the layer's ops ----


@pytest.mark.parametrize(
    "recipe, leading",
    [(Recipe(), (4, 5)), (Recipe.rowwise(), (20,)), (Recipe.tensorwise(), ())],
    ids=str,
)
def test_opcheck_of_the_layers_ops(recipe, leading, device):
    def wide(*shape):
        return random(*shape, device=device, dtype=torch.float32).requires_grad_()

    granularity, input_dtype, weight_dtype, grad_dtype, pow2_scale = op_options(recipe)
    x, w, dy, bias = wide(*leading, 208), wide(40, 208), wide(*leading, 40), wide(40)
    options = granularity, input_dtype, weight_dtype, grad_dtype, pow2_scale
    # opcheck differentiates ops. The ops of gradients refuse this, so their inputs are detached.
    for arguments in ((x, w, bias, *options), (x.detach(), w, None, *options, torch.bfloat16)):
        opcheck(overload("_linear"), arguments)
    x, w, dy = x.detach(), w.detach(), dy.detach()
    opcheck(
        overload("_linear_dgrad"),
        (dy, w, granularity, weight_dtype, grad_dtype, pow2_scale, torch.float32),
    )
    opcheck(
        overload("_linear_wgrad"),
        (dy, x, granularity, input_dtype, grad_dtype, pow2_scale, torch.bfloat16),
    )
