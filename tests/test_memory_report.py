"""torchext.memory_report: bytes of parameters, FP8 weights and saved activations, by module."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from support.linear_testing import gradient, normal
from torchext import convert_to_fp8_training, memory_report

pytestmark = pytest.mark.large  # what is saved does not depend on the kernels
M, K, N = 256, 512, 384


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def by_name(report) -> dict[str, Any]:
    return {module.name: module for module in report.modules}


def test_a_wide_model(device):
    model, x = MLP().to(device), normal(M, K, device=device, grad=True)
    with memory_report(model) as report:
        model(x).sum().backward()
    modules = by_name(report)
    # relu's result is saved by relu and by `down`, and counts once.
    assert [(m.name, m.kind, m.parameters, m.saved) for m in report.modules] == [
        ("", "MLP", 0, 4 * M * N),
        ("up", "Linear", 4 * (K * N + N), 4 * M * K),
        ("down", "Linear", 4 * K * N, 0),
    ]
    assert all(module.fp8_weights == 0 for module in modules.values())
    assert report.saved == 4 * M * (K + N)
    assert report.parameters == sum(p.nbytes for p in model.parameters())


def test_an_fp8_model(device):
    model, x = MLP().to(device), normal(M, K, device=device, grad=True)
    convert_to_fp8_training(model)
    with memory_report(model) as report:
        model(x).sum().backward()
    modules = by_name(report)
    weight = K * N + 4 * (K // 128) * (N // 128)  # each way; both ways share the scales' memory
    kept = report.fp8_weights
    if x.is_cpu:
        assert 2 * weight <= modules["up"].fp8_weights <= 2 * weight + 4 * 12
        assert modules["up"].saved == M * K + 4 * (M // 128) * K
    assert report.saved >= 4 * M * N + M * (K + N)
    assert kept == sum(m.fp8_weights for m in report.modules)


def test_the_largest_total_counts(device):
    model, x = MLP().to(device), normal(M, K, device=device, grad=True)
    with memory_report(model) as report:
        for rows in (64, M, 128):
            model(x[:rows].clone()).sum().backward()
        assert report.modules == ()
    assert report.saved == 4 * M * (K + N)
    with memory_report(model) as report:
        kept = [model(x[:64].clone()) for _ in range(3)]
    assert report.saved == 3 * 4 * 64 * (K + N) and len(kept) == 3
    with memory_report(model) as report, torch.no_grad():
        model(x)
    assert report.saved == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(device, use_reentrant):
    class Checkpointed(MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, x, use_reentrant=use_reentrant)

    model, x = Checkpointed().to(device), normal(M, K, device=device, grad=True)
    with memory_report(model) as report:
        y = model(x)
    assert report.saved == 4 * M * K
    y.sum().backward()


def test_results_and_hooks_are_left_as_they_were(device):
    model, x = MLP().to(device), normal(M, K, device=device, grad=True)
    convert_to_fp8_training(model)
    model(x).sum().backward()
    expected = [gradient(p) for p in model.parameters()]
    model.zero_grad()
    with memory_report(model):
        y = model(x)
    y.sum().backward()  # after the context
    assert all(map(torch.equal, map(gradient, model.parameters()), expected))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_error_within_a_forward_leaves_no_module_running(device):
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("on purpose")

    model = nn.Sequential(Fails())
    with memory_report(model) as report:
        with pytest.raises(RuntimeError, match="on purpose"):
            model(torch.ones(4, device=device))
        a = torch.ones(1024, device=device, requires_grad=True)
        y = a * a  # outside of the model
    assert report.saved == 0 and y.requires_grad


def test_compiled(device):
    torch._dynamo.reset()
    model, x = MLP().to(device), normal(M, K, device=device, grad=True)
    convert_to_fp8_training(model)
    model.compile(backend="aot_eager")
    model(x).sum().backward()
    with memory_report(model) as report:
        model(x).sum().backward()
    assert report.parameters == 4 * (2 * K * N + N)


def test_tied_parameters_count_once():
    model: Any = nn.Module()
    model.words, model.head = nn.Embedding(64, 128), nn.Linear(128, 64, bias=False)
    model.head.weight = model.words.weight
    with memory_report(model) as report:
        pass
    assert [(m.name, m.parameters) for m in report.modules] == [("words", 4 * 64 * 128)]


def test_formats(device):
    model = MLP().to(device)
    with memory_report(model) as report:
        model(normal(M, K, device=device, grad=True)).sum().backward()
    plain = report.to_dict()
    assert json.loads(report.to_json(indent=1)) == plain
    assert plain["saved"] == report.saved and plain["modules"][1]["name"] == "up"
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "module",
        "parameters",
        "FP8",
        "weights",
        "saved",
        "for",
        "backward",
    ]
    assert lines[1].startswith("the model itself") and "384.0 KiB" in lines[1]
    assert lines[-1].split()[0] == "total" and len(lines) == 5
    assert repr(report).endswith("896.0 KiB saved for backward; print() shows all>")


def test_other_arguments_are_refused():
    with (
        pytest.raises(TypeError, match=r"torchext\.memory_report: model must be .*\(got str\)"),
        memory_report("model"),  # type: ignore[arg-type]
    ):
        pass
