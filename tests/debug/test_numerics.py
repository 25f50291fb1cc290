"""torchext.debug.numerics: what it observes, what it costs, and how it reports."""

from __future__ import annotations

import builtins
import copy
import csv
import io
import json
import math
import types
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import torchext
from support.linear_testing import main_recipes, normal, sqnr
from torchext import Recipe, convert_to_fp8_training, debug, quantize_for_inference
from torchext.debug.experts_numerics import observable
from torchext.debug.numerics import _add_quantized
from torchext.nn import Linear, MoE
from torchext.ops.linear_function import Operand

from ..test_experts import Experts, Sorted, Transposed

pytestmark = pytest.mark.large  # what is observed does not depend on the kernels


def two_layers(device: torch.device, recipe: Recipe | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 136, **options), nn.GELU(), nn.Linear(136, 200, **options))
    convert_to_fp8_training(model.to(device), recipe, fuse=False)
    return model


def entry(report: debug.NumericsReport, layer: str, gemm: str) -> debug.GemmNumerics:
    return next(g for g in report.gemms if (g.layer, g.gemm) == (layer, gemm))


def _keep(y: Tensor, seen: dict[str, Tensor]) -> None:
    y.register_hook(lambda dy: seen.update(dy=dy))


@main_recipes
def test_figures_are_those_of_the_tensors(device, recipe):
    model = two_layers(device, recipe)
    first = model[0]
    x = normal(3, 24, 200, device=device, grad=True)
    seen: dict[str, Tensor] = {}
    first.register_forward_hook(lambda m, a, y: _keep(y, seen))
    with debug.numerics(model) as report:
        y = first(x)
        model[2](model[1](y)).square().sum().backward()
    assert [(g.layer, g.gemm) for g in report.gemms] == [
        (layer, gemm) for layer in ("0", "2") for gemm in ("fprop", "dgrad", "wgrad")
    ]
    dy = seen["dy"]
    exact = {
        "fprop": (nn.functional.linear(x.double(), first.weight.double(), first.bias.double()), y),
        "dgrad": (dy.double() @ first.weight.double(), x.grad),
        "wgrad": (dy.double().flatten(0, 1).T @ x.double().flatten(0, 1), first.weight.grad),
    }
    amax = {"input": x, "weight": first.weight, "grad": dy}
    for gemm, (wide, result) in exact.items():
        got = entry(report, "0", gemm)
        assert got.fp8 and got.samples == 1
        # The SQNR is that of the layer's own result: the observer's has the same bits.
        assert got.sqnr == pytest.approx(sqnr(wide, result), abs=1e-3)
        for name, operand in got.operands.items():
            assert operand.amax == amax[name].abs().max().item()
            limit = torch.finfo(getattr(recipe, f"{name}_dtype")).max
            # A group may be smaller than the tensor, so only the largest scale is known.
            assert operand.scale_max == pytest.approx(operand.amax / limit, rel=1e-6)
            assert operand.saturation == 0 and operand.nonfinite == 0
    assert report.first_nonfinite is None and report.unobserved == ()


def test_underflow_is_the_share_of_elements_that_become_zero(device):
    layer = Linear(128, 128, bias=False, device=device)
    x = torch.ones(64, 128, device=device)
    x[:, :32], x[:, 32:48] = 1e-6, 0  # smallest e4m3 is 2^-9 / 448 of the largest
    with debug.numerics(layer) as report:
        layer(x)
        layer(torch.ones(64, 128, device=device))
    operand = entry(report, "", "fprop").operands["input"]
    assert operand.underflow == pytest.approx(32 / 128 / 2) and operand.saturation == 0


def test_saturation_is_the_share_of_elements_beyond_the_largest_value(device):
    values = torch.linspace(-2, 2, 128 * 4, device=device).view(4, 128)
    data, scale = torchext.ops.quantize_1x128(values.clamp(-1, 1))
    operand = debug.OperandNumerics()
    _add_quantized(operand, values, Operand(data, scale, None, None))
    assert operand.saturation == (values.abs() > 1).double().mean().item() == 0.5


def test_tiny_weights_underflow(device):
    layer = Linear(128, 128, device=device)
    layer.weight.data.fill_(1e-43)  # scales are not smaller than the smallest normal number
    with debug.numerics(layer) as report:
        layer(normal(4, 128, device=device))
    weight = entry(report, "", "fprop").operands["weight"]
    assert weight.underflow == 1 and weight.scale_min == torch.finfo(torch.float32).tiny


def test_wide_gemms_and_frozen_layers(device):
    model = two_layers(device, Recipe.parse("blockwise+wgrad=bf16"))
    model[2].requires_grad_(False)
    with debug.numerics(model) as report:
        model(normal(4, 200, device=device)).sum().backward()
    # The model's input needs no gradient, and the second layer's weight has none.
    assert [(g.layer, g.gemm) for g in report.gemms] == [
        ("0", "fprop"), ("0", "wgrad"), ("2", "fprop"), ("2", "dgrad"),
    ]  # fmt: skip
    wgrad = entry(report, "0", "wgrad")
    assert not wgrad.fp8 and wgrad.operands["grad"].scale_min is None
    assert wgrad.sqnr is not None and wgrad.sqnr > 120
    assert "not in FP8" in str(report)


def test_low_precision_and_autocast(device):
    model = two_layers(device).bfloat16()
    with debug.numerics(model) as report:
        model(normal(4, 200, device=device).bfloat16()).sum().backward()
    model = two_layers(device)
    with debug.numerics(model) as mixed, torch.autocast(device.type, torch.bfloat16):
        model(normal(4, 200, device=device)).sum().backward()
    for gemm in (*report.gemms, *mixed.gemms):
        assert gemm.sqnr is not None and 20 < gemm.sqnr < 60


# ---- the first NaN or infinity ----


def origin(report: debug.NumericsReport) -> tuple[str, str, str, str]:
    found = report.first_nonfinite
    assert found is not None
    return found.layer, found.gemm, found.operand, found.value


@pytest.mark.parametrize("value, name", [(math.nan, "nan"), (-math.inf, "inf")])
def test_first_nonfinite_operand(device, value, name):
    def observe(poison) -> debug.NumericsReport:
        model = two_layers(device)
        x = normal(4, 200, device=device, grad=True)
        with debug.numerics(model) as report:
            poison(model, x)
            model(x).sum().backward()
        return report

    def poison_gradient(model, x):
        model[1].register_full_backward_hook(lambda m, gi, go: (torch.full_like(gi[0], value),))

    def poison_activation(model, x):
        model[1].register_forward_hook(lambda m, a, y: torch.full_like(y, value))

    report = observe(lambda model, x: x.data[0].fill_(value))
    assert origin(report) == ("0", "fprop", "input", name)
    assert str(report.first_nonfinite) == f"first {name}: input, fprop of 0, forward 1"
    report = observe(lambda model, x: model[2].weight.data[3, 3].fill_(value))
    assert origin(report) == ("2", "fprop", "weight", name)
    report = observe(lambda model, x: model[2].bias.data[3].fill_(value))
    assert origin(report) == ("2", "fprop", "bias", name)
    report = observe(poison_activation)
    assert origin(report) == ("2", "fprop", "input", name)
    assert str(report).splitlines()[-1].endswith("the last finite result was that of 0 (fprop)")
    report = observe(poison_gradient)
    assert origin(report)[::2] == ("0", "grad") and origin(report)[3] == name
    assert "that of 2 (wgrad)" in str(report)


def test_overflow_of_a_result(device):
    layer = Linear(128, 128, device=device, dtype=torch.float16)
    layer.weight.data.fill_(60000)
    with debug.numerics(layer) as report:
        layer(torch.full((4, 128), 100.0, device=device, dtype=torch.float16))
    assert origin(report)[2:] == ("output", "inf")
    fprop = entry(report, "", "fprop")
    assert fprop.sqnr is None and fprop.operands["input"].nonfinite == 0


# ---- cost, and which forwards are observed ----


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_nothing_is_dispatched_when_off(device):
    model, x = two_layers(device), normal(4, 200, device=device, grad=True)

    def ops_of_a_step() -> int:
        with Ops() as ops:
            model(x).sum().backward()
        return ops.count

    ops_of_a_step()  # fills the weights' caches
    model.zero_grad()
    plain = ops_of_a_step()
    with debug.numerics(model, every=3) as report:
        counts = [ops_of_a_step() for _ in range(7)]
    assert [count > plain for count in counts] == [True, False, False, True, False, False, True]
    assert counts[1] == counts[2] == plain == ops_of_a_step()
    assert entry(report, "2", "wgrad").samples == 3
    assert not any(layer._forward_hooks for layer in model)


def test_results_do_not_change(device):
    model, x = two_layers(device), normal(4, 200, device=device, grad=True)

    def step() -> list[Tensor]:
        y = model(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, *model.parameters()))]

    expected = step()
    with debug.numerics(model):
        assert all(map(torch.equal, step(), expected))


def test_layers_of_a_fused_mlp_are_observed(device):
    separate, x = two_layers(device), normal(4, 200, device=device, grad=True)
    fused = copy.deepcopy(separate)
    assert convert_to_fp8_training(fused).fused == {"": "GELU"}
    reports = []
    for model in (separate, fused):
        with debug.numerics(model) as report:
            model(x).sum().backward()
        reports.append(str(report))
    assert reports[0] == reports[1]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_forwards_count_once(device, use_reentrant):
    model, x = two_layers(device), normal(4, 200, device=device, grad=True)
    with debug.numerics(model, every=2) as report:
        for _ in range(4):
            checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    assert {g.samples for g in report.gemms} == {2} and len(report.gemms) == 6


def test_what_cannot_be_observed_is_listed(device):
    model = two_layers(device)
    with debug.numerics(model) as report:
        torch.vmap(model[0])(normal(2, 4, 200, device=device))
    assert report.unobserved == ("0", "2") and report.gemms == ()
    assert str(report).splitlines()[-1] == "not observed: 0, 2"


@pytest.mark.parametrize("kind", ["choices", "transposed", "sorted"])
def test_experts(device, kind):
    """A layer for each parameter; figures are those of all rows."""
    torch.manual_seed(0)
    made: dict[str, Any] = {"choices": Experts, "transposed": Transposed, "sorted": Sorted}
    model = nn.ModuleDict({"experts": made[kind]()}).to(device)
    assert convert_to_fp8_training(model).converted == ("experts",)
    x = normal(24, 128, device=device, grad=True)
    if kind == "sorted":
        arguments: tuple[Tensor, ...] = (torch.tensor([10, 0, 14, 0], device=device),)
    else:
        chosen = torch.tensor([[0, 2], [2, 0]] * 12, device=device)
        arguments = chosen, torch.rand(24, 2, device=device)
    experts: Any = model["experts"]
    expected = experts(x, *arguments)
    with debug.numerics(model, every=2) as report:
        for _ in range(2):
            y = experts(x, *arguments)
            y.square().sum().backward()
    assert torch.equal(y, expected) and report.unobserved == ()
    names = [f"experts.{name}" for name in experts.fused_roles.parameters]
    assert {(g.layer, g.gemm) for g in report.gemms} == {
        (name, gemm) for name in names for gemm in ("fprop", "dgrad", "wgrad")
    }
    assert all(g.samples == 1 and g.sqnr is not None and 20 < g.sqnr < 45 for g in report.gemms)
    first, last = entry(report, names[0], "fprop"), entry(report, names[-1], "wgrad")
    assert first.operands["input"].amax == x.abs().max().item()
    weight = experts.get_parameter(experts.fused_roles.parameters[0])[::2]  # without rows: none
    assert first.operands["weight"].amax == weight.abs().max().item()
    factors = 1 if kind == "sorted" else arguments[1].flatten()[:, None]
    dy = (2 * y.detach()).repeat_interleave(1 if kind == "sorted" else 2, 0) * factors
    assert last.operands["grad"].amax == pytest.approx(dy.abs().max().item(), rel=1e-6)


def test_experts_of_the_house(device):
    """torchext.nn.MoE, with two leading dimensions, choices of no expert and a shared expert."""
    torch.manual_seed(0)
    layer = MoE(128, 136, 4, shared_intermediate_size=128, device=device)
    x = normal(2, 12, 128, device=device, grad=True)
    ids, weights = torch.tensor([0, 2, -1], device=device), torch.rand(2, 12, 3, device=device)
    ids = ids.expand(2, 12, 3)
    expected = layer(x, ids, weights)
    with debug.numerics(layer) as report:
        y = layer(x=x, topk_idx=ids, topk_weights=weights)
        y.sum().backward()  # its gradient is expanded
    assert sqnr(expected, y) > 30 and report.unobserved == ()  # the shared expert is not fused
    names = ["gate_up_proj", "down_proj"]
    shared = [f"shared_experts.{name}_proj" for name in ("gate", "up", "down")]
    assert {(g.layer, g.gemm) for g in report.gemms} == {
        (name, gemm) for name in names + shared for gemm in ("fprop", "dgrad", "wgrad")
    }
    assert all(g.samples == 1 and g.sqnr is not None and 20 < g.sqnr < 45 for g in report.gemms)
    assert entry(report, names[0], "fprop").operands["input"].amax == x.abs().max().item()
    weight = layer.get_parameter("down_proj")[::2]  # the others have no rows
    assert entry(report, names[1], "fprop").operands["weight"].amax == weight.abs().max().item()
    dy = entry(report, names[1], "wgrad").operands["grad"]
    assert dy.amax == weights[..., :2].max().item()


def test_what_experts_cannot_show(device):
    """Tokens from other ranks, and weights that do not train."""
    layer = MoE(128, 128, 4, device=device)
    ids, ones = (torch.ones(3, 1, device=device, dtype=t) for t in (torch.int64, torch.float32))
    arguments = normal(3, 128, device=device), ids, ones
    for ranks in (1, 2):
        layer.dispatcher = cast(Any, types.SimpleNamespace(num_ranks=ranks))
        assert (observable(layer, arguments, {}) is None) == (ranks == 2)
    layer.dispatcher = None
    quantize_for_inference(layer)
    with debug.numerics(layer) as report:
        layer(*arguments)
    assert report.gemms == report.unobserved == ()


def test_empty_batches_and_keyword_arguments(device):
    layer = Linear(128, 128, device=device)
    with debug.numerics(layer) as report:
        layer(input=torch.empty(0, 128, device=device)).sum().backward()
        layer(input=torch.ones(2, 128, device=device))
    assert entry(report, "", "fprop").operands["input"].amax == 1


# ---- formats ----


@pytest.fixture
def report(device):
    model = two_layers(device, Recipe.parse("rowwise+wgrad=bf16"))
    with debug.numerics(model, every=2) as report:
        model(normal(4, 200, device=device, grad=True)).sum().backward()
    return report


def test_text(report):
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "layer", "GEMM", "operand", "amax", "scales", "underflow", "saturated", "SQNR",
    ]  # fmt: skip
    assert lines[1].split()[:3] == ["0", "fprop", "input"] and lines[1].endswith(" dB")
    assert lines[2].split()[0] == "weight"
    assert len(lines) == 1 + 12 + 1 and lines[-1] == "every observed value is finite"
    assert repr(report) == "<NumericsReport: 6 GEMMs, all finite; print() shows all>"


def test_csv_and_json(report):
    plain = json.loads(report.to_json(indent=1))
    assert plain["every"] == 2 and plain["first_nonfinite"] is None
    assert len(plain["gemms"]) == 6
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert len(rows) == 12
    for row, expected in zip(rows, report.rows(), strict=True):
        assert (row["layer"], row["gemm"], row["operand"]) == (
            expected["layer"], expected["gemm"], expected["operand"],
        )  # fmt: skip
        assert float(row["amax"]) == expected["amax"]
        assert row["scale_max"] == "" or float(row["scale_max"]) == expected["scale_max"]
    operand = plain["gemms"][0]["operands"]["input"]
    assert operand["amax"] == report.gemms[0].operands["input"].amax


def test_plot(report, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "numerics.svg")
    assert (tmp_path / "numerics.svg").read_text().startswith("<?xml")
    original = builtins.__import__

    def without_matplotlib(name, *arguments):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ModuleNotFoundError, match=r"NumericsReport\.plot: matplotlib must be"):
        report.plot(tmp_path / "numerics.png")


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (("model",), TypeError, r"model must be a torch\.nn\.Module \(got str\)"),
        ((nn.ReLU(), 1.5), TypeError, r"every must be an integer \(got 1\.5\)"),
        ((nn.ReLU(), 0), ValueError, r"every must be at least 1 \(got 0\)"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    context = torchext.debug.numerics(*arguments)
    with pytest.raises(error, match=rf"torchext\.debug\.numerics: {message}"):
        context.__enter__()
