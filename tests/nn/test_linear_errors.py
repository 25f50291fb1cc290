"""Errors of a layer name the layer and its argument, whichever op found them: eager, in compiled
graphs and in exported ones."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn import Parameter

from torchext import Recipe
from torchext.nn import Linear
from torchext.ops.linear import op_options
from torchext.ops.linear_operands import layer_error, named_after_layer

RECIPES = [Recipe.deepseek_v3(), Recipe.rowwise(), Recipe.tensorwise()]
WRONG = r"torchext\.nn\.Linear: bias must have shape \[40\] .* \(got \[39\]\)"


def misfitting(device, recipe=None):
    layer = Linear(64, 40, device=device, recipe=recipe)
    layer.bias = Parameter(torch.zeros(39, device=device))
    return layer


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("trained", [True, False])
def test_a_bias_that_does_not_fit(recipe, trained, device):
    layer = misfitting(device, recipe).requires_grad_(trained)
    with pytest.raises(RuntimeError, match=WRONG) as error:
        layer(torch.zeros(8, 64, device=device))
    assert type(error.value) is RuntimeError
    assert "Error]" not in str(error.value)


def test_a_bias_of_another_device(device):
    """The error of a GPU's GEMM for a bias on another device, as the layer reports it."""
    layer, x = Linear(64, 40, device=device), torch.zeros(8, 64, device=device)
    found = RuntimeError("fp8_gemm_nt: bias must be on the device of a (got meta) [ValueError]")
    error = layer_error(found, x, layer.weight, torch.zeros(40, device="meta"))
    assert re.search(r"Linear: bias must be on device .* \(got meta\); move", str(error))


def test_a_bias_that_is_not_contiguous(device):
    """Only the GEMM finds this error; the layer keeps its class and remedy."""
    layer = Linear(64, 40, device=device)
    layer.bias = Parameter(torch.zeros(80, device=device)[::2])
    with pytest.raises(
        ValueError, match=r"^torchext\.nn\.Linear: bias must be contiguous"
    ) as error:
        layer(torch.zeros(8, 64, device=device))
    assert "ValueError]" not in str(error.value) and error.value.__suppress_context__


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_bias_that_does_not_fit_when_compiled(fullgraph, device):
    torch._dynamo.reset()
    compiled = torch.compile(misfitting(device), fullgraph=fullgraph, backend="aot_eager")
    with pytest.raises(Exception, match=WRONG) as error:
        compiled(torch.zeros(8, 64, device=device))
    assert fullgraph or type(error.value) is RuntimeError


@pytest.mark.parametrize("strict", [True, False])
def test_a_bias_that_does_not_fit_when_exported(strict, device):
    with pytest.raises(Exception, match=WRONG):
        torch.export.export(misfitting(device), (torch.zeros(8, 64, device=device),), strict=strict)


def test_an_exported_graph_that_is_given_another_bias(device):
    """The op's own check: a graph runs without Python of torchext."""
    x, layer = torch.zeros(8, 64, device=device), misfitting(device)
    with pytest.raises(RuntimeError, match=r"^torchext\.nn\.Linear: bias must have shape \[40\]"):
        torch.ops.torchext._linear(x, layer.weight, layer.bias, *op_options(layer.recipe))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"Linear: bias must have shape \[40\]"):
        torch.ops.torchext._linear(x, layer.weight, layer.bias, *op_options(layer.recipe))


def test_errors_of_backward_name_the_layer(device):
    """Hooks that change saved tensors lead to the GEMM's error, under the layer's name."""
    layer, x = Linear(64, 40, device=device), torch.randn(8, 64, device=device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.narrow(-1, 0, 1)):
        y = layer(x)
        with pytest.raises(ValueError, match=r"^torchext\.nn\.Linear: ") as error:
            y.sum().backward()
    assert "Error]" not in str(error.value)


def test_other_errors_stay_what_they_are():
    error = torch.OutOfMemoryError("CUDA out of memory")
    assert named_after_layer(error) is error
