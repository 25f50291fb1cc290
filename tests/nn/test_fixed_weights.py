"""torchext.fixed_weights: each weight is quantized once, on any device, and reused unchecked."""

from __future__ import annotations

import pytest
import torch

from support.linear_testing import (
    QUANTIZE_WEIGHT,
    OpCounter,
    assert_quantized_afresh,
    main_recipes,
    normal,
    normal_linear,
    train_step,
)
from support.weight_changes import RECORDED, copies_of, name_of, square_linear
from torchext import Recipe, fixed_weights
from torchext.nn import Linear

pytestmark = pytest.mark.large  # keeping weights does not depend on the kernels


@main_recipes
def test_fixed_weights_are_quantized_once(device, recipe):
    linear = normal_linear(device, recipe=recipe)
    x = normal(8, 200, device=device, grad=True)
    with OpCounter() as alone:
        y = train_step(linear, x)
    gradients = [p.grad for p in linear.parameters()]
    linear.zero_grad()
    linear.refresh_weight()
    with fixed_weights(linear), OpCounter() as counter:
        for _ in range(3):
            linear.zero_grad()
            assert torch.equal(train_step(linear, x), y)
        with torch.no_grad():
            assert torch.equal(linear.eval()(x), y)
            linear.train()
    for parameter, gradient in zip(linear.parameters(), gradients, strict=True):
        assert parameter.grad is not None and gradient is not None
        assert torch.equal(parameter.grad, gradient)
    of_x_and_dy = {name: 3 * n for name, n in alone.calls.items() if name not in QUANTIZE_WEIGHT}
    if recipe.granularity == "blockwise":  # only here do weights have a quantizer of their own
        assert alone.of(*QUANTIZE_WEIGHT) == counter.of(*QUANTIZE_WEIGHT) == 1
        assert counter.calls["quantize_1x128_dual"] == of_x_and_dy["quantize_1x128_dual"]


def test_fixed_weights_are_not_looked_at(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    with fixed_weights(linear):
        y = linear(x)
        linear.weight.data.mul_(0.5)  # not noticed, as documented
        assert torch.equal(linear(x), y)
        linear.refresh_weight()
        assert not torch.equal(linear(x), y)
        assert_quantized_afresh(linear, x, times=0)
    assert_quantized_afresh(linear, x)


@pytest.mark.parametrize("change", RECORDED, ids=name_of)
def test_recorded_changes_of_fixed_weights_are_seen(device, change):
    linear = square_linear(device)
    x = normal(8, 160, device=device, grad=True)
    with fixed_weights(torch.nn.Sequential(linear)):
        train_step(linear, x)
        linear(x)
        change(linear)
        assert_quantized_afresh(linear, x)
        assert_quantized_afresh(linear, x, times=0)


def test_fixed_weights_nest_and_end_with_the_last(device):
    layers = [square_linear(device), square_linear(device)]
    layers.append(layers[0])  # shared
    model = torch.nn.Sequential(*layers)
    x = normal(8, 160, device=device, grad=True)
    with fixed_weights(model):
        with fixed_weights(model[1]), OpCounter() as counter:
            model(x)
        model(x)
        with pytest.raises(KeyError), fixed_weights(model):
            raise KeyError
        for layer in layers:
            assert_quantized_afresh(layer, x, times=0)
        assert counter.of(*QUANTIZE_WEIGHT) == 2
    assert all(len(layer._weight_cache) == layer._weight_cache.fixed == 0 for layer in layers)
    for layer in layers:
        layer.weight.data.mul_(0.5)
        assert_quantized_afresh(layer, x)


def test_copies_of_fixed_layers_are_not_fixed(device):
    linear = square_linear(device)
    x = normal(8, 160, device=device)
    with fixed_weights(linear):
        linear(x)
        shallow, *copies = copies_of(linear)
        for clone in copies:
            clone.weight.data.mul_(0.5)
            assert_quantized_afresh(clone, x)
            clone.weight.data.mul_(0.5)
            assert_quantized_afresh(clone, x)
        shallow.weight = torch.nn.Parameter(shallow.weight.detach() * 0.5)
        assert_quantized_afresh(shallow, x)
    for clone in (shallow, *copies):
        clone.weight.data.mul_(0.5)
        assert_quantized_afresh(clone, x)


def test_fixed_weights_of_several_recipes(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    recipes = (Recipe.deepseek_v3(), Recipe.rowwise(), Recipe.deepseek_v3(pow2_scale=True))
    with fixed_weights(linear):
        for times in (1, 0, 0):
            for recipe in recipes:
                linear.recipe = recipe
                if recipe.granularity == "blockwise":
                    assert_quantized_afresh(linear, x, times=times)
        assert len(linear._weight_cache) == 2


def test_fixed_weights_wants_a_module():
    with (
        pytest.raises(
            TypeError, match=r"fixed_weights: model must be a torch\.nn\.Module \(got list"
        ),
        fixed_weights([Linear(8, 8)]),  # type: ignore[arg-type]
    ):
        pass
    with fixed_weights(torch.nn.ReLU()):  # a module without weights to fix
        pass


def test_captured_graph_sees_the_parameter(device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs: runs with --device cuda")
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    with torch.no_grad(), fixed_weights(linear):
        linear(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(x)
        linear.weight.mul_(0.5)
        linear.bias.mul_(0.5)
        graph.replay()
        assert torch.equal(y, linear(x))
