"""The adapters for Lightning, torchao and torchtitan, against stand-ins with the parts of their
interfaces that the adapters use. None is in the development group: they pin versions of torch, or
need many packages. accelerate, which is, needs no adapter."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import inspect
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from support.linear_testing import sqnr
from support.torchtitan_stand_in import (
    AllToAllTokenDispatcher,
    BaseEPTokenDispatcher,
    Converter,
    GroupedExperts,
    LinearConfig,
    LocalTokenDispatcher,
    Module,
    OtherExperts,
    RoutedExperts,
    ScaledConfig,
    routed,
)
from torchext import Recipe, convert_to_fp8_training, ops
from torchext.nn import FP8Linear, Linear


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch):
    """Puts modules into sys.modules; and forgets the adapters that a test imports."""
    before = set(sys.modules)

    def make(path: str, **attributes: Any) -> None:
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        for name, value in attributes.items():
            setattr(sys.modules[path], name, value)

    yield make
    for name in set(sys.modules) - before:
        if name.startswith("torchext.integrations."):
            del sys.modules[name]


class FabricPrecision:
    """As lightning.fabric.plugins.precision.Precision 2.6.6, from which the Trainer's inherits."""

    precision = "32-true"

    def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
        return module

    def forward_context(self) -> Any:
        raise AssertionError("the adapter has its own")


class TrainerPrecision(FabricPrecision):
    pass


@pytest.mark.parametrize("name", ["FabricFP8Precision", "TrainerFP8Precision"])
def test_lightning(stand_in, name):
    stand_in("lightning.fabric.plugins.precision", Precision=FabricPrecision)
    stand_in("lightning.pytorch.plugins.precision", Precision=TrainerPrecision)
    adapter = importlib.import_module("torchext.integrations.lightning")
    plugin: Any = getattr(adapter, name)(recipe=Recipe.rowwise())
    assert issubclass(type(plugin), TrainerPrecision if name.startswith("T") else FabricPrecision)
    model: Any = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.Linear(256, 128))
    assert plugin.convert_module(model) is model
    assert plugin.result.converted == ("0", "1")
    assert model[0].recipe == Recipe.rowwise()
    assert plugin.precision == "bf16-mixed"
    with plugin.forward_context():
        y = model(torch.randn(3, 128))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert model[0].weight.grad.dtype == torch.float32


def test_torchao(stand_in):
    handlers: dict[type, Any] = {}

    class AOBaseConfig:
        pass

    def register(config_type):
        return lambda function: handlers.setdefault(config_type, function)

    stand_in("torchao.core.config", AOBaseConfig=AOBaseConfig)
    stand_in("torchao.quantization.transform_module", register_quantize_module_handler=register)
    adapter = importlib.import_module("torchext.integrations.torchao")
    linear, x = torch.nn.Linear(256, 128), torch.randn(5, 256)
    config = adapter.FP8InferenceConfig(mode="w8a16")
    assert isinstance(config, AOBaseConfig)
    quantized = handlers[type(config)](linear, config)
    assert type(quantized) is FP8Linear
    assert quantized.mode == "w8a16"
    assert sqnr(linear(x).detach(), quantized(x).detach()) > 25
    config = adapter.FP8TrainingConfig(Recipe.tensorwise())
    trained = handlers[type(config)](linear, config)
    assert type(trained) is Linear
    assert trained.weight is linear.weight
    assert trained.recipe == Recipe.tensorwise()


@pytest.fixture
def torchtitan(stand_in):
    overrides: dict[str, dict[str, Any]] = {}

    def override(*, target: type, fqns: Any = None, description: str = "", exact: bool = False):
        options = {"target": target, "fqns": fqns, "exact": exact}
        return lambda function: overrides.setdefault(function.__name__, options) and function

    def derive(source: Any, target_cls: Any, **deltas: Any) -> Any:
        shared = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
        return target_cls(**shared, **deltas)

    linear = type("Linear", (torch.nn.Linear,), {"Config": LinearConfig})
    dispatchers = LocalTokenDispatcher, BaseEPTokenDispatcher, AllToAllTokenDispatcher
    stand_in("torchtitan.config", derive=derive, override=override)
    stand_in("torchtitan.models.common.linear", Linear=linear)
    stand_in(
        "torchtitan.models.common.moe", GroupedExperts=GroupedExperts, RoutedExperts=RoutedExperts
    )
    stand_in(
        "torchtitan.models.common.token_dispatcher", **{kind.__name__: kind for kind in dispatchers}
    )
    stand_in("torchtitan.protocols.model", ModelConfigConverter=Converter)
    stand_in("torchtitan.protocols.module", Module=Module)
    return importlib.import_module("torchext.integrations.torchtitan"), overrides


def test_torchtitan_override(torchtitan):
    adapter, overrides = torchtitan
    fqns = overrides["fp8_linear"]["fqns"]
    assert overrides["fp8_linear"]["exact"] and overrides["fp8_linear"]["target"] is LinearConfig

    def claimed(name: str) -> bool:
        return any(fnmatch.fnmatch(name, glob) for glob in fqns)

    for name in ("attention.wo", "attention.qkv_linear.wq", "feed_forward.w1",
                 "moe.shared_experts.w2"):  # fmt: skip
        assert claimed(f"layers.3.{name}")
    assert not claimed("lm_head") and not claimed("layers.3.moe.router.gate")
    new = adapter.fp8_linear(LinearConfig(in_features=256, out_features=128), recipe="rowwise")
    layer = new.build()
    assert type(layer) is adapter.FP8Linear
    assert isinstance(layer, Linear)
    assert layer.recipe == Recipe.rowwise()
    assert layer.bias is None
    assert layer(torch.randn(3, 256)).shape == (3, 128)
    small = LinearConfig(in_features=256, out_features=64)
    assert adapter.fp8_linear(small) is small


class ModelConfig:
    def __init__(self) -> None:
        self.lm_head = LinearConfig(in_features=256, out_features=512)
        self.scaled = ScaledConfig(in_features=256, out_features=256)
        self.blocks = [LinearConfig(in_features=256, out_features=256) for _ in range(2)]

    def traverse(self, kind: type) -> Any:
        assert kind is LinearConfig
        yield "lm_head", self.lm_head, self, "lm_head"
        yield "layers.0.scaled", self.scaled, self, "scaled"
        for i, config in enumerate(list(self.blocks)):
            yield f"layers.{i}.attention.wo", config, self.blocks, i


def test_torchtitan_converter(torchtitan):
    adapter, _ = torchtitan
    model = ModelConfig()
    converter = adapter.FP8LinearConverter(adapter.FP8LinearConverter.Config(skip=["layers.1"]))
    assert converter.convert(model) is model
    assert converter.converted == ["layers.0.attention.wo"]
    assert type(model.blocks[0]) is adapter.FP8Linear.Config
    assert type(model.blocks[1]) is LinearConfig
    reasons = {
        "lm_head": "output head", "layers.0.scaled": "own behavior", "layers.1.attention.wo": "it"
    }  # fmt: skip
    for name, reason in reasons.items():
        assert reason in converter.skipped[name]
    wrong = adapter.FP8LinearConverter(adapter.FP8LinearConverter.Config(skip=["w9"]))
    with pytest.raises(ValueError, match=r"skip must have patterns .*got 'w9'.*lm_head"):
        wrong.convert(ModelConfig())


class OneRank:
    """An EP mesh whose group is torch.distributed's default, here one process."""

    def get_group(self) -> None:
        return None


def run_experts(module: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(40, 256).bfloat16().requires_grad_()
    scores, ids = torch.rand(40, 4).topk(2)
    scores.requires_grad_()
    y = module(x, scores, ids, torch.bincount(ids.flatten(), minlength=4))
    y.backward(torch.randn_like(y))
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, "dscores": scores.grad, **grads}


@pytest.mark.parametrize("mesh", [OneRank(), None])
def test_torchtitan_experts(torchtitan, mesh):
    adapter, overrides = torchtitan
    assert overrides["fp8_experts"]["target"] is RoutedExperts.Config
    config = adapter.fp8_experts(routed(), capacity=100)
    assert config.token_dispatcher.capacity == 100
    torch.manual_seed(0)
    plain, module = routed().build(), config.build()
    module.load_state_dict(plain.state_dict())
    assert isinstance(module.inner_experts, adapter.FP8GroupedExperts)
    assert module.inner_experts.recipe == Recipe()
    module.token_dispatcher.wire_meshes(ep_mesh=mesh)
    expected, found = run_experts(plain), run_experts(module)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert sqnr(value.double(), found[name].double()) > 20, name


def test_torchtitan_dispatch_alone_rounds_tokens_and_gradients_once(torchtitan):
    """With experts that double, all else is exact but the rounding of messages to FP8."""
    adapter, _ = torchtitan
    dispatcher = adapter.FP8TokenDispatcher(
        adapter.FP8TokenDispatcher.Config(num_experts=4, top_k=2, recipe="blockwise")
    )
    dispatcher.wire_meshes(ep_mesh=OneRank())
    x, grad = (torch.randn(24, 256).requires_grad_() for _ in range(2))
    scores, ids = torch.rand(24, 4).topk(2)
    scores.requires_grad_()
    rows, counts, metadata = dispatcher.dispatch(
        x, scores, ids, torch.bincount(ids.flatten(), minlength=4)
    )
    assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=4))
    y = dispatcher.combine(2 * rows, metadata, x)
    y.backward(grad)

    def rounded(t: Tensor) -> Tensor:
        return ops.dequantize(*ops.quantize_1x128(t.detach()), out_dtype=torch.float32)

    scale = 2 * scores.detach().sum(1, keepdim=True)
    torch.testing.assert_close(y.detach(), scale * rounded(x))
    torch.testing.assert_close(x.grad, scale * rounded(grad))
    both = 2 * (rounded(x) * rounded(grad)).sum(1, keepdim=True)
    torch.testing.assert_close(scores.grad, both.expand(24, 2))


def test_torchtitan_dispatcher_has_the_interface(torchtitan):
    adapter, _ = torchtitan
    for name in ("dispatch", "combine", "wire_meshes", "init_buffer"):
        own, theirs = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for f in (
                getattr(adapter.FP8TokenDispatcher, name),
                getattr(BaseEPTokenDispatcher, name),
            )
        )
        assert own == theirs, name
    fields = {f.name for f in dataclasses.fields(adapter.FP8TokenDispatcher.Config)}
    assert {"num_experts", "top_k"} < fields


class MixtureConfig:
    def __init__(self) -> None:
        small = routed()
        small.inner_experts.hidden_dim = 64
        self.layers = [routed(), routed(OtherExperts), routed(dispatcher=LocalTokenDispatcher),
                       small, routed()]  # fmt: skip

    def traverse(self, kind: type) -> Any:
        assert kind is RoutedExperts.Config
        for i, config in enumerate(list(self.layers)):
            yield f"layers.{i}.moe.routed_experts", config, self.layers, i


def test_torchtitan_converter_of_experts(torchtitan):
    adapter, _ = torchtitan
    model, kind = MixtureConfig(), adapter.FP8ExpertsConverter
    converter = kind(kind.Config(skip=["layers.4"], timeout=9.0))
    assert converter.convert(model) is model
    name = "layers.{}.moe.routed_experts".format
    assert converter.converted == [name(0), name(2)]
    assert converter.dispatched == [name(0), name(1), name(3)]
    assert model.layers[0].token_dispatcher.timeout == 9.0
    assert type(model.layers[2].token_dispatcher) is LocalTokenDispatcher.Config
    assert type(model.layers[4].token_dispatcher) is AllToAllTokenDispatcher.Config
    for layer, reason in {1: "own behavior", 3: "fewer than 128", 4: "skip matches"}.items():
        assert reason in converter.skipped[name(layer)]
    with pytest.raises(ValueError, match=r"skip must have patterns .*got 'layers.7'"):
        kind(kind.Config(skip=["layers.7"])).convert(MixtureConfig())
    with pytest.raises(ValueError, match="recipe of experts must be blockwise"):
        kind(kind.Config(recipe="rowwise")).convert(MixtureConfig())


def test_accelerate_needs_no_adapter():
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.Linear(256, 128))
    convert_to_fp8_training(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    x, before, losses = torch.randn(32, 128), model[0].weight.detach().clone(), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (prepared(x) - x).float().square().mean()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    unwrapped = accelerator.unwrap_model(prepared)
    assert [type(layer) for layer in unwrapped] == [Linear, Linear]
    assert losses[2] < losses[1] < losses[0]
    assert not torch.equal(model[0].weight, before)
    assert list(unwrapped.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_torchext_imports_none_of_these_libraries():
    names = (
        "lightning", "torchao", "peft", "transformers", "accelerate", "safetensors", "torchtitan",
        "vllm", "sglang", "deep_gemm",
    )  # fmt: skip
    plugins = "torchext.integrations.vllm, torchext.integrations.sglang"
    script = f"import sys, torchext, {plugins}; print([n for n in {names} if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
