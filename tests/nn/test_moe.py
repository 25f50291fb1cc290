"""torchext.nn.MoE: its numbers, choices without an expert, shared experts, modes, errors.

tests/nn/test_experts.py tests the same autograd function in converted experts, to the bit;
tests/moe/test_experts_rows.py its middle.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from support.linear_testing import OpCounter, gradient, normal, saved_tensors, sqnr
from torchext import Recipe, convert_to_fp8_training, fixed_weights, unconvert
from torchext.nn import MoE, SwiGLU
from torchext.ops.experts_function import Routing

H, INNER, EXPERTS = 200, 128, 4
large = pytest.mark.large  # needs many GEMMs, or does not depend on the kernels


def moe_of(device: Any, dtype: Any = torch.float32, **options: Any) -> MoE:
    torch.manual_seed(0)
    return MoE(H, INNER, EXPERTS, device=device, dtype=dtype, **options)


def choices(*tokens: int, device: Any, k: int = 2) -> tuple[Tensor, Tensor]:
    """Ids of which some are no expert and some occur twice, and their weights."""
    ids = torch.randint(-1, EXPERTS, (*tokens, k)).to(device)
    return ids, torch.rand(*tokens, k).to(device)


def exact(layer: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The layer in x's dtype, expert by expert."""
    y, matrices = torch.zeros_like(x), layer._matrices()
    for expert in range(layer.num_experts):
        gate, up = F.linear(x, matrices[0][expert]).chunk(2, dim=-1)
        part = F.linear(F.silu(gate) * up, matrices[1][expert])
        y = y + part * ((ids == expert) * weights).sum(-1, keepdim=True)
    shared: Any = layer.shared_experts
    if shared is not None:
        gate, up = F.linear(x, shared.gate_proj.weight), F.linear(x, shared.up_proj.weight)
        y = y + F.linear(F.silu(gate) * up, shared.down_proj.weight)
    return y


def results(function: Any, layer: Any, x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    """y, and the gradients of x, of the weights and of the parameters."""
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    layer.zero_grad()
    y = function(x, ids, weights)
    y.backward(torch.arange(y.numel(), device=y.device).remainder(11).view_as(y).sub(3).to(y))
    return [y.detach(), gradient(x), gradient(weights), *map(gradient, layer.parameters())]


def in_float64(layer: Any, x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    double = copy.deepcopy(layer).double()
    return results(
        lambda *inputs: exact(double, *inputs), double, x.double(), ids, weights.double()
    )


# ---- numbers ----


@large
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pow2_scale", [False, True])
def test_against_float64(device, dtype, pow2_scale):
    """e4m3 keeps 4 significant bits: a product of two operands has about 2 ** -4.5 RMS error."""
    recipe = Recipe(pow2_scale=pow2_scale)
    layer = moe_of(device, dtype, shared_intermediate_size=128, recipe=recipe)
    x = normal(3, 20, H, device=device, dtype=dtype)
    ids, weights = choices(3, 20, device=device)
    got = results(layer, layer, x, ids, weights)
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32] + [dtype] * 5
    for mine, true in zip(got, in_float64(layer, x, ids, weights), strict=True):
        assert mine.shape == true.shape and sqnr(true, mine) > 20


@large
def test_a_shared_expert_is_added_before_rounding(device):
    """Combine adds what the module returns, in FP32; its gradient is that of y."""
    shared = torch.nn.Identity()
    layer, alone = moe_of(device, shared=shared), moe_of(device)
    x, (ids, weights) = normal(30, H, device=device), choices(30, device=device)
    y, dx, *rest = results(layer, layer, x, ids, weights)
    y_alone, dx_alone, *rest_alone = results(alone, alone, x, ids, weights)
    dy = torch.arange(y.numel(), device=device).remainder(11).view_as(y).sub(3).to(y)
    assert torch.equal(y, y_alone + x) and torch.allclose(dx, dx_alone + dy)
    assert all(map(torch.equal, rest, rest_alone))
    frozen = moe_of(device, shared=shared).requires_grad_(False)
    x = x.requires_grad_()
    (gradient_of_x,) = torch.autograd.grad(frozen(x, ids, weights).sum(), x)
    assert gradient_of_x.isfinite().all()


@large
def test_order_and_splits_of_choices_do_not_matter(device):
    """Choices that are no expert, and an expert chosen twice."""
    layer = moe_of(device)
    x, ids = normal(9, H, device=device), torch.tensor([[2, -1, 2]] * 9, device=device)
    weights = torch.rand(9, 3, device=device)
    y = layer(x, ids, weights)
    merged = (weights[:, 0] + weights[:, 2])[:, None]
    assert sqnr(layer(x, ids[:, :1], merged), y) > 40
    nothing = torch.full_like(ids, -1)
    for none in (nothing, nothing + EXPERTS + 1, ids[:, :0]):
        got = results(layer, layer, x, none, weights[:, : none.shape[1]])
        assert not any(t.any() for t in got)


@large
def test_nan_and_infinity_reach_their_outputs(device):
    layer = moe_of(device, shared_intermediate_size=128)
    x, (ids, weights) = normal(20, H, device=device), choices(20, device=device)
    expected = layer(x, ids, weights)
    x[3, 7], x[11, 0] = float("nan"), float("inf")
    y = layer(x, ids, weights)
    assert y[[3, 11]].isnan().all()
    others = [token for token in range(20) if token not in (3, 11)]
    assert torch.equal(y[others], expected[others])
    weights[5] = float("nan")
    chosen = (ids >= 0).any(-1)
    assert bool(layer(x, ids, weights)[5].isnan().all()) == bool(chosen[5])


@large
def test_no_tokens(device):
    layer = moe_of(device, shared_intermediate_size=128)
    ids, weights = choices(0, device=device)
    y, dx, dweights, *rest = results(layer, layer, normal(0, H, device=device), ids, weights)
    assert y.shape == dx.shape == (0, H) and dweights.shape == (0, 2)
    assert not any(t.any() for t in rest)


@large
def test_a_token_s_result_does_not_depend_on_others(device):
    layer = moe_of(device, shared_intermediate_size=128)
    x, (ids, weights) = normal(40, H, device=device), choices(40, device=device)
    y = layer(x, ids, weights)
    for part in (slice(0, 1), slice(7, 30)):
        assert torch.equal(layer(x[part], ids[part], weights[part]), y[part])


# ---- what is saved, and modes ----


@large
def test_rows_are_saved_in_fp8(device):
    t = 256
    layer = MoE(384, 512, EXPERTS, device=device, dtype=torch.bfloat16)
    x = normal(t, 384, device=device, dtype=torch.bfloat16, grad=True)
    with saved_tensors() as saved:
        layer(x, *choices(t, device=device))
    assert not any(s.dtype == torch.bfloat16 for s in saved)
    sizes = {s.data_ptr(): s.nbytes for s in saved if s.dtype == torch.float8_e4m3fn}
    assert sum(sizes.values()) == 2 * t * (384 + 2 * 512) + EXPERTS * 3 * 512 * 384


@large
@pytest.mark.parametrize("save", ["fp8", "recompute"])
def test_tokens_are_saved_if_they_are_smaller_than_their_rows(device, save, monkeypatch):
    """Then backward makes the rows again, with the same bits."""
    layer = moe_of(device, torch.bfloat16, save=save)
    x = normal(40, H, device=device, dtype=torch.bfloat16, grad=True)
    inputs = x, *choices(40, device=device, k=3)
    with saved_tensors() as saved:
        layer(*inputs)
    wide = [s for s in saved if s.dtype == torch.bfloat16]
    assert [s.data_ptr() for s in wide] == [x.data_ptr()]
    got = results(layer, layer, *inputs)
    monkeypatch.setattr(Routing, "keeps_tokens", lambda routing, x: False)
    assert all(map(torch.equal, got, results(layer, layer, *inputs)))


@large
def test_compiled(device):
    shared = torch.nn.Linear(H, H, device=device, dtype=torch.bfloat16)
    layer = moe_of(device, torch.bfloat16, shared=shared)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = normal(24, H, device=device, dtype=torch.bfloat16)
    inputs = x, *choices(24, device=device)
    expected = results(layer, layer, *inputs)
    assert all(map(torch.equal, results(compiled, layer, *inputs), expected))


@large
def test_distributed_data_parallel(device):
    if device.type != "cpu":
        pytest.skip("gloo needs CPU tensors")
    layer = moe_of(device, shared_intermediate_size=128)
    inputs = normal(5, H, device=device), *choices(5, device=device)
    expected = results(layer, layer, *inputs)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(layer)
        assert all(map(torch.equal, results(parallel, layer, *inputs), expected))
    finally:
        torch.distributed.destroy_process_group()


@large
def test_exported(device):
    layer = moe_of(device).eval()
    inputs = normal(5, H, device=device), *choices(5, device=device)
    exported = torch.export.export(layer, inputs).module()
    assert torch.equal(exported(*inputs), layer(*inputs))


@large
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(device, use_reentrant):
    layer = moe_of(device, shared_intermediate_size=128)
    inputs = normal(33, H, device=device), *choices(33, device=device)
    expected = results(layer, layer, *inputs)
    got = results(lambda *a: checkpoint(layer, *a, use_reentrant=use_reentrant), layer, *inputs)
    assert all(map(torch.equal, got, expected))


@large
def test_autocast(device):
    layer = moe_of(device, shared_intermediate_size=128)
    x, (ids, weights) = normal(33, H, device=device), choices(33, device=device)
    expected = layer(x, ids, weights)
    with torch.autocast(device.type, torch.bfloat16):
        y, dx, *_ = results(layer, layer, x, ids, weights)
    assert y.dtype == torch.bfloat16 and dx.dtype == torch.float32
    assert sqnr(expected, y) > 30


@large
def test_copies_checkpoints_and_kept_weights(device):
    layer: Any = moe_of(device, shared_intermediate_size=128)
    inputs = normal(5, H, device=device), *choices(5, device=device)
    y = layer(*inputs)
    names = [f"shared_experts.{p}_proj.weight" for p in ("gate", "up", "down")]
    assert list(layer.state_dict()) == ["gate_up_proj", "down_proj", *names]
    other = MoE(H, INNER, EXPERTS, shared=SwiGLU(H, 128, device=device), device=device)
    other.load_state_dict(layer.state_dict())
    for copied in (other, copy.deepcopy(layer), copy.deepcopy(layer).eval()):
        assert torch.equal(copied(*inputs), y)
    with torch.no_grad(), fixed_weights(layer):
        assert torch.equal(layer(*inputs), y)
        with OpCounter() as counter:
            assert torch.equal(layer(*inputs), y)
        assert counter.of("quantize_128x128", "quantize_128x128_dual") == 0
    with torch.no_grad():
        layer.down_proj.zero_()
        layer.shared_experts.down_proj.weight.zero_()
    assert not layer(*inputs).any()


@large
def test_a_conversion_leaves_it_as_it_is(device):
    model = torch.nn.Sequential(moe_of(device), torch.nn.Linear(H, H, device=device))
    result = convert_to_fp8_training(model)
    assert result.fp8_elements == sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert unconvert(model) == ("1",) and type(model[0]) is MoE


# ---- errors ----


@large
def test_errors(device):
    layer = moe_of(device)
    x, (ids, weights) = normal(5, H, device=device), choices(5, device=device)
    for inputs, error, text in (
        ((x[:, 1:], ids, weights), ValueError, r"x must have shape \[..., 200\]"),
        ((x, ids[1:], weights), ValueError, r"topk_idx must have shape \[5, 'k'\]"),
        ((x, ids, weights[:, :1]), ValueError, "topk_weights must have the shape"),
        ((x, ids, weights.to("meta")), ValueError, "topk_weights must be on device"),
        ((x.double(), ids, weights), TypeError, "x must be torch.float32"),
        ((x, ids.to(torch.uint8), weights), TypeError, "topk_idx must be torch.int64"),
        ((x, ids, ids), TypeError, "topk_weights must be floating-point"),
    ):
        with pytest.raises(error, match=f"torchext.nn.MoE: {text}"):
            layer(*inputs)
    with pytest.raises(RuntimeError, match=r"torch\.func's transforms"):
        torch.vmap(lambda w: layer(x, ids, w))(weights[None])
    for options, error, text in (
        ({"recipe": Recipe.rowwise()}, ValueError, "recipe must be blockwise"),
        ({"recipe": "fp8"}, TypeError, "recipe must be a torchext.Recipe"),
        ({"shared": layer, "shared_intermediate_size": 8}, ValueError, "must not both be given"),
        ({"save": "fp16"}, ValueError, "save must be one of"),
    ):
        with pytest.raises(error, match=text):
            MoE(H, INNER, EXPERTS, device=device, **options)
    with pytest.raises(ValueError, match="num_experts must be from 1 to 1024"):
        MoE(H, INNER, 0)
