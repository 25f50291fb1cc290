"""convert_to_fp8_training of layers of other classes than torch.nn.Linear, and unconvert."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.linear_testing import (
    QUANTIZE_WEIGHT,
    OpCounter,
    gradient,
    main_recipes,
    normal,
    train_step,
)
from torchext import Recipe, convert_to_fp8_training, fixed_weights, revert_to_linear, unconvert
from torchext.nn import Linear
from torchext.nn.converted import TransposedLinear

pytestmark = pytest.mark.large  # the classes do not depend on the kernels


class Own(nn.Linear):
    """A subclass that inherits the forward, as torchtitan's Linear does."""

    def __init__(self, *arguments: Any, init_std: float = 0.02) -> None:
        super().__init__(*arguments)
        self.init_std = init_std

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, init_std={self.init_std}"


class OwnPickle(Own):
    def __reduce__(self) -> Any:
        return _rebuilt, (self.weight.detach(), self.bias.detach())


def _rebuilt(weight: Tensor, bias: Tensor) -> OwnPickle:
    layer = OwnPickle(*reversed(weight.shape))
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


class Conv1D(nn.Module):
    """A layer with the parameters and the forward of transformers' class of that name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.size()[:-1], self.nf)


def make(kind: type, device: torch.device) -> Any:
    torch.manual_seed(0)
    layer = Own(200, 136) if kind is Own else Conv1D(136, 200)
    return layer.to(device)


kinds = pytest.mark.parametrize("kind", [Own, Conv1D])


def as_linear(layer: nn.Module, recipe: Recipe) -> Linear:
    """A torchext.nn.Linear with the values of `layer`."""
    weight: Any = layer.weight.detach()  # type: ignore[union-attr, operator]
    weight = weight if isinstance(layer, nn.Linear) else weight.t()
    linear = Linear(200, 136, device=weight.device, recipe=recipe)
    linear.load_state_dict({"weight": weight, "bias": layer.bias.detach()})  # type: ignore
    return linear


def results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = train_step(layer, x)
    dw, db = (gradient(parameter) for parameter in layer.parameters())
    return [y.detach(), gradient(x), dw if isinstance(layer, nn.Linear) else dw.t(), db]


def assert_agree(found: list[Tensor], expected: list[Tensor], wide: tuple[str, ...]) -> None:
    """The bits agree; but PyTorch sums a wide product in another order if its weight is transposed,
    on some machines."""
    for gemm, result, wanted in zip(("fprop", "dgrad", "wgrad", ""), found, expected, strict=True):
        if gemm in wide:
            limit = 2**-7 * wanted.abs().max().item()
            torch.testing.assert_close(result, wanted, rtol=2**-7, atol=limit)
        else:
            assert torch.equal(result, wanted)


@kinds
@main_recipes
@pytest.mark.parametrize("wide", [(), ("fprop",), ("dgrad", "wgrad")], ids="+".join)
def test_the_bits_are_those_of_the_fp8_linear(device, kind, recipe, wide):
    recipe = Recipe.parse(" + ".join([str(recipe), *(f"{gemm} wide" for gemm in wide)]))
    layer, x = make(kind, device), normal(3, 24, 200, device=device)
    linear = as_linear(layer, recipe)
    assert convert_to_fp8_training(layer, recipe).converted == ("",)
    for _ in range(2):  # the second time with a weight that was kept
        assert_agree(results(layer, x), results(linear, x), wide)
    with torch.autocast(device.type, torch.bfloat16):
        assert_agree(results(layer, x), results(linear, x), wide)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), linear.eval()(x))
        assert torch.equal(torch.vmap(layer)(x), torch.vmap(linear)(x))


@kinds
def test_compiled(device, kind):
    torch._dynamo.reset()
    layer, x = make(kind, device), normal(24, 200, device=device)
    convert_to_fp8_training(layer)
    expected = results(layer, x)
    layer.compile(backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, results(layer, x), expected))
    exported = torch.export.export(layer, (x,)).module()
    assert torch.equal(exported(x), layer(x))


@kinds
def test_traced_symbolically(device, kind):
    model, x = nn.Sequential(nn.ReLU(), make(kind, device)), normal(24, 200, device=device)
    convert_to_fp8_training(model)
    layer, traced = model[1], torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes][1:-1] == ["call_module", "call_module"]
    assert all(map(torch.equal, results(traced, x), results(model, x)))
    assert torch.equal(torch.fx.symbolic_trace(layer)(x), layer(x))
    layer.register_forward_hook(lambda module, args, y: y + 1)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@kinds
def test_an_instance_of_both_classes(device, kind):
    layer = make(kind, device)
    convert_to_fp8_training(layer)
    assert isinstance(layer, kind) and isinstance(layer, (Linear, TransposedLinear))
    assert isinstance(layer, nn.Linear) == (kind is Own)  # Conv1D's weight has another layout
    text = repr(layer)
    assert text.startswith(f"FP8{kind.__name__}(") and text.endswith("fp8=blockwise)")
    assert kind is Conv1D or "init_std=0.02" in text
    other = make(kind, device)
    convert_to_fp8_training(other)
    assert type(layer) is type(other)


@kinds
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL, "deepcopy", "torch.save"])
def test_copies(device, kind, protocol):
    layer, x = make(kind, device), normal(4, 200, device=device)
    convert_to_fp8_training(layer, Recipe.rowwise())
    if protocol == "deepcopy":
        copied = copy.deepcopy(layer)
    elif protocol == "torch.save":
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    else:
        copied = pickle.loads(pickle.dumps(layer, protocol=protocol))
    assert type(copied) is type(layer) and copied.recipe == Recipe.rowwise()
    assert torch.equal(copied(x), layer(x))
    assert unconvert(copied) == ("",) and type(copied) is kind
    assert isinstance(layer, (Linear, TransposedLinear))


def test_a_class_that_pickles_itself_still_does():
    layer = OwnPickle(128, 128)
    convert_to_fp8_training(layer)
    assert type(copy.deepcopy(layer)) is OwnPickle


@kinds
def test_weights_are_kept_and_dropped(device, kind):
    layer, x = make(kind, device), normal(4, 200, device=device)
    convert_to_fp8_training(layer)
    layer(x)
    with OpCounter() as counter:
        layer(x)
    assert counter.of(*QUANTIZE_WEIGHT) == 0 or not x.is_cpu
    with fixed_weights(layer), torch.no_grad():
        before = layer(x)
        layer.weight.data.mul_(2)  # not recorded
        assert torch.equal(layer(x), before)
        layer.refresh_weight()
        assert not torch.equal(layer(x), before)
    with torch.no_grad():
        layer.weight.zero_()
        torch.testing.assert_close(layer(x), layer.bias.expand(4, -1).clone())
        assert layer.half()(x.half()).dtype == torch.float16


def test_errors_name_the_layer(device):
    layer = make(Conv1D, device)
    convert_to_fp8_training(layer)
    with pytest.raises(RuntimeError, match=r"^torchext\.nn\.Linear: input must have shape"):
        layer(normal(4, 100, device=device))


# ---- what is not converted ----


class OtherProduct(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class OtherArguments(Conv1D):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + y


class OwnCall(Own):
    def __call__(self, *arguments: Any) -> Any:
        return super().__call__(*arguments) * 2


class OwnRecipe(Own):
    recipe = "with salt"


@pytest.mark.parametrize("make_layer", [OtherProduct, OtherArguments, OwnCall, OwnRecipe])
def test_layers_that_do_more_are_left_alone(make_layer):
    layer = make_layer(128, 128)
    with pytest.warns(UserWarning, match="no parameter"):
        convert_to_fp8_training(layer, module_filter_fn=lambda module, name: True)
    assert type(layer) is make_layer


def test_filters_know_the_sizes_of_transposed_layers():
    model: Any = nn.Sequential(Conv1D(64, 128), Conv1D(128, 128))
    model.lm_head = Conv1D(256, 128)
    result = convert_to_fp8_training(model)
    assert result.converted == ("1",)
    assert result.skipped["0"].startswith("fewer than 128")
    assert result.skipped["lm_head"].startswith("output head")
    assert {p.name: p.saved_bytes for p in result.parameters if p.recipe} == {"1.weight": 132}
    meta = nn.Sequential(Conv1D(256, 128)).to("meta")
    assert convert_to_fp8_training(meta).converted == ("0",)


# ---- unconvert ----


def test_unconvert_restores_classes_parameters_hooks_and_state(device):
    model: Any = nn.Sequential(nn.Linear(200, 200), Own(200, 200), Conv1D(200, 200))
    model = model.to(device).eval()
    calls: list[nn.Module] = []
    for layer in model:
        layer.register_forward_hook(lambda module, args, output: calls.append(module))
    x = normal(4, 200, device=device)
    kinds, text, y = [type(m) for m in model.modules()], repr(model), model(x)
    parameters, state = list(model.parameters()), copy.deepcopy(model.state_dict())
    attributes = [set(vars(layer)) for layer in model]
    for recipe in (Recipe(), Recipe.parse("rowwise+wgrad=bf16")):
        assert convert_to_fp8_training(model, recipe).converted == ("0", "1", "2")
        assert list(model.state_dict()) == list(state)
        assert not torch.equal(model(x), y)
        assert unconvert(model) == ("0", "1", "2")
    assert [type(module) for module in model.modules()] == kinds and repr(model) == text
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [set(vars(layer)) for layer in model] == attributes
    calls.clear()
    assert torch.equal(model(x), y) and calls == list(model)
    assert unconvert(model) == ()


def test_unconvert_refuses_what_it_did_not_make():
    class Derived(Linear):
        pass

    model = nn.Sequential(Linear(128, 128), Derived(128, 128))
    with pytest.raises(TypeError, match=r"^unconvert: 1 must be a torchext\.nn\.Linear \(got its"):
        unconvert(model)
    assert type(model[0]) is Linear
    with pytest.raises(TypeError, match=r"^unconvert: model must be a torch\.nn\.Module"):
        unconvert("model")  # type: ignore[arg-type]


def test_the_old_name_is_deprecated():
    model = nn.Sequential(Linear(128, 128))
    with pytest.warns(DeprecationWarning, match=r"call torchext\.unconvert") as caught:
        assert revert_to_linear(model) == ("0",)
    assert caught[0].filename == __file__
