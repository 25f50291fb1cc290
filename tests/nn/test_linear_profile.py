"""A layer's record_function ranges in a profile."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch.profiler import ProfilerActivity, profile

from torchext import Recipe
from torchext.nn import Linear
from torchext.ops import linear_ranges


def names(prof):
    return [event.name for event in prof.events() if event.name.startswith("torchext.nn.Linear")]


def ancestors(event):
    while (event := event.cpu_parent) is not None:
        yield event.name


@pytest.mark.parametrize("recipe", [Recipe.deepseek_v3(), Recipe.rowwise()], ids=str)
def test_a_profile_shows_forward_and_backward(recipe, device):
    layer = Linear(64, 40, device=device, recipe=recipe)
    x = torch.randn(8, 64, device=device, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        layer(x).sum().backward()
        with torch.no_grad():
            layer(x)
    forward, backward = (
        f"torchext.nn.Linear.{direction} ({recipe.granularity})"
        for direction in ("forward", "backward")
    )
    assert sorted(names(prof)) == [backward, forward, forward]
    ops = [event for event in prof.events() if event.name.startswith("torchext::_fp8_gemm_nt")]
    assert len(ops) == 4
    assert all({forward, backward} & set(ancestors(op)) for op in ops)


def test_a_range_ends_where_a_forward_fails(device):
    layer = Linear(64, 40, device=device)
    layer.bias = torch.nn.Parameter(torch.zeros(39, device=device))
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        with pytest.raises(RuntimeError, match="bias"):
            layer(torch.randn(8, 64, device=device))
        torch.zeros(3, device=device)
    after = [event for event in prof.events() if event.name == "aten::zeros"]
    assert len(names(prof)) == 1 and after and all(event.cpu_parent is None for event in after)


def test_no_range_is_opened_without_a_profiler(device, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr(linear_ranges, "_RecordFunctionFast", opened.append)
    x = torch.randn(8, 64, device=device, requires_grad=True)
    Linear(64, 40, device=device)(x).sum().backward()
    assert not opened


def test_compiled_layers_under_a_profiler(device):
    """A profiler neither breaks the graph nor causes a recompilation."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = Linear(64, 40, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(8, 64, device=device, requires_grad=True)
    plain = compiled(x)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        profiled = compiled(x)
        profiled.sum().backward()
    assert torch.equal(plain, profiled)
    assert counter.frame_count == 1 and not names(prof)
