"""Rows for experts: properties of routes, hostile slots, gradients against float64, errors.

tests/test_catalog.py compares every op with its reference.
"""

from __future__ import annotations

import pytest
import torch

from support.op_testing import assert_same
from torchext import ops
from torchext._catalog.moe import ids_of, slots_of, weights_of


def test_the_rows_of_an_expert_are_in_the_order_of_its_tokens(device):
    ids = ids_of(700, 4, 13).to(device)
    slots, offsets = ops.moe_route(ids, 13)
    flat_ids, flat_slots = ids.flatten().cpu(), slots.flatten().cpu()
    assert flat_slots.sort().values.tolist() == list(range(2800))
    first = 0
    for expert, end in enumerate(offsets.tolist()):
        rows = flat_slots[flat_ids == expert]
        assert rows.tolist() == list(range(first, end))
        first = end
    assert flat_slots[flat_ids < 0].tolist() == list(range(first, 2800))


def test_ids_beyond_the_experts_are_no_experts(device):
    ids = torch.tensor([[0, 5], [2**40, 1], [-(2**40), 5]], device=device)
    slots, offsets = ops.moe_route(ids, 5)
    assert slots.tolist() == [[0, 2], [3, 1], [4, 5]]
    assert offsets.tolist() == [1, 2, 2, 2, 2]


def test_rows_are_those_of_torch_s_stable_sort(device):
    ids = torch.randint(256, (300, 8), generator=torch.Generator().manual_seed(0)).to(device)
    slots, _ = ops.moe_route(ids, 256)
    order = ids.flatten().argsort(stable=True)
    assert torch.equal(slots.flatten()[order].cpu(), torch.arange(2400, dtype=torch.int32))


@pytest.mark.parametrize("num_sms", [1, 3])
def test_num_sms_changes_no_bit(num_sms, device):
    ids = ids_of(1500, 4, 20).to(device)
    slots, offsets = ops.moe_route(ids, 20)
    assert_same(ops.moe_route(ids, 20, num_sms=num_sms), (slots, offsets))
    x = torch.randn(1500, 256).bfloat16().to(device)
    weights = weights_of(1500, 4).to(device)
    rows = ops.moe_permute(x, slots, weights)
    assert_same(ops.moe_permute(x, slots, weights, num_sms=num_sms), rows)
    assert_same(
        ops.moe_permute_quantize_1x128(x, slots, num_sms=num_sms),
        ops.moe_permute_quantize_1x128(x, slots),
    )
    assert_same(
        ops.moe_combine(rows, slots, weights, num_sms=num_sms),
        ops.moe_combine(rows, slots, weights),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_permuting_commutes_with_quantizing(dtype, fp8, device):
    x, slots = torch.randn(50, 700).to(device, dtype), slots_of(50, 3).to(device)
    x[3] = torch.nan
    assert_same(
        ops.moe_permute_quantize_1x128(x, slots, dtype=fp8),
        ops.quantize_1x128(ops.moe_permute(x, slots), dtype=fp8),
    )


def test_large_results_are_the_same(device):
    """On the CPU, results of 16 MiB and more bypass the cache."""
    if device != "cpu":
        pytest.skip("the size matters to the CPU kernels only")
    x, slots = torch.randn(1100, 2048).bfloat16(), slots_of(1100, 8)
    data, scale = ops.moe_permute_quantize_1x128(x, slots)
    expected, expected_scale = ops.quantize_1x128(x)
    for choice in range(8):
        rows = slots[:, choice].long()
        assert torch.equal(data.view(torch.uint8)[rows], expected.view(torch.uint8))
        assert torch.equal(scale[rows], expected_scale)


def test_choices_without_rows_and_rows_without_choices(device):
    x = torch.randn(3, 300).bfloat16().to(device)
    slots = torch.tensor([[4, -1], [-5, 0], [2, 5]], dtype=torch.int32, device=device)
    y = ops.moe_permute(x, slots, rows=7)
    data, scale = ops.moe_permute_quantize_1x128(x, slots, 7)
    assert y.shape == (7, 300) and data.shape == (7, 300) and scale.shape == (7, 3)
    expected, expected_scale = ops.quantize_1x128(x)
    for row, token in ((4, 0), (0, 1), (2, 2), (5, 2)):
        assert torch.equal(y[row], x[token])
        assert torch.equal(data[row].float(), expected[token].float())
        assert torch.equal(scale[row], expected_scale[token])
    y[[1, 3, 6]] = torch.nan  # must not be read
    total = ops.moe_combine(y, slots)
    assert torch.equal(total, torch.stack([x[0], x[1], (x[2].float() * 2).bfloat16()]))


def formula_of_permute(x, slots, weights):
    rows = torch.zeros(slots.numel(), x.shape[1], dtype=x.dtype)
    products = x[:, None] * weights[..., None]
    return rows.index_copy(0, slots.flatten().long(), products.flatten(0, 1))


def formula_of_combine(y, slots, weights, residual):
    return (y[slots.long()] * weights[..., None]).sum(1) + residual


def gradients(function, tensors, slots, grad):
    leaves = [t.clone().requires_grad_() for t in tensors]
    first, *rest = leaves
    return torch.autograd.grad(function(first, slots, *rest), leaves, grad)


def test_gradients_of_permute(device):
    x, slots, weights = torch.randn(20, 150), slots_of(20, 3), weights_of(20, 3)
    grad = torch.randn(60, 150)
    expected = gradients(formula_of_permute, [x.double(), weights.double()], slots, grad.double())
    tensors = [x.to(device), weights.to(device)]
    found = gradients(ops.moe_permute, tensors, slots.to(device), grad.to(device))
    for result, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(result.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


def test_gradients_of_combine(device):
    y, slots, weights = torch.randn(60, 150), slots_of(20, 3), weights_of(20, 3)
    residual, grad = torch.randn(20, 150), torch.randn(20, 150)
    tensors = [y, weights, residual]
    expected = gradients(formula_of_combine, [t.double() for t in tensors], slots, grad.double())

    def combine(y, slots, weights, residual):
        return ops.moe_combine(y, slots, weights, residual=residual)

    found = gradients(combine, [t.to(device) for t in tensors], slots.to(device), grad.to(device))
    for result, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(result.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_row_without_a_choice_has_no_gradient():
    y = torch.randn(5, 40, requires_grad=True)
    slots = torch.tensor([[3, -1], [0, 4]], dtype=torch.int32)
    ops.moe_combine(y, slots).sum().backward()
    assert y.grad is not None
    assert y.grad.sum(1).tolist() == [40, 0, 0, 40, 40]


X = torch.randn(4, 200)
SLOTS = torch.arange(8, dtype=torch.int32).view(4, 2)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: ops.moe_route(SLOTS[0], 4), ValueError, r"ids must have shape \[T, k\]"),
        (lambda: ops.moe_route(SLOTS.float(), 4), TypeError, "ids must be torch.int64 or"),
        (lambda: ops.moe_route(SLOTS, 0), ValueError, "num_experts must be from 1 to 1024"),
        (lambda: ops.moe_route(SLOTS, 1025), ValueError, "num_experts must be from 1 to 1024"),
        (lambda: ops.moe_route(SLOTS, 4, num_sms=-1), ValueError, "num_sms must be"),
        (lambda: ops.moe_permute(X[0], SLOTS), ValueError, r"x must have shape \[T, K\]"),
        (lambda: ops.moe_permute(X.double(), SLOTS), TypeError, "x must be torch.bfloat16,"),
        (lambda: ops.moe_permute(X, SLOTS.long()), TypeError, "slots must be torch.int32"),
        (lambda: ops.moe_permute(X[:3], SLOTS), ValueError, "slots must have shape .* T = 3"),
        (lambda: ops.moe_permute(X, SLOTS, rows=7), ValueError, "below the number of rows, 7"),
        (lambda: ops.moe_permute(X, SLOTS, rows=-1), ValueError, "rows must be the number"),
        (
            lambda: ops.moe_permute(X, SLOTS, torch.ones(4, 2).bfloat16()),
            TypeError,
            "weights must be torch.float32",
        ),
        (lambda: ops.moe_permute(X, SLOTS, torch.ones(4)), ValueError, "the shape of slots"),
        (
            lambda: ops.moe_permute_quantize_1x128(X, SLOTS, dtype=torch.float16),
            TypeError,
            "dtype must be",
        ),
        (
            lambda: ops.moe_permute_quantize_1x128(X, SLOTS, 7),
            ValueError,
            "below the number of rows, 7",
        ),
        (lambda: ops.moe_combine(X, SLOTS), ValueError, "below the number of rows, 4"),
        (lambda: ops.moe_combine(X[0], SLOTS), ValueError, r"y must have shape \[rows, K\]"),
        (
            lambda: ops.moe_combine(X, SLOTS // 2, out_dtype=torch.int32),
            TypeError,
            "out_dtype must be",
        ),
        (
            lambda: ops.moe_combine(X, SLOTS // 2, residual=X.bfloat16()),
            TypeError,
            "residual must have the dtype of y",
        ),
        (
            lambda: ops.moe_combine(X, SLOTS // 2, residual=X[:3]),
            ValueError,
            r"residual must have shape \[T, K\] = \[4, 200\]",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
