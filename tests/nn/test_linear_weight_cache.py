"""The FP8 weight of torchext.nn.Linear: kept until the parameter changes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from linear_testing import (
    assert_quantised_afresh,
    halve,
    main_recipes,
    normal,
    normal_linear,
    train_step,
)

from torchext import Recipe
from torchext.nn import Linear


@main_recipes
def test_weight_is_quantised_once_for_all_micro_steps(device, recipe):
    linear = normal_linear(device, recipe=recipe)
    x = normal(8, 200, device=device, grad=True)
    train_step(linear, x)
    first = linear._cached_weight
    for _ in range(3):
        train_step(linear, x)
    with torch.no_grad():
        linear(x)
    assert linear._cached_weight is first
    linear.weight.grad.zero_()
    assert linear._cached_weight is first


def test_gradient_accumulation_adds_up(device):
    accumulated, single = normal_linear(device), normal_linear(device)
    x = normal(2, 8, 200, device=device)
    for half in x:
        accumulated(half).sum().backward()
    gradients = []
    for half in x:
        single.zero_grad()
        single(half).sum().backward()
        gradients.append(single.weight.grad.clone())
    assert torch.equal(accumulated.weight.grad, gradients[0] + gradients[1])


class WritesThroughData(torch.optim.Optimizer):
    """An optimiser in the old style: autograd's version counter does not see it."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.5)


def _swap_data(linear: Linear) -> None:
    linear.weight.data = linear.weight.data * 0.5


def _transpose_data(linear: Linear) -> None:
    linear.weight.data = linear.weight.data.t()


def _load(linear: Linear) -> None:
    linear.load_state_dict({name: t * 0.5 for name, t in linear.state_dict().items()})


def _load_assign(linear: Linear) -> None:
    state = {name: t * 0.5 for name, t in linear.state_dict().items()}
    linear.load_state_dict(state, assign=True)


def _replace(linear: Linear) -> None:
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 0.5)


def _sgd(linear: Linear) -> None:
    torch.optim.SGD(linear.parameters(), lr=0.5).step()


def _adamw(linear: Linear) -> None:
    torch.optim.AdamW(linear.parameters(), lr=0.5).step()


def _old_optimizer(linear: Linear) -> None:
    WritesThroughData(linear.parameters()).step()


def _manual(linear: Linear) -> None:
    linear.weight.data.mul_(0.5)
    linear.refresh_weight()


def _bfloat16(linear: Linear) -> None:
    linear.to(torch.bfloat16)


def _recipe(linear: Linear) -> None:
    linear.recipe = Recipe.deepseek_v3(pow2_scale=True)


CHANGES = [
    halve,
    _swap_data,
    _transpose_data,
    _load,
    _load_assign,
    _replace,
    _sgd,
    _adamw,
    _old_optimizer,
    _manual,
    _bfloat16,
    _recipe,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_weight_is_quantised_anew_after(device, change: Callable[[Linear], None]):
    linear = normal_linear(device, 160, 160)
    x = normal(8, 160, device=device, grad=True)
    train_step(linear, x)
    assert_quantised_afresh(linear, x, times=0)
    change(linear)
    assert_quantised_afresh(linear, x)


def test_storage_freed_and_used_again_is_noticed(device):
    # `.data =` leaves the version counter alone, and an allocator may hand the old address out
    # again: only the storage's identity tells the two apart.
    linear = normal_linear(device, 160, 160)
    x = normal(8, 160, device=device)
    for scale in (0.5, 2.0, 4.0, 8.0):
        linear(x)
        values = linear.weight.detach() * scale
        linear.weight.data = torch.empty(0, device=device)
        linear.weight.data = values
        assert_quantised_afresh(linear, x)


def test_switch_of_mode_frees_the_cache(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    linear(x)
    linear.train()  # as it was: some trainers say so before every micro-step
    assert linear._cached_weight is not None
    linear.eval()
    assert linear._cached_weight is None
    linear(x)
    torch.nn.Sequential(linear).train()
    assert linear._cached_weight is None


def test_cached_weight_dies_with_the_layer(device):
    linear = normal_linear(device)
    linear(normal(8, 200, device=device))
    data = linear._cached_weight.quantized.data
    reference = torch.multiprocessing.reductions.StorageWeakRef(data.untyped_storage())
    del data, linear
    assert reference.expired()


def test_cache_is_not_copied_pickled_or_saved(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    y = linear(x)
    saved = io.BytesIO()
    torch.save(linear, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(linear),
        pickle.loads(pickle.dumps(linear)),
        torch.load(saved, weights_only=False),
    ]
    for clone in copies:
        assert type(clone) is Linear and clone.recipe == linear.recipe
        assert clone._cached_weight is None
        assert torch.equal(clone(x), y)
    assert set(linear.state_dict()) == {"weight", "bias"}
    assert not list(linear.buffers())
    assert linear._cached_weight is not None


def test_deepcopy_does_not_share_parameters(device):
    linear = normal_linear(device)
    clone = copy.deepcopy(linear)
    halve(clone)
    assert not torch.equal(clone.weight, linear.weight)


def test_inference_mode_then_training(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    with torch.inference_mode():
        y = linear(x)
    assert linear._cached_weight is not None
    assert torch.equal(train_step(linear, x.requires_grad_()), y)


def test_weights_made_in_inference_mode_are_not_cached(device):
    with torch.inference_mode():
        linear = normal_linear(device)
        x = normal(8, 200, device=device)
        before = linear(x)
        linear.weight.mul_(0.5)
        linear.bias.mul_(0.5)
        assert linear._cached_weight is None
        assert torch.equal(linear(x), before * 0.5)


def test_captured_graph_sees_the_parameter(device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs: runs with --device cuda")
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    with torch.no_grad():
        linear(x)  # fills the cache
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(x)
        linear.weight.mul_(0.5)
        linear.bias.mul_(0.5)
        graph.replay()
        assert torch.equal(y, linear(x))
