"""The ops under torch.vmap, torch.func and forward-mode derivatives give the results of separate
calls for each element of a batch."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_map

from support.op_samples import (
    BLOCKS,
    FUSED,
    GRANULARITIES,
    GROUPINGS,
    M_GROUPINGS,
    OPERAND_QUANTIZERS,
    QUANTIZERS,
    assert_same,
    grouped,
    opcheck,
    overload,
    quantized,
    random,
)
from torchext import Recipe, ops
from torchext._catalog.entry import E5M2
from torchext.ops.linear import op_options

pytestmark = pytest.mark.large  # batches do not depend on the kernels


def bits(outputs):
    return tree_map(lambda t: t.float(), outputs)


def assert_elements(batched, elements, dim=0):
    """Asserts that each element of a batch of results equals the result of its own call."""
    for index, element in enumerate(elements):
        got = tree_map(lambda t, index=index: t.select(dim, index), bits(batched))
        torch.testing.assert_close(got, bits(element), rtol=1e-5, atol=1e-4, equal_nan=True)


def stacked(elements):
    """The batch, as torch.stack lays it out: without the row pitch of its elements."""
    return tree_map(lambda *ts: None if ts[0] is None else torch.stack(ts), *elements)


# ---- quantizers ----


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers(name, dim, device):
    x = random(3, 37, 300, device=device)
    function = getattr(ops, name)
    options = {"dtype": E5M2, "pow2_scale": True} if dim == 2 else {}
    batched = vmap(lambda x: function(x, **options), in_dims=dim)(x.movedim(0, dim).contiguous())
    for index, element in enumerate(x):
        for got, expected in zip(batched, function(element, **options), strict=True):
            assert torch.equal(got[index].float(), expected.float())


@pytest.mark.parametrize("name", sorted(set(QUANTIZERS) - set(BLOCKS)))
def test_quantizers_of_rows_and_of_stacks(name, device):
    function = getattr(ops, name)
    for x in (random(3, 200, device=device), random(3, 2, 5, 200, device=device)):
        assert_elements(vmap(function)(x), [function(element) for element in x])
        twice = vmap(vmap(function))(random(2, 3, 4, 48, device=device))
        assert all(t.shape[:2] == (2, 3) for t in twice)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_an_op_refuses_it_refuses_in_a_batch(name, device):
    x = random(3, device=device) if name not in BLOCKS else random(3, 16, device=device)
    with pytest.raises(ValueError, match=name):
        vmap(getattr(ops, name))(x)


# ---- GEMMs ----


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


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_products_of_stacked_operands(granularity, transposed, device):
    """A stack loses the layout of its elements; the batching rule restores it."""
    elements = [quantized(granularity, 37, 40, 200, device=device) for _ in range(3)]
    operands = stacked(elements)
    dim = 0
    if transposed:
        operands, dim = tree_map(lambda t: t.movedim(0, -1).contiguous(), operands), -1
    bias = random(40, device=device)
    for options in ({}, {"bias": bias, "out_dtype": torch.float32}):
        expected = [ops.fp8_gemm_nt(*element, **options) for element in elements]
        batched = vmap(lambda *t, o=options: ops.fp8_gemm_nt(*t, **o), in_dims=dim)(*operands)
        assert_elements(batched, expected)
        a_alone = vmap(
            lambda a, s, o=options: ops.fp8_gemm_nt(a, s, *elements[0][2:], **o), in_dims=dim
        )(*operands[:2])
        assert_elements(
            a_alone, [ops.fp8_gemm_nt(*e[:2], *elements[0][2:], **options) for e in elements]
        )


@pytest.mark.parametrize("case", GROUPINGS)
@pytest.mark.parametrize("granularity", ["1d2d", "rowwise"])
def test_grouped_products(case, granularity, device):
    samples = [grouped(case, 20, 40, 208, device=device, granularity=granularity) for _ in range(2)]
    name, function = samples[0][0], getattr(ops, samples[0][0])
    expected = [function(*tensors, **options) for _, tensors, options in samples]
    tensors, options = stacked([sample[1:] for sample in samples])
    names = list(options)
    batched = vmap(
        lambda *t: function(*t[: len(tensors)], **dict(zip(names, t[len(tensors) :], strict=True)))
    )(*tensors, *options.values())
    assert_elements(batched, expected)
    # out= may be a batch too.
    out = torch.zeros_like(batched)
    arguments = (*tensors, *options.values(), out)

    def write(*t):
        function(
            *t[: len(tensors)],
            out=t[-1],
            accumulate=True,
            **dict(zip(names, t[len(tensors) : -1], strict=True)),
        )
        return t[-1]

    vmap(write)(*arguments)
    assert_same(out, batched)
    assert name.endswith("gemm_nt") or case in M_GROUPINGS


@pytest.mark.parametrize("name, options", FUSED)
def test_fused_products(name, options, device):
    elements = [quantized("1d2d", 20, 40, 200, device=device) for _ in range(3)]
    function = getattr(ops, name)
    batched = vmap(lambda *t: function(*t, **options))(*stacked(elements))
    assert_elements(batched, [function(*element, **options) for element in elements])
    # The result of a batch may be an operand of the next GEMM.
    down = quantized("1d2d", 20, 16, batched[0].shape[-1], device=device)[2:]
    again = vmap(lambda data, scale: ops.fp8_gemm_nt(data, scale, *down))(*batched)
    assert_elements(
        again, [ops.fp8_gemm_nt(*function(*element, **options), *down) for element in elements]
    )


def test_out_of_a_batch(device):
    elements = [quantized("1d2d", 20, 40, 200, device=device) for _ in range(3)]
    out = torch.ones(3, 20, 40, device=device)

    def write(a, a_scale, b, b_scale, out):
        ops.fp8_gemm_nt(a, a_scale, b, b_scale, out=out, accumulate=True)
        return out

    vmap(write)(*stacked(elements), out)
    expected = [
        ops.fp8_gemm_nt(*element, out=torch.ones(20, 40, device=device), accumulate=True)
        for element in elements
    ]
    assert_elements(out, expected)


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
    ops.dequantize(data, leaf, out_dtype=torch.float32).sum().backward()
    assert torch.equal(got, leaf.grad)


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
