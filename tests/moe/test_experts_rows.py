"""Experts on rows that a dispatcher received: FP8 rows and FP8 gradients, nothing else.

tests/nn/test_experts.py tests the same functions behind tokens, to the bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support.linear_testing import normal, sqnr
from torchext import Recipe, ops
from torchext.ops import experts_rows
from torchext.ops.experts_rows import NOTHING, Needs, Rows
from torchext.ops.linear_function import Operand
from torchext.ops.mlp_function import MLP

K, INNER, EXPERTS, S = 200, 160, 4, 90
OFFSETS = (20, 20, 61, 84)  # the second expert has no rows; rows from 84 on have no expert
ALL = Needs(True, True, True, True)
RECIPES = {"FP32 scales": Recipe(), "powers of two": Recipe(pow2_scale=True)}


def config_of(recipe: Recipe, save: str = "bf16") -> MLP:
    return MLP("silu_mul", None, recipe, torch.bfloat16, save)  # type: ignore[arg-type]


def weights_of(device: torch.device) -> tuple[Tensor, Tensor]:
    up = normal(EXPERTS, 2 * INNER, K, device=device) / K**0.5
    return up.bfloat16(), (normal(EXPERTS, K, INNER, device=device) / INNER**0.5).bfloat16()


def quantized(x: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    return ops.quantize_1x128(x, pow2_scale=recipe.pow2_scale)


def exact(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """y [S, K] in float64; zeros for rows of no expert."""
    y, start = torch.zeros_like(x), 0
    for expert, end in enumerate(OFFSETS):
        gate, rest = (x[start:end] @ up[expert].T).chunk(2, -1)
        part = (F.silu(gate) * rest) @ down[expert].T * weights[start:end, None]
        y = torch.cat([y[:start], part, y[end:]])
        start = end
    return y


@pytest.mark.large  # needs many GEMMs
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("save", ["bf16", "recompute"])
def test_against_float64(device, recipe, save):
    up, down = weights_of(device)
    x, dy = (normal(S, K, device=device) for _ in range(2))
    rows = quantized(x, recipe)
    dy_rows = quantized(dy, recipe)
    for tensor in rows + dy_rows:  # nobody may read rows of no expert
        (tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor)[84:] = 0x7F
    weights = torch.rand(S, device=device)
    config, offsets = config_of(recipe, save), torch.tensor(OFFSETS, device=device).int()
    operands = experts_rows.quantize_weights([None, None], [up, down], recipe, ALL)
    y, kept = experts_rows.forward(config, operands, Rows(*rows, offsets, weights), ALL)

    for tensor in rows + dy_rows:
        (tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor)[84:] = 0
    rows_t = experts_rows.transposed(rows, recipe, None, gradient=False)
    dy_t = experts_rows.transposed(dy_rows, recipe, weights, gradient=True)
    dtypes = torch.float32, torch.bfloat16
    got: Any = experts_rows.backward(config, kept, Operand(*dy_rows, *dy_t), rows_t, dtypes)

    leaves: list[Any] = [t.double().requires_grad_() for t in (x, weights, up, down)]
    expected = exact(*leaves)
    expected.backward(dy.double())
    assert sqnr(expected[:84], y[:84]) > 22 and not y[84:].any()
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32, *dtypes]
    for mine, leaf in zip(got, leaves, strict=True):
        assert mine.shape == leaf.shape and sqnr(leaf.grad, mine) > 20
    assert not got.rows[84:].any() and not got.weights[84:].any()
    assert not got.up[1].any() and not got.down[1].any()


def test_scales_stay_powers_of_two(device):
    wide, weights = normal(S, 2 * INNER, device=device).bfloat16(), torch.rand(S, device=device)
    h = F.silu(wide[:, :INNER].double()) * wide[:, INNER:].double() * weights[:, None].double()
    for recipe in RECIPES.values():
        data, scale = experts_rows._weighted_h(config_of(recipe), wide, weights)
        assert sqnr(h, ops.dequantize(data, scale, out_dtype=torch.float32)) > 28
        is_power = torch.frexp(scale).mantissa.eq(0.5)
        assert bool(is_power.all()) == recipe.pow2_scale


@pytest.mark.large
def test_without_gradients_nothing_is_kept(device):
    up, down = weights_of(device)
    recipe, offsets = Recipe(), torch.tensor(OFFSETS, device=device).int()
    operands = experts_rows.quantize_weights([None, None], [up, down], recipe, NOTHING)
    assert all(operand.data_t is None for operand in operands)
    rows = Rows(*quantized(normal(S, K, device=device), recipe), offsets, None)
    _, kept = experts_rows.forward(config_of(recipe), operands, rows)
    assert [t for t in kept.tensors if t is not None] == [offsets]
