"""torchext.advise: its counts, how its predictions grow, its advice, and conversions that take it.
Only test_rates_of_this_cpu measures times; it checks how the rates relate, not their values."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchext
from torchext import _advice_rates, advice, convert_to_fp8_training, quantize_for_inference
from torchext._advice_rates import CpuRates, Product, _Rate

RECORDED = Path(__file__).parents[1] / "benchmarks/results/2026-11-26-h200/results.json"
SIZES = (128, 256, 512, 1024, 2048, 4096, 8192)


@pytest.fixture
def h200() -> None:
    available, reason = torchext.is_available("sim")
    if not available:
        pytest.skip(reason)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU whose FP8 products are as fast as wide ones in flops, and twice in bytes."""

    def rates(dtype: torch.dtype) -> CpuRates:
        rate = _Rate(flops=1e5, bytes=1e4)
        pair = (2e3, 1e3)
        return CpuRates(
            rate, rate, rate, pair, wide_bytes=dtype.itemsize, source="predicted from nothing"
        )

    monkeypatch.setattr(advice, "cpu_rates", rates)


def square(size: int) -> nn.Module:
    return nn.Linear(size, size, bias=False, device="meta", dtype=torch.bfloat16)


@pytest.mark.parametrize("use", ["training", "w8a8", "w8a16"])
@pytest.mark.parametrize("tokens", [1, 4096])
def test_predictions_grow_with_the_layer(h200, use, tokens):
    layers = [
        torchext.advise(square(size), tokens=tokens, device="h200", use=use).layers[0]
        for size in SIZES
    ]
    for name in ("flops", "wide_bytes", "fp8_bytes", "wide_microseconds", "fp8_microseconds"):
        values = [getattr(layer, name) for layer in layers]
        assert values == sorted(values), name
    gains = [layer.gain for layer in layers]
    assert gains[0] < 1.05
    if tokens > 1 and use != "w8a16":  # which lacks the rate of FP8, and gains bytes only
        assert gains[2:] == sorted(gains[2:])
        assert gains[-1] > 1.3
    if tokens == 1 and use == "w8a16":
        assert gains == sorted(gains)
        assert gains[-1] > 1.5


def test_small_layers_are_advised_against(h200, cpu):
    for device in ("h100", "h200", "cpu"):
        for tokens in (1, 64, 4096, 1 << 20):
            found = torchext.advise(square(128), tokens=tokens, device=device)
            assert list(found.skip) == [""], (device, tokens)
            assert "less than 1.05" in found.skip[""]


def test_flops_and_bytes_are_counted():
    layer: Any = nn.Linear(256, 512, device="meta", dtype=torch.bfloat16)
    m, n, k = 64, 512, 256

    def counted(use: Any) -> tuple[int, int, int]:
        found = torchext.advise(layer, tokens=m, device="cpu", use=use).layers[0]
        return found.flops, found.wide_bytes, found.fp8_bytes

    once = m * k + n * k + m * n
    assert counted("w8a16") == (2 * m * n * k, 2 * once, 2 * (m * k + m * n) + n * k)
    assert counted("w8a8") == (2 * m * n * k, 2 * once, (3 + 1) * m * k + n * k + 2 * m * n)
    flops, wide, fp8 = counted("training")
    assert (flops, wide) == (6 * m * n * k, 6 * once)
    assert fp8 == 4 * once + (2 + 2) * once  # each operand read twice, each result written


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(512, 8, bias=False)
        self.up = nn.Linear(512, 2048)
        self.down = nn.Linear(2048, 512)
        self.small = nn.Linear(512, 128)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(512, 1024)


def test_conversions_take_the_advice(cpu):
    model = Model()
    found = torchext.advise(model, tokens=4, device="cpu", use="w8a8")
    gains = {layer.name: layer.gain for layer in found.layers}
    assert found.convert == tuple(n for n in gains if n.endswith(("up", "down", "small")))
    assert gains["blocks.0.up"] == gains["blocks.1.up"] > 1.5
    reasons = {"blocks.0.gate": "router", "blocks.1.gate": "router", "lm_head": "output head"}
    assert found.skip.keys() == reasons.keys()
    assert all(reason in found.skip[name] for name, reason in reasons.items())
    assert 1.5 < found.gain < max(gains.values())
    result = quantize_for_inference(model, module_filter_fn=found.module_filter_fn)
    assert tuple(result.converted) == found.convert
    assert set(quantize_for_inference(Model(), skip=found.skip).converted) == set(found.convert)
    few = torchext.advise(Model(), tokens=4, device="cpu", use="w8a8", least_gain=5.0)
    assert not few.convert
    assert few.gain == 1
    converted = convert_to_fp8_training(Model(), module_filter_fn=found.module_filter_fn)
    assert converted.converted == found.convert
    again = torchext.advise(model, tokens=4, device="cpu")
    assert "holds FP8 weights" in again.skip["blocks.0.up"]


def test_the_report(cpu):
    found = torchext.advise(Model(), tokens=4, use="w8a8")
    assert found.device == "cpu"
    text = str(found)
    first, header, *lines, last = text.splitlines()
    assert first.startswith("6 of 9 linear layers gain by FP8 (w8a8, 4 tokens, cpu); ")
    assert first.endswith("predicted")
    assert header.split()[:3] == ["layer", "weights", "rows"]
    up = next(line for line in lines if line.startswith("blocks.*.up (2)"))
    assert "2048x512" in up
    assert up.endswith("convert")
    assert any("skip: router" in line for line in lines)
    assert last == "Times are predicted from nothing."
    plain = json.loads(found.to_json())
    assert plain["predicted"] is True
    assert plain["convert"] == list(found.convert)
    assert plain["layers"][1]["shapes"] == [[2048, 512]]
    assert plain["layers"][1]["gain"] == pytest.approx(found.layers[1].gain)
    assert "6 of 9" in repr(found)


def test_experts_count_the_tokens_that_choose_them(cpu):
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.top_k = 2
            self.up = nn.Parameter(torch.randn(8, 512, 256))
            self.down = nn.Parameter(torch.randn(8, 256, 256))

        def forward(self, x: Any, ids: Any, weights: Any) -> Any:
            wide = torch.einsum("tcwk,tk->tcw", self.up[ids], x)
            gate, up = wide.chunk(2, dim=-1)
            h = nn.functional.silu(gate) * up
            return torch.einsum("tcki,tci,tc->tk", self.down[ids], h, weights)

    (layer,) = torchext.advise(Experts(), tokens=16, use="w8a8").layers
    assert layer.rows == 32
    assert layer.shapes == ((8, 512, 256), (8, 256, 256))
    assert layer.flops == 2 * 32 * (512 * 256 + 256 * 256)


def test_experts_on_a_gpu(h200):
    rates = _advice_rates.gpu_rates("h200")
    for groups in (8, 64):
        forward = Product(4096, 2048, 4096, groups)
        assert rates.fp8(forward) < rates.wide(forward)
        assert rates.fp8(forward) >= rates.fp8(forward._replace(groups=1))
        wgrad = Product(2048, 4096, 4096, groups, along_k=True)
        assert rates.fp8(wgrad) > 0
        assert rates.wide(wgrad) >= rates.wide(wgrad._replace(groups=1))


def test_predictions_are_near_what_an_h200_took(h200):
    """Forward and backward of DeepSeek-V3's layers, which the BF16 constants were not fitted to."""
    took: dict[tuple[int, ...], dict[str, float]] = {}
    for row in json.loads(RECORDED.read_text())["measurements"]:
        if row["op"] == "forward_backward" and row["status"] == "ok":
            times = took.setdefault(tuple(row["shape"]), {})
            times[row["contender"]] = row["milliseconds"]["median"] * 1e3
    shapes = [shape for shape, times in took.items() if {"torchext", "bf16"} <= times.keys()]
    assert len(shapes) >= 4
    for m, n, k in shapes:
        times = took[m, n, k]
        layer = nn.Linear(k, n, device="meta", dtype=torch.bfloat16)
        found = torchext.advise(layer, tokens=m, device="h200").layers[0]
        for name, predicted in (
            ("torchext", found.fp8_microseconds), ("bf16", found.wide_microseconds)
        ):  # fmt: skip
            assert predicted == pytest.approx(times[name], rel=0.1)
        assert found.gain == pytest.approx(times["bf16"] / times["torchext"], rel=0.15)


def test_rates_of_this_cpu():
    rates = _advice_rates.cpu_rates(torch.bfloat16)
    assert _advice_rates.cpu_rates(torch.bfloat16) is rates
    assert "measured on this CPU" in rates.source
    for time in (rates.wide, rates.fp8, rates.weights_only):
        assert 0 < time(Product(1, 256, 256)) < time(Product(64, 4096, 4096))
    found = torchext.advise(nn.Linear(256, 256), tokens=2)
    assert "torch.float32" in found.source


def test_errors():
    wrong: Any = "model"
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        torchext.advise(wrong, tokens=1)
    for tokens in (0, 1.5, True):
        with pytest.raises(ValueError, match="tokens must be a positive number"):
            torchext.advise(nn.Linear(2, 2), tokens=tokens)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="use must be one of 'training'"):
        torchext.advise(nn.Linear(2, 2), tokens=1, use=wrong)


def test_a_missing_simulator_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchext._sim", None)
    with pytest.raises(ImportError, match=r"advise: the simulator, .*or pass device='cpu'"):
        torchext.advise(nn.Linear(2, 2), tokens=1, device="h200")


def test_an_unknown_gpu(h200):
    with pytest.raises(ValueError, match=r"device must be 'h100', .*'cpu' \(got 'b200'\)"):
        torchext.advise(nn.Linear(2, 2), tokens=1, device="b200")
    assert _advice_rates.name_of_gpu("NVIDIA H200") == "h200"
    assert _advice_rates.name_of_gpu("NVIDIA H100 80GB HBM3") == "h100"
