"""torchext.delay_weight_gradients: the bits of backward, later."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchext
from torchext import Recipe, delay_weight_gradients


class Model(nn.Module):
    """Every kind of layer whose weight gradients can wait."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torchext.nn.Linear(128, 256)
        self.wide = torchext.nn.Linear(256, 256, recipe=Recipe(wgrad="wide"))
        self.gated = torchext.nn.SwiGLU(256, 128)
        self.mlp = torchext.nn.GELUMLP(256, 128, bias=True)
        self.experts = torchext.nn.MoE(256, 128, 4)
        self.plain = nn.Linear(256, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.gated(self.wide(self.first(x))))
        scores = torch.randn(len(x), 4, generator=torch.Generator().manual_seed(0))
        weights, ids = scores.softmax(-1).topk(2)
        return self.plain(self.experts(y, ids, weights))


DELAYED = {"first", "wide", "gated", "mlp", "experts"}


@pytest.fixture
def models() -> tuple[Model, Model]:
    torch.manual_seed(0)
    model = Model()
    return model, copy.deepcopy(model)


def loss(model: nn.Module, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return model(torch.randn(48, 128)).square().mean()


def test_gradients_have_the_bits_of_backward(models):
    expected, model = models
    loss(expected).backward()
    with delay_weight_gradients() as queue:
        loss(model).backward()
        without = {name for name, p in model.named_parameters() if p.grad is None}
        assert {name.partition(".")[0] for name in without} == DELAYED
        assert not any(name.endswith("bias") for name in without)
        assert len(queue) == len(without) == 9
        queue.run(2)
        assert len(queue) == 7
        queue.run()
        assert len(queue) == 0
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert p.grad.dtype == q.grad.dtype and torch.equal(p.grad, q.grad)


def test_micro_batches_add_up(models):
    expected, model = models
    for seed in range(3):
        loss(expected, seed).backward()
    with delay_weight_gradients() as queue:
        for seed in range(3):
            loss(model, seed).backward()
        queue.run()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)


def test_input_gradients_do_not_wait(models):
    expected, model = models
    found = []
    for m in (expected, model):
        x = torch.randn(48, 128, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with delay_weight_gradients() as queue:
            if m is expected:
                queue_of_expected = queue
            m(x).square().mean().backward()
            assert x.grad is not None
            found.append(x.grad)
            queue.run()
    assert len(queue_of_expected) == 0 and torch.equal(*found)


def test_a_weight_with_hooks_gets_its_gradient_in_backward():
    first, second = torchext.nn.Linear(128, 128), torchext.nn.Linear(128, 128)
    seen: list[Any] = []
    first.weight.register_hook(lambda grad: seen.append(grad is not None))
    second.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad is not None))
    with delay_weight_gradients() as queue:
        second(first(torch.randn(4, 128))).sum().backward()
        assert len(queue) == 0
    assert seen == [True, True]


def test_frozen_and_computed_weights_get_what_backward_gives():
    frozen, computed = torchext.nn.Linear(128, 128), torchext.nn.Linear(128, 128)
    frozen.weight.requires_grad_(False)
    nn.utils.parametrizations.weight_norm(computed)
    with delay_weight_gradients() as queue:
        computed(frozen(torch.randn(4, 128))).sum().backward()
        assert len(queue) == 0
    assert all(p.grad is not None for p in computed.parameters())


def test_gradients_that_are_differentiated_do_not_wait():
    layer = torchext.nn.Linear(128, 128)
    with delay_weight_gradients() as queue:
        layer(torch.randn(4, 128)).sum().backward(create_graph=True)
        assert len(queue) == 0 and layer.weight.grad is not None


def test_compiled_layers_compute_in_backward(models):
    expected, model = models
    loss(expected.first).backward()
    torch._dynamo.reset()
    model.first.compile(backend="aot_eager")
    with delay_weight_gradients() as queue:
        loss(model.first).backward()
        assert len(queue) == 0
    assert torch.equal(model.first.weight.grad, expected.first.weight.grad)

    @torch.compile(backend="eager", fullgraph=True)
    def opens(x: Tensor) -> Tensor:
        with delay_weight_gradients():
            return x + 1

    with pytest.raises(Exception, match="must not be opened in a compiled function"):
        opens(torch.ones(1))


def test_errors():
    layer = torchext.nn.Linear(128, 128)

    def leave(reason: str | None = None) -> None:
        with delay_weight_gradients():
            layer(torch.randn(4, 128)).sum().backward()
            if reason is not None:
                raise KeyError(reason)

    with pytest.raises(RuntimeError, match=r"queue.run\(\) must compute all .*got 1 left"):
        leave()
    with pytest.raises(KeyError, match="which what is left must not hide"):
        leave("which what is left must not hide")
    with delay_weight_gradients() as queue:
        with pytest.raises(ValueError, match="count must not be negative"):
            queue.run(-1)
        layer(torch.randn(4, 128)).sum().backward()
        layer.weight.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="must keep their memory until"):
            queue.run()
