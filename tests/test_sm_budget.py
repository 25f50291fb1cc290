"""torchext.sm_budget: how many SMs kernels take, seen by the CTAs that they launch."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import torchext
from torchext import ops, sm_budget
from torchext._dispatch.sm_budget import communication_sms, gemm_sms

needs_simulator = pytest.mark.skipif(
    not torchext.is_available("sim"), reason=torchext.is_available("sim").reason
)


def ctas(simulation: torchext.sim.Simulation, name: str) -> list[int]:
    """The CTAs of each launch of Hopper's kernels of this name: each initializes its barriers."""
    instruction = "fence.mbarrier_init.release.cluster"
    return [r.instructions.get(instruction, 0) for r in simulation.reports if name in r.kernel]


@needs_simulator
def test_gemms_take_the_sms_that_communication_leaves():
    a, b = ops.quantize_1x128(torch.randn(256, 128)), ops.quantize_128x128(torch.randn(256, 128))
    with torchext.sim.simulate(num_sms=8, checks=False) as simulation:
        expected = ops.fp8_gemm_nt(*a, *b)
        with sm_budget(communication=6):
            limited = ops.fp8_gemm_nt(*a, *b)
            chosen = ops.fp8_gemm_nt(*a, *b, num_sms=1)
        after = ops.fp8_gemm_nt(*a, *b)
    assert ctas(simulation, "gemm") == [8, 2, 1, 8]
    assert all(torch.equal(y, expected) for y in (limited, chosen, after))


@needs_simulator
def test_layers_keep_to_it_forward_and_backward():
    layer = torchext.nn.SwiGLU(128, 256)
    x = torch.randn(256, 128)
    with torchext.sim.simulate(num_sms=8, checks=False) as simulation, sm_budget(communication=5):
        layer(x.requires_grad_()).sum().backward()
    found = ctas(simulation, "gemm")
    assert len(found) == 3 + 3 + 3 and max(found) <= 3


@needs_simulator
def test_kernels_that_move_tokens_take_at_most_the_budget(monkeypatch):
    taken = []

    def routed(*operands, num_sms=0):
        taken.append(num_sms)
        return torch.empty(0), torch.empty(0)

    monkeypatch.setattr(ops.moe, "_route", routed)
    ids = torch.zeros(4, 2, dtype=torch.int32)
    with torchext.sim.simulate(num_sms=8):
        ops.moe_route(ids, 4)
        with sm_budget(communication=5):
            ops.moe_route(ids, 4)
            ops.moe_route(ids, 4, num_sms=7)
            assert communication_sms(ids) == 5
    assert taken == [0, 5, 7]


def test_a_cpu_has_no_sms():
    x = torch.empty(1)
    with sm_budget():
        assert gemm_sms(x) == communication_sms(x) == 0


def test_budgets_nest_and_apply_to_all_threads(monkeypatch):
    monkeypatch.setattr("torchext._dispatch.sm_budget.simulated", 132)
    x, seen = torch.empty(1), []

    def look() -> None:
        seen.append((gemm_sms(x), communication_sms(x)))

    look()
    with sm_budget(communication=20):
        with sm_budget(communication=8):
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
        look()
    look()
    assert seen == [(0, 0), (124, 8), (112, 20), (0, 0)]


def test_compiled_forwards_notice_it(monkeypatch):
    monkeypatch.setattr("torchext._dispatch.sm_budget.simulated", 132)
    operands = (
        *ops.quantize_1x128(torch.randn(16, 128)),
        *ops.quantize_128x128(torch.randn(16, 128)),
    )
    taken: list[tuple[object, ...]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        names = [node for node in graph.graph.nodes if "fp8_gemm" in str(node.target)]
        taken.extend((*node.args, *node.kwargs.values()) for node in names)
        return graph

    compiled = torch.compile(ops.fp8_gemm_nt, backend=backend)
    expected = compiled(*operands)
    with sm_budget(communication=20):
        assert torch.equal(compiled(*operands), expected)
    assert [112 in arguments for arguments in taken] == [False, True]


def test_errors(monkeypatch):
    with pytest.raises(TypeError, match=r"sm_budget: communication must be an int \(got float\)"):
        sm_budget(communication=2.5).__enter__()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"communication must be at least 1 \(got 0\)"):
        sm_budget(communication=0).__enter__()
    monkeypatch.setattr("torchext._dispatch.sm_budget.simulated", 8)
    with sm_budget(communication=8), pytest.raises(ValueError, match="must be less than 8"):
        gemm_sms(torch.empty(1))
