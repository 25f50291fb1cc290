"""The adapters for Lightning and torchao, against stand-ins with the parts of their interfaces that
the adapters use. Neither is in the development group: both pin versions of torch."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from support.linear_testing import sqnr
from torchext import Recipe
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


def test_torchext_imports_none_of_these_libraries():
    names = ("lightning", "torchao", "peft", "transformers", "accelerate", "safetensors")
    script = f"import sys, torchext; print([n for n in {names} if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
