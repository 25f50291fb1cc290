"""The adapters for Lightning, torchao and torchtitan, against stand-ins with the parts of their
interfaces that the adapters use. None is in the development group: they pin versions of torch, or
need many packages. accelerate, which is, needs no adapter."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from support.linear_testing import sqnr
from torchext import Recipe, convert_to_fp8_training
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


@dataclasses.dataclass(kw_only=True)
class LinearConfig:
    """As torchtitan.models.common.linear.Linear.Config 0.3.0."""

    in_features: int
    out_features: int
    bias: bool = False
    param_init: Any = None


class ScaledConfig(LinearConfig):
    """The config of a subclass of Linear that has a forward of its own."""


@pytest.fixture
def torchtitan(stand_in):
    overrides: dict[str, dict[str, Any]] = {}

    def override(*, target: type, fqns: Any = None, description: str = "", exact: bool = False):
        assert target is LinearConfig
        options = {"fqns": fqns, "exact": exact}
        return lambda function: overrides.setdefault(function.__name__, options) and function

    def derive(source: Any, target_cls: Any, **deltas: Any) -> Any:
        shared = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
        return target_cls(**shared, **deltas)

    class Module(torch.nn.Module):
        """Wires Config to its owner, as torchtitan's Configurable does."""

        def __init_subclass__(cls) -> None:
            def build(config: Any) -> Any:
                return cls(config)

            vars(cls)["Config"].build = build

    class Converter:
        @dataclasses.dataclass(kw_only=True)
        class Config:
            pass

    linear = type("Linear", (torch.nn.Linear,), {"Config": LinearConfig})
    stand_in("torchtitan.config", derive=derive, override=override)
    stand_in("torchtitan.models.common.linear", Linear=linear)
    stand_in("torchtitan.protocols.model", ModelConfigConverter=Converter)
    stand_in("torchtitan.protocols.module", Module=Module)
    return importlib.import_module("torchext.integrations.torchtitan"), overrides


def test_torchtitan_override(torchtitan):
    adapter, overrides = torchtitan
    fqns = overrides["fp8_linear"]["fqns"]
    assert overrides["fp8_linear"]["exact"]

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
