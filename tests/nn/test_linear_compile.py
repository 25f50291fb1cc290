"""torchext.nn.Linear under torch.compile: one graph each way, and the same numbers."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from support.linear_testing import (
    assert_quantized_afresh,
    gradient,
    halve,
    main_recipes,
    normal,
    normal_linear,
    saved_tensors,
    train_step,
)
from torchext.nn import Linear


@main_recipes
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [(8, 200), (2, 5, 200)], ids=str)
def test_compile_gives_one_graph_each_way(device, recipe, backend, shape):
    graphs: collections.Counter[str] = collections.Counter()

    def counted(direction: str):
        def compiler(module, inputs):
            graphs[direction] += 1
            if backend == "aot_eager":
                return make_boxed_func(module.forward)
            return compile_fx_inner(module, inputs)

        return compiler

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    torch._dynamo.reset()
    eager, linear = normal_linear(device, recipe=recipe), normal_linear(device, recipe=recipe)
    x = normal(*shape, device=device, grad=True)
    compiled = torch.compile(
        linear,
        fullgraph=True,
        backend=aot_autograd(
            fw_compiler=counted("forward"),
            bw_compiler=counted("backward"),
            decompositions=select_decomp_table(),
        ),
    )
    with saved_tensors() as saved:
        y = compiled(x)
    y.square().mean().backward()
    dx, x.grad = x.grad, None
    assert torch.equal(y, train_step(eager, x))
    assert torch.equal(dx, x.grad)
    assert torch.equal(gradient(linear.weight), gradient(eager.weight))
    if recipe.granularity == "blockwise":
        assert torch.equal(gradient(linear.bias), gradient(eager.bias))
    torch.testing.assert_close(linear.bias.grad, eager.bias.grad)  # the order of torch's sum varies
    assert all(t.itemsize == 1 for t in saved if t.numel() >= x.numel())

    halve(linear)
    linear.weight.grad = None
    compiled(x).square().mean().backward()
    fresh = Linear.from_linear(torch.nn.Linear(200, 136, device=device), recipe)
    fresh.load_state_dict(linear.state_dict())
    train_step(fresh, x)
    assert torch.equal(gradient(linear.weight), gradient(fresh.weight))
    assert graphs == {"forward": 1, "backward": 1}
    assert len(linear._weight_cache) == 0


def test_compile_default_backend_with_autocast_and_optimizer(device):
    torch._dynamo.reset()
    linear, eager = normal_linear(device), normal_linear(device)
    compiled: Any = torch.compile(linear, fullgraph=True)
    x = normal(8, 200, device=device, grad=True)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (linear, eager)]
    for _ in range(3):
        for layer, optimizer in zip((compiled, eager), optimizers, strict=True):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                y = layer(x)
            assert y.dtype == torch.bfloat16
            y.float().square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(linear.weight, eager.weight)
    torch.testing.assert_close(linear.bias, eager.bias)


def test_compile_frozen_weight(device):
    torch._dynamo.reset()
    linear = normal_linear(device).requires_grad_(False)
    x = normal(8, 200, device=device, grad=True)
    y = torch.compile(linear, fullgraph=True)(x)
    y.sum().backward()
    dx, x.grad = x.grad, None
    linear(x).sum().backward()
    assert torch.equal(dx, x.grad)


def test_compiled_optimizer_does_not_recompile(device):
    # The FP8 weight of an eager layer must not become a guard of the optimizer's graph.
    torch._dynamo.reset()
    linear = normal_linear(device)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    x = normal(8, 200, device=device)
    counter = CompileCounter()
    step = torch.compile(optimizer.step, backend=counter)
    for _ in range(4):
        train_step(linear, x)
        step()
        assert_quantized_afresh(linear, x)
    assert counter.frame_count <= 1
