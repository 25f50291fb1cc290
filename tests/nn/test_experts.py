"""Experts in 3-D parameters: their numbers, what they save, and when the class's forward runs."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.linear_testing import OpCounter, gradient, normal, saved_tensors, sqnr
from torchext import Recipe, fixed_weights, ops
from torchext._experts import convert_experts_, recognize_experts

every_save = pytest.mark.parametrize("save", ["bf16", "fp8", "recompute"])
large = pytest.mark.large  # needs many GEMMs, or does not depend on the kernels


class Experts(nn.Module):
    """Experts with the parameters of transformers' classes."""

    gated = True

    def __init__(self, k: int, i: int, count: int = 4) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * i if self.gated else i, k))
        self.down_proj = nn.Parameter(torch.empty(count, k, i))

    def activate(self, wide: Tensor) -> Tensor:
        gate, up = wide.chunk(2, dim=-1)
        return F.silu(gate) * up

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in range(self.down_proj.shape[0]):
            token, place = torch.where(ids == expert)
            h = self.activate(F.linear(x[token], self.gate_up_proj[expert]))
            part = F.linear(h, self.down_proj[expert]) * weights[token, place, None]
            y = y.index_add(0, token, part.to(y.dtype))
        return y


class SquaredReLU(Experts):
    gated = False

    def activate(self, wide: Tensor) -> Tensor:
        return F.relu(wide).square()


class GEGLU(Experts):
    def activate(self, wide: Tensor) -> Tensor:
        gate, up = wide.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up


KINDS = {"SwiGLU": Experts, "GEGLU": GEGLU, "squared ReLU": SquaredReLU}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def experts_of(
    kind: Any = Experts, k: int = 200, i: int = 160, *, device: Any, dtype: Any = torch.float32
) -> Any:
    torch.manual_seed(0)
    layer = kind(k, i).to(device, dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return layer


def in_fp8(layer: Any, save: str = "fp8", recipe: Recipe | None = None) -> Any:
    layer = copy.deepcopy(layer)
    roles = recognize_experts(layer)
    assert roles is not None
    convert_experts_(layer, roles, recipe or Recipe(), save)  # type: ignore[arg-type]
    return layer


def choices(tokens: int, device: Any, experts: int = 4, k: int = 2) -> tuple[Tensor, Tensor]:
    """Each token's k different experts, and their weights."""
    ids = torch.rand(tokens, experts).topk(k).indices.to(device)
    return ids, torch.rand(tokens, k).to(device)


def results(layer: Any, x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    """y, and the gradients of x, of the weights and of the parameters."""
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x, ids, weights)
    y.backward(torch.arange(y.numel(), device=y.device).remainder(11).view_as(y).sub(3).to(y))
    return [y.detach(), gradient(x), gradient(weights), *map(gradient, layer.parameters())]


def runs_fused(layer: Any, *inputs: Tensor) -> bool:
    with OpCounter() as counter:
        layer(*inputs)
    return counter.calls["m_grouped_fp8_gemm_nt_contiguous"] == 2


# ---- numbers ----


@large
@every_kind
@every_save
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_against_float64(device, kind, save, dtype):
    wide = experts_of(kind, device=device, dtype=dtype)
    x, (ids, weights) = normal(70, 200, device=device, dtype=dtype), choices(70, device)
    expected = results(copy.deepcopy(wide).double(), x.double(), ids, weights.double())
    layer = in_fp8(wide, save)
    got = results(layer, x, ids, weights)
    assert runs_fused(layer, x, ids, weights)
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32, dtype, dtype]
    for mine, exact in zip(got, expected, strict=True):
        assert mine.shape == exact.shape
        assert sqnr(exact, mine) > (20 if save == "fp8" else 22)


def test_bits_are_those_of_a_loop(device):
    """With runs of whole groups of 128 rows, each expert alone quantizes to the same values."""
    layer = in_fp8(experts_of(k=72, i=128, device=device, dtype=torch.bfloat16), "bf16")
    x = normal(256, 72, device=device, dtype=torch.bfloat16)
    ids = torch.tensor([3, 1]).repeat_interleave(128)[:, None].to(device)
    weights = torch.rand(256, 1).to(x)
    y, dx, dweights, dup, ddown = results(layer, x, ids, weights)
    dy = torch.arange(y.numel(), device=device).remainder(11).view_as(y).sub(3).to(y)
    for expert, rows in ((3, slice(0, 128)), (1, slice(128, 256))):
        weight = weights[rows].float()
        up, up_scale, up_t = ops.quantize_128x128_dual(layer.gate_up_proj[expert].detach())
        down, down_scale, down_t = ops.quantize_128x128_dual(layer.down_proj[expert].detach())
        data, scale, data_t, scale_t = ops.quantize_1x128_dual(x[rows])
        wide = ops.fp8_gemm_nt(data, scale, up, up_scale)
        h, h_scale, h_t, h_scale_t = ops.silu_mul_quantize_1x128_dual(wide)
        weighted_scale = ops.restore_layout(h, h_scale * weight)[1]
        assert torch.equal(y[rows], ops.fp8_gemm_nt(h, weighted_scale, down, down_scale))
        g, g_scale = ops.quantize_1x128(dy[rows])
        dh = ops.fp8_gemm_nt(g, g_scale, down_t, down_scale.t())
        product = ops.dequantize(h, h_scale, out_dtype=torch.float32) * dh
        assert torch.equal(dweights[rows], product.sum(1, keepdim=True).to(weights.dtype))
        g_t, g_scale_t = ops.quantize_1x128_t(dy[rows] * weights[rows])
        assert torch.equal(ddown[expert], ops.fp8_gemm_nt(g_t, g_scale_t, h_t, h_scale_t))
        dh = dh * weights[rows]
        d, d_scale, d_t, d_scale_t, *_ = ops.silu_mul_backward_quantize_1x128_dual(dh, wide)
        assert torch.equal(dx[rows], ops.fp8_gemm_nt(d, d_scale, up_t, up_scale.t()))
        assert torch.equal(dup[expert], ops.fp8_gemm_nt(d_t, d_scale_t, data_t, scale_t))
    assert not dup[::2].any() and not ddown[::2].any()  # no token chose these


class Transposed(nn.Module):
    """The same experts, with weights [E, in, out]."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.w1 = nn.Parameter(experts.gate_up_proj.detach().mT.contiguous())
        self.w2 = nn.Parameter(experts.down_proj.detach().mT.contiguous())

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("tckw,tk->tcw", self.w1[ids], x).chunk(2, -1)
        return torch.einsum("tcik,tci,tc->tk", self.w2[ids], F.silu(gate) * up, weights)


@every_save
def test_transposed_weights_give_the_same_bits(device, save):
    plain = experts_of(k=72, i=40, device=device)
    layer, transposed = in_fp8(plain, save), in_fp8(Transposed(plain), save)
    x, (ids, weights) = normal(40, 72, device=device), choices(40, device)
    assert runs_fused(transposed, x, ids, weights)
    *expected, dup, ddown = results(layer, x, ids, weights)
    for _ in range(2):
        got = results(transposed, x, ids, weights)
        assert all(map(torch.equal, got, [*expected, dup.mT, ddown.mT]))
    with torch.no_grad(), fixed_weights(transposed):
        assert torch.equal(transposed.eval()(x, ids, weights), expected[0])


class Sorted(nn.Module):
    """The same experts, called with sorted rows."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        gate, up = experts.gate_up_proj.detach().chunk(2, 1)
        self.w1, self.w3 = nn.Parameter(gate.clone()), nn.Parameter(up.clone())
        self.w2 = nn.Parameter(experts.down_proj.detach().clone())

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        parts = zip(x.split(counts.tolist()), self.w1, self.w2, self.w3, strict=True)
        return torch.cat([F.linear(F.silu(x @ a.T) * (x @ b.T), c) for x, a, c, b in parts])


@every_save
def test_sorted_rows_give_the_bits_of_choices(device, save):
    """Each row is a token with one choice of weight 1. The last rows have no expert."""
    plain = experts_of(k=72, i=40, device=device)
    layer, sorted_layer = in_fp8(plain, save), in_fp8(Sorted(plain), save)
    counts = torch.tensor([20, 0, 33, 14], device=device)
    x = normal(70, 72, device=device)
    ids = torch.tensor([0] * 20 + [2] * 33 + [3] * 14 + [4] * 3, device=device)[:, None]
    y, dx, _, dup, ddown = results(layer, x, ids, torch.ones(70, 1, device=device))
    x = x.requires_grad_()
    got = sorted_layer(x, counts)
    got.backward(torch.arange(y.numel(), device=device).remainder(11).view_as(y).sub(3).to(y))
    grads = sorted_layer.w1.grad, sorted_layer.w3.grad
    assert torch.equal(got, y) and torch.equal(gradient(x), dx)
    assert torch.equal(torch.cat(grads, 1), dup) and torch.equal(gradient(sorted_layer.w2), ddown)


@large
@pytest.mark.parametrize(
    "ids",
    [
        [[2, 2], [2, 2], [2, 2]],  # one expert has all
        [[0, 3], [3, 0], [0, 3]],  # others have none
        [[1, 2]],  # one token
        [[0, 1], [4, 7], [4, 2]],  # 4 and 7 are on another rank
    ],
    ids=str,
)
def test_any_distribution(device, ids):
    """The first parameter is NaN where no choice may read it."""
    layer = experts_of(device=device)
    ids = torch.tensor(ids, device=device)
    unused = sorted({0, 1, 2, 3} - set(ids.flatten().tolist()))
    with torch.no_grad():
        layer.gate_up_proj[unused] = float("nan")
    x, weights = normal(len(ids), 200, device=device), torch.rand(ids.shape, device=device)
    expected = results(copy.deepcopy(layer).double(), x.double(), ids, weights.double())
    got = results(in_fp8(layer), x, ids, weights)
    for mine, exact in zip(got, expected, strict=True):
        assert sqnr(exact, mine) > 13
    for parameter in got[3:]:
        assert not parameter[unused].any()


@large
def test_no_tokens(device):
    layer = in_fp8(experts_of(device=device))
    ids = torch.empty(0, 2, dtype=torch.int64, device=device)
    y, dx, dweights, *rest = results(layer, normal(0, 200, device=device), ids, ids.float())
    assert y.shape == dx.shape == (0, 200) and dweights.shape == (0, 2)
    assert not any(gradient.any() for gradient in rest)


@large
def test_deterministic_and_recomputed(device):
    wide = experts_of(device=device)
    inputs = normal(300, 200, device=device), *choices(300, device)
    first, again = (results(in_fp8(wide, "bf16"), *inputs) for _ in range(2))
    recomputed = results(in_fp8(wide, "recompute"), *inputs)
    for one, two, three in zip(first, again, recomputed, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


# ---- what is saved ----


@large
@every_save
def test_bytes_that_are_saved(device, save):
    t, k, i = 256, 384, 512
    layer = in_fp8(experts_of(k=k, i=i, device=device, dtype=torch.bfloat16), save)
    inputs = normal(t, k, device=device, dtype=torch.bfloat16, grad=True), *choices(t, device)
    with saved_tensors() as saved:
        layer(*inputs)
    parameters = 4 * 3 * i * k + (4 * 2 * i * k if save == "recompute" else 0)
    kept = {"bf16": k + 4 * i, "fp8": k + 2 * i, "recompute": 2 * k}[save]
    narrow = (torch.float8_e4m3fn, torch.bfloat16)
    sizes = {t.data_ptr(): t.nbytes for t in saved if t.dtype in narrow}
    assert sum(sizes.values()) == 2 * t * kept + parameters
    others = {t.data_ptr(): t.nbytes for t in saved if t.dtype not in narrow}
    assert sum(others.values()) < sum(sizes.values()) / 20


@large
@every_save
def test_every_choice_of_gradients(device, save):
    layer = in_fp8(experts_of(device=device), save)
    x, (ids, weights) = normal(20, 200, device=device), choices(20, device)
    leaves = {"x": x, "weights": weights, **dict(layer.named_parameters())}
    full = dict(zip(["y", *leaves], results(layer, x, ids, weights), strict=True))
    for chosen in itertools.product([False, True], repeat=len(leaves)):
        for leaf, needed in zip(leaves.values(), chosen, strict=True):
            leaf.grad = None
            leaf.requires_grad_(needed)
        y = layer(x, ids, weights)
        assert torch.equal(y, full["y"]) and y.requires_grad == any(chosen)
        if any(chosen):
            y.backward(torch.arange(y.numel(), device=device).remainder(11).view_as(y).sub(3).to(y))
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                assert torch.equal(gradient(leaf), full[name]), name
            else:
                assert leaf.grad is None


@large
@every_save
def test_saved_tensors_may_be_copied(device, save):
    layer = in_fp8(experts_of(device=device), save)
    inputs = normal(33, 200, device=device), *choices(33, device)
    expected = results(layer, *inputs)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        assert all(map(torch.equal, results(layer, *inputs), expected))


@large
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(device, use_reentrant):
    layer = in_fp8(experts_of(device=device))
    inputs = normal(33, 200, device=device), *choices(33, device)
    expected = results(layer, *inputs)
    plain = layer.forward
    layer.forward = lambda *args: checkpoint(plain, *args, use_reentrant=use_reentrant)
    assert all(map(torch.equal, results(layer, *inputs), expected))


# ---- modes ----


@large
def test_autocast(device):
    layer = in_fp8(experts_of(device=device))
    x, (ids, weights) = normal(33, 200, device=device), choices(33, device)
    with torch.autocast(device.type, torch.bfloat16):
        y, dx, *_ = results(layer, x, ids, weights)
    assert y.dtype == dx.dtype == torch.float32
    expected, *_ = results(layer, x, ids, weights)
    assert sqnr(expected, y) > 30 and not torch.equal(expected, y)


@large
def test_weights_are_kept_and_dropped(device):
    layer = in_fp8(experts_of(device=device))
    inputs = normal(5, 200, device=device), *choices(5, device)
    with fixed_weights(layer):
        y = layer(*inputs)
        with OpCounter() as counter:
            assert torch.equal(layer(*inputs), y)
        assert counter.of("quantize_128x128", "quantize_128x128_dual") == 0
        layer.down_proj.data.mul_(2)  # not recorded
        assert torch.equal(layer(*inputs), y)
        layer.refresh_weight()
        assert torch.equal(layer(*inputs), 2 * y)
    with torch.no_grad():
        layer.gate_up_proj.zero_()
        assert not layer.eval()(*inputs).any()


@large
def test_without_gradients(device):
    layer = in_fp8(experts_of(device=device))
    inputs = normal(33, 200, device=device), *choices(33, device)
    expected, *_ = results(layer, *inputs)
    with torch.no_grad():
        assert torch.equal(layer(*inputs), expected)
        assert torch.equal(layer(inputs[0], weights=inputs[2], ids=inputs[1].int()), expected)


@large
def test_second_derivative_is_refused(device):
    layer = in_fp8(experts_of(device=device))
    x = normal(5, 200, device=device, grad=True)
    (dx,) = torch.autograd.grad(layer(x, *choices(5, device)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()


@large
def test_the_class_runs_where_experts_cannot(device):
    layer = in_fp8(experts_of(device=device))
    x, (ids, weights) = normal(5, 200, device=device), choices(5, device)
    own = Experts.forward
    double = copy.deepcopy(layer).double()
    for model, inputs in (
        (double, (x.double(), ids, weights.double())),
        (layer, (x, ids[:1].expand_as(ids).to(torch.uint8), weights)),
    ):
        assert not runs_fused(model, *inputs)
        assert torch.equal(model(*inputs), own(model, *inputs))
    batched = torch.vmap(lambda w: layer(x, ids, w))(weights[None])
    assert torch.equal(batched[0], own(layer, x, ids, weights))
    with pytest.raises(TypeError, match="forward"):
        layer(x, ids, weights, weights)
