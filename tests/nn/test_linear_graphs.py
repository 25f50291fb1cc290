"""torchext.nn.Linear in graphs: torch.fx, TorchScript, torch.export, make_fx, fake tensors."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import torchext
from support.linear_testing import (
    every_recipe,
    gradient,
    main_recipes,
    normal,
    normal_linear,
    saved_tensors,
    train_step,
)
from torchext.nn import Linear
from torchext.ops.linear import linear_op

pytestmark = [
    pytest.mark.large,  # graphs do not depend on the kernels
    pytest.mark.filterwarnings(
        "ignore:.torch.jit", "ignore:.isinstance.treespec, LeafSpec", "ignore:.*is deprecated"
    ),
]


class Model(torch.nn.Module):
    def __init__(self, device, recipe=None) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(200, device=device)
        self.up = normal_linear(device, 200, 136, recipe)
        self.down = normal_linear(device, 136, 72, recipe, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def gradients(module: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    x.grad = None
    train_step(module, x)
    return {**{name: gradient(p) for name, p in module.named_parameters()}, "x": gradient(x)}


def assert_trains_like(module: torch.nn.Module, model: torch.nn.Module, x: Tensor) -> None:
    assert torch.equal(module(x), model(x))
    expected, got = gradients(model, x), gradients(module, x)
    assert got.keys() == expected.keys()
    for name, wanted in expected.items():
        assert got[name] is not None, f"no gradient for {name}"
        assert torch.equal(got[name], wanted), name


def targets(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op.startswith("call")]


# ---- torch.fx ----


@main_recipes
def test_symbolic_trace_calls_the_layer(device, recipe):
    model, x = Model(device, recipe), normal(8, 200, device=device, grad=True)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == [
        "norm",
        "up",
        "down",
    ]
    assert traced.up is model.up
    assert_trains_like(traced, model, x)
    again = torch.fx.symbolic_trace(copy.deepcopy(traced))
    assert str(again.graph) == str(traced.graph)
    assert_trains_like(again, model, x)


def test_symbolic_trace_of_a_layer_itself(device):
    linear, x = normal_linear(device), normal(8, 200, device=device, grad=True)
    traced: Any = torch.fx.symbolic_trace(linear)
    assert_trains_like(traced, linear, x)
    with torch.no_grad():
        traced.weight.mul_(0.5)  # the graph reads the parameter
    linear.load_state_dict(traced.state_dict())
    assert torch.equal(traced(x), linear(x))
    with torch.autocast(device.type, torch.bfloat16):
        assert traced(x).dtype == torch.bfloat16


def test_symbolic_trace_runs_hooks_once(device):
    linear, x = normal_linear(device), normal(8, 200, device=device)
    linear.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    linear.register_forward_hook(lambda module, args, output: output + 1)
    model = torch.nn.Sequential(linear)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))


class Doubles(Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_symbolic_trace_runs_what_surrounds_the_forward_once(device):
    x = normal(8, 200, device=device)
    replaced = normal_linear(device)
    forward = replaced.forward
    replaced.forward = lambda input: forward(input) + 1  # type: ignore[method-assign]
    for layer in (Doubles(200, 136, device=device), replaced):
        model = torch.nn.Sequential(layer)
        assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize(
    "parametrize", [parametrizations.weight_norm, torch.nn.utils.weight_norm], ids=["new", "old"]
)
def test_computed_weights_are_computed_in_graphs(device, parametrize):
    model, x = (
        torch.nn.Sequential(parametrize(normal_linear(device))),
        normal(8, 200, device=device),
    )
    for graph in (torch.fx.symbolic_trace(model), torch.jit.trace(model, x)):
        assert torch.equal(graph(x), model(x))
        y = graph(x)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "bias" not in name).mul_(2)
        assert torch.equal(graph(x), model(x)) and not torch.equal(graph(x), y)


# ---- TorchScript ----


@every_recipe
@pytest.mark.parametrize("used", [False, True])
def test_jit_trace(device, recipe, used):
    model, x = Model(device, recipe), normal(8, 200, device=device, grad=True)
    if used:
        train_step(model, x)  # the layer keeps FP8 weights, which must not get into the trace
    traced = torch.jit.trace(model, x, check_trace=True)
    assert_trains_like(traced, model, x)
    saved = io.BytesIO()
    torch.jit.save(traced, saved)
    saved.seek(0)
    loaded = torch.jit.load(saved)
    assert_trains_like(loaded, model, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
        for parameter in loaded.parameters():
            parameter.mul_(0.5)
    assert torch.equal(traced(x), model(x))
    assert torch.equal(loaded(x), model(x))
    wide = normal(2, 5, 200, device=device)  # a shape that the trace has not seen
    assert torch.equal(traced(wide), model(wide))


def test_jit_trace_follows_autocast(device):
    linear, x = normal_linear(device), normal(8, 200, device=device)
    traced = torch.jit.trace(linear, x)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(traced(x), linear(x)) and traced(x).dtype == torch.bfloat16
    assert traced(x).dtype == torch.float32


def test_jit_script_says_what_to_do(device):
    model = Model(device)
    with pytest.raises(NotImplementedError, match=r"use torch\.jit\.trace"):
        torch.jit.script(model)
    assert type(model.up) is Linear


# ---- torch.export ----


@pytest.mark.parametrize("strict", [False, True])
@main_recipes
def test_an_exported_model_trains(device, recipe, strict):
    model, x = Model(device, recipe), normal(8, 200, device=device, grad=True)
    program = export(model, (x.detach(),), strict=strict)
    assert targets(program.graph).count("torchext._linear.default") == 2
    assert_trains_like(program.module(), model, x)
    assert_trains_like(program.run_decompositions().module(), model, x)
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    assert_trains_like(torch.export.load(saved).module(), model, x)


def test_an_exported_model_trains_compiled(device):
    torch._dynamo.reset()
    model, x = Model(device), normal(8, 200, device=device, grad=True)
    module = export(model, (x.detach(),)).module()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    expected = gradients(model, x)
    module.zero_grad()
    x.grad = None
    with saved_tensors() as saved:
        y = compiled(x)
    assert sum(t.itemsize == 1 for t in saved) >= 4  # operands of backward, in FP8
    y.square().mean().backward()
    assert torch.equal(x.grad, expected["x"])
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_shapes(device, strict):
    model = Model(device).eval()
    x = normal(2, 8, 200, device=device)
    shapes = {"x": {0: Dim("batch", min=1, max=64), 1: Dim("length", min=1, max=512)}}
    program = export(model, (x,), dynamic_shapes=shapes, strict=strict)
    other = normal(3, 5, 200, device=device)
    assert torch.equal(program.module()(other), model(other))
    lowered = program.run_decompositions().module()
    assert torch.equal(lowered(other), model(other))


def test_export_under_autocast(device):
    model, x = Model(device), normal(8, 200, device=device)

    class Autocast(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            with torch.autocast(x.device.type, torch.bfloat16):
                return self.model(x)

    y = export(Autocast(), (x,)).module()(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, Autocast()(x))


def test_export_refuses_a_shape_that_does_not_fit(device):
    with pytest.raises(Exception, match=r"input must have shape \[\.\.\., 200\]"):
        export(Model(device).up, (torch.zeros(3, 199, device=device),), strict=False)


_RUNS_A_TRACE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
x = torch.load(sys.argv[3])
torch.save(torch.jit.load(sys.argv[2])(x), sys.argv[4])
assert "torchext" not in sys.modules
"""


def test_graphs_need_none_of_our_python(device, tmp_path):
    """Graphs run in a process that has loaded only the op library, as AOTInductor's packages do."""
    model, x = Model(device).eval().requires_grad_(False), normal(8, 200, device=device)
    torch.jit.save(torch.jit.trace(model, x), tmp_path / "model.pt")
    torch.save(x, tmp_path / "x.pt")
    library = Path(torchext.__file__).with_name("_C.so")
    paths = [library, *(tmp_path / name for name in ("model.pt", "x.pt", "y.pt"))]
    command = [sys.executable, "-W", "ignore", "-c", _RUNS_A_TRACE, *map(str, paths)]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "y.pt"), model(x))


# ---- flops ----


def flops(layer: Callable[[Tensor], Tensor], x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        layer(x).square().mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [(64, 200), (2, 5, 200)], ids=str)
@pytest.mark.parametrize("grad", [False, True])
@main_recipes
def test_flops_are_those_of_a_torch_linear(device, recipe, shape, grad):
    x = normal(*shape, device=device, grad=grad)
    expected = flops(torch.nn.Linear(200, 136, device=device), x)
    linear = normal_linear(device, recipe=recipe)
    assert flops(linear, x) == flops(linear, x) == expected > 0
    assert flops(torch.fx.symbolic_trace(linear), x) == expected
    assert flops(torch.export.export(linear, (x.detach(),)).module(), x) == expected


def test_flops_of_compiled_layers(device):
    torch._dynamo.reset()
    x = normal(64, 200, device=device, grad=True)
    compiled = torch.compile(normal_linear(device), backend="aot_eager")
    assert flops(compiled, x) == flops(torch.nn.Linear(200, 136, device=device), x)


def test_flops_of_transforms(device):
    # Calls the op: FlopCounterMode fails if a module is called within torch.func.grad.
    def count(layer: Callable[[Tensor], Tensor]) -> int:
        with FlopCounterMode(display=False) as counter:
            torch.vmap(torch.func.grad(lambda x: layer(x).sum()))(normal(3, 8, 200, device=device))
        return counter.get_total_flops()

    linear = normal_linear(device).requires_grad_(False)
    got = count(lambda x: linear_op(x, linear.weight, linear.bias, linear.recipe))
    assert got == count(lambda x: torch.nn.functional.linear(x, linear.weight)) > 0


# ---- make_fx, fake tensors ----


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_of_a_training_step(device, mode):
    linear, x = normal_linear(device), normal(8, 200, device=device)
    linear(x)

    def step(weight, bias, x):
        y = torch.func.functional_call(linear, {"weight": weight, "bias": bias}, (x,))
        return (y, *torch.autograd.grad(y.square().mean(), (weight, bias)))

    arguments = (linear.weight, linear.bias, x)
    graph = make_fx(step, tracing_mode=mode)(*arguments)
    for got, expected in zip(graph(*arguments), step(*arguments), strict=True):
        assert torch.equal(got, expected)
    assert not any(node.op == "get_attr" for node in graph.graph.nodes)  # nothing baked in


def test_make_fx_above_autograd(device):
    linear, x = normal_linear(device), normal(8, 200, device=device, grad=True)
    graph = make_fx(linear, pre_dispatch=True)(x.detach())
    assert "torchext._linear.default" in targets(graph.graph)
    (dx,) = torch.autograd.grad(graph(x).sum(), x)
    assert torch.equal(dx, torch.autograd.grad(linear(x).sum(), x)[0])


def test_make_fx_of_transforms(device):
    linear, x = normal_linear(device), normal(3, 8, 200, device=device)

    def each(x):
        return torch.vmap(torch.func.grad(lambda x: linear(x).square().mean()))(x)

    assert torch.equal(make_fx(each)(x)(x), each(x))


@main_recipes
def test_a_pass_on_fake_tensors_leaves_no_trace(device, recipe):
    linear, x = normal_linear(device, recipe=recipe), normal(2, 8, 200, device=device, grad=True)
    expected = gradients(copy.deepcopy(linear), x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        y = linear(fake)
        assert isinstance(y, FakeTensor) and y.shape == (2, 8, 136) and y.device.type == device.type
        copied = copy.deepcopy(linear)(fake)
        assert copied.dtype == x.dtype
    got = gradients(linear, x)
    for name, wanted in expected.items():
        assert torch.equal(got[name], wanted)


def test_functionalization(device):
    linear, x = normal_linear(device), normal(8, 200, device=device)

    def step(x):
        y = linear(x)
        y.mul_(2)
        return y

    assert torch.equal(torch.func.functionalize(step)(x), step(x))
    assert torch.equal(make_fx(torch.func.functionalize(step))(x)(x), step(x))
