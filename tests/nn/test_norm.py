"""Norms that offer quantized results: their numbers, what they save, when they do not fuse."""

from __future__ import annotations

import collections
import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from support.linear_testing import (
    QUANTIZE_ACTIVATION,
    OpCounter,
    counting_backend,
    gradient,
    normal,
    normal_linear,
    saved_tensors,
)
from torchext import Recipe
from torchext.nn import LayerNorm, RMSNorm, SwiGLU
from torchext.ops import quantize_1x128, rms_norm_quantize_1x128

K = 200
pytestmark = pytest.mark.large  # tests/norm has the kernels
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NORMS: dict[str, Any] = {
    "RMSNorm": RMSNorm,
    "RMSNorm, 1 + w": lambda *args, **options: RMSNorm(*args, unit_offset=True, **options),
    "LayerNorm": LayerNorm,
    "LayerNorm without bias": lambda *args, **options: LayerNorm(*args, bias=False, **options),
}
every_norm = pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
FUSED = tuple(
    f"{kind}_norm_quantize_1x128{dual}" for kind in ("rms", "layer") for dual in ("", "_dual")
)


def norm_of(make: Any, device: torch.device, **options: Any) -> Any:
    torch.manual_seed(0)
    norm = make(K, device=device, **options)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return norm


def plain(norm: Any) -> Any:
    """PyTorch's result with the norm's parameters."""
    norm = copy.deepcopy(norm)
    if getattr(norm, "unit_offset", False):
        norm.weight = nn.Parameter(norm.weight.detach() + 1)
    norm.__class__ = nn.RMSNorm if isinstance(norm, nn.RMSNorm) else nn.LayerNorm
    return norm


def results(module: Any, x: Tensor) -> list[Tensor]:
    """y, and the gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    dy = torch.arange(y.numel(), device=y.device).remainder(11).view_as(y).sub(3).to(y)
    y.backward(dy)
    return [y.detach(), gradient(x), *map(gradient, module.parameters())]


class Attention(nn.Module):
    """A norm, and two layers that read its result."""

    def __init__(self, device: torch.device, norm: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = norm
        self.q, self.k = (normal_linear(device, K, 136, dtype=dtype) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.q(y) * self.k(y).sigmoid()


# ---- numbers ----


@every_norm
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=["FP32 weight", ""])
def test_against_float64(device, make, dtype, weight_dtype):
    """As close as a result that is rounded once, and the same bits in each forward."""
    norm = norm_of(make, device, dtype=weight_dtype or dtype)
    x = normal(2, 35, K, device=device, dtype=dtype)
    expected = results(plain(norm).double(), x.double())
    got = results(norm, x)
    for mine, exact in zip(got, expected, strict=True):
        error = (mine.double() - exact).abs().max() / exact.abs().max()
        assert error <= max(torch.finfo(mine.dtype).eps, 2e-6)
    assert got[0].dtype == got[1].dtype == dtype
    assert all(g.dtype == norm.weight.dtype for g in got[2:])
    assert all(map(torch.equal, results(norm, x), got))  # without a transpose


@every_norm
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_those_of_quantizing_the_returned_tensor(device, make, dtype):
    module = Attention(device, norm_of(make, device, dtype=dtype), dtype)
    x = normal(3, 5, K, device=device, dtype=dtype)
    with OpCounter() as counter:
        got = results(module, x)
    assert counter.of(*FUSED) == 1 and counter.of(*QUANTIZE_ACTIVATION) == 2  # of two gradients
    module.norm.register_forward_hook(lambda module, args, y: y * 1)
    with OpCounter() as counter:
        expected = results(module, x)
    assert counter.of(*QUANTIZE_ACTIVATION) == 3
    assert all(map(torch.equal, got, expected))


def test_an_mlp_takes_the_offer(device):
    norm, mlp = norm_of(RMSNorm, device), SwiGLU(K, 128, device=device, dtype=torch.float32)
    x = normal(2, 9, K, device=device)
    with OpCounter() as counter:
        y = mlp(norm(x))
    assert counter.of(*FUSED) == 1
    assert counter.of(*QUANTIZE_ACTIVATION) == 1  # what save="fp8" keeps
    assert torch.equal(y, mlp(norm(x).clone()))


def test_other_recipes_get_what_they_need(device):
    norm = norm_of(RMSNorm, device)
    for recipe in (
        Recipe.deepseek_v3(pow2_scale=True),
        Recipe("blockwise", input_dtype=torch.float8_e5m2),
        Recipe.rowwise(),
    ):
        layer = normal_linear(device, K, recipe=recipe)
        for _ in range(3):
            y = norm(x := normal(9, K, device=device))
            assert torch.equal(layer(y), layer(y.clone()))
        with OpCounter() as counter:
            layer(norm(x))
        assert counter.of(*FUSED) == 1 and counter.of(*QUANTIZE_ACTIVATION) == 0


def test_no_transpose_is_made_for_nobody(device):
    norm = norm_of(RMSNorm, device)
    norm(x := normal(9, K, device=device))
    norm(x)
    with OpCounter() as counter:
        norm(x)
    assert counter.calls == {"rms_norm_quantize_1x128": 1}


# ---- what backward keeps ----


@every_norm
def test_saved_bytes(device, make):
    norm = norm_of(make, device, dtype=torch.bfloat16)
    x = normal(40, K, device=device, dtype=torch.bfloat16, grad=True)
    for _ in range(3):  # with a transpose, then without
        with saved_tensors() as saved:
            norm(x)
        values = 1 if isinstance(norm, RMSNorm) else 2
        sizes = [t.nbytes for t in saved if t is not norm.weight and t is not x]
        assert sizes == [4 * 40] * values


def test_nothing_outlives_the_result(device):
    norm, layer = norm_of(RMSNorm, device), normal_linear(device, K)
    y = norm(normal(9, K, device=device))
    z = layer(y)
    kept = weakref.ref(z.grad_fn.saved_tensors[2].untyped_storage())
    del z
    assert kept() is not None  # as long as another layer may read y
    del y
    assert kept() is None


def test_frozen_norm(device):
    norm = norm_of(LayerNorm, device)
    x = normal(9, K, device=device, grad=True)
    (expected,) = torch.autograd.grad(norm(x).sum(), x)
    norm.weight.requires_grad_(False)
    norm(x).sum().backward()
    assert torch.equal(gradient(x), expected)
    assert norm.weight.grad is None and norm.bias.grad is not None


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("read", [True, False], ids=["read", "unread"])
def test_checkpointing(device, use_reentrant, read):
    norm = norm_of(RMSNorm, device)
    module = Attention(device, norm, torch.float32) if read else nn.Sequential(norm, nn.Tanh())
    x = normal(40, K, device=device)
    for _ in range(3):  # from the guess to what was learned
        again = copy.deepcopy(module)
        expected = results(module, x)
        run = lambda x, m=again: checkpoint(m, x, use_reentrant=use_reentrant)  # noqa: E731
        again_results = results(Called(run, again), x)
        assert all(map(torch.equal, again_results, expected))


class Called(nn.Module):
    """A module that is called in another way."""

    def __init__(self, function: Any, module: nn.Module) -> None:
        super().__init__()
        self.function, self.module = function, module

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_selective_checkpointing(device):
    """Ops are replayed in order, while what the norms learn changes in between."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx, op, *args, **kwargs):
        saves = "quantize_1x128" in str(op)
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    norms = [norm_of(RMSNorm, device) for _ in range(2)]
    module = nn.Sequential(norms[0], nn.Tanh(), Attention(device, norms[1], torch.float32))
    again = copy.deepcopy(module)
    expected = results(module, x := normal(40, K, device=device))

    def run(x: Tensor) -> Tensor:
        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        y = checkpoint(again, x, use_reentrant=False, context_fn=contexts)
        for _ in range(3):
            again[0](x.detach() * 1)  # learns that nobody reads it
        return y

    assert all(map(torch.equal, results(Called(run, again), x), expected))


# ---- what surrounds it ----


@pytest.mark.slow
@every_norm
def test_compiled_and_transformed(device, make):
    norm = norm_of(make, device)
    x = normal(9, K, device=device)
    expected = norm(x)
    calls: collections.Counter[str] = collections.Counter()
    torch._dynamo.reset()
    compiled = torch.compile(
        copy.deepcopy(norm), backend=counting_backend(calls), fullgraph=True, dynamic=True
    )
    for rows in (9, 33):
        input = normal(2, rows, K, device=device)
        assert all(map(torch.equal, results(compiled, input), results(norm, input)))
    family = "rms_norm" if isinstance(norm, RMSNorm) else "layer_norm"
    assert calls == {f"{family}_quantize_1x128": 1, f"{family}_backward": 1}
    torch.testing.assert_close(torch.vmap(norm)(x), expected)
    torch.testing.assert_close(norm(x.t().contiguous().t()), expected)
    assert norm(x[:0]).shape == (0, K)
    with torch.inference_mode():
        assert torch.equal(norm(x), expected)


class Read(nn.Module):
    """A norm that two layers read; in between, something may write to its result."""

    def __init__(self, device: torch.device, write: Any = None) -> None:
        super().__init__()
        self.norm, self.write = norm_of(RMSNorm, device), write
        self.layers = nn.ModuleList(normal_linear(device) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        first, second = self.layers
        y = self.norm(x)
        z = first(y)
        if self.write is not None:
            self.write(y)
        return [z, second(y)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "write, quantizations",
    [(None, 0), (lambda y: y.add_(1), 1), (lambda y: y[1].mul_(2), 1)],
    ids=["", "whole", "view"],
)
def test_compiled_layers_take_the_offer(device, write, quantizations):
    """Without gradients. Otherwise the layers quantize, in the form that a graph keeps."""
    model, x = Read(device, write), normal(9, K, device=device)
    calls: collections.Counter[str] = collections.Counter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting_backend(calls), fullgraph=True)
    with torch.no_grad():
        assert all(map(torch.equal, compiled(x), model(x)))
    assert calls["rms_norm_quantize_1x128"] == 1 and calls["quantize_1x128"] == quantizations


def test_other_tracers_see_writes(device):
    """Without AOTAutograd a write makes no new value, but changes the tensor's version."""

    def function(x: Tensor) -> list[Tensor]:
        y = rms_norm_quantize_1x128(x, weight, 1e-6, return_normed=True)[-1]
        datas = [quantize_1x128(y)[0], quantize_1x128(y, pow2_scale=True)[0]]
        y.add_(1)
        return [*datas, quantize_1x128(y)[0]]

    weight, x = torch.ones(K, device=device), normal(9, K, device=device)
    graph = make_fx(function)(x)
    ops = [str(node.target) for node in graph.graph.nodes]
    assert ops.count("torchext.quantize_1x128.default") == 2
    for mine, expected in zip(graph(x), function(x), strict=True):
        assert torch.equal(mine.view(torch.uint8), expected.view(torch.uint8))


@every_norm
def test_second_derivatives_are_refused(device, make):
    norm = norm_of(make, device)
    x = normal(9, K, device=device, grad=True)
    (dx,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    name = type(norm).__name__
    with pytest.raises(RuntimeError, match=f"torchext.nn.{name}: backward must be differentiated"):
        dx.sum().backward()


def test_result_that_is_changed_is_quantized_again(device):
    norm, layer = norm_of(RMSNorm, device), normal_linear(device, K)
    x = normal(9, K, device=device)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = norm(x)
            layer(y)
            y = y * 1 if grad else y
            y.mul_(-3)
            assert torch.equal(layer(y), layer(y.clone()))
    norm.register_forward_hook(lambda module, args, y: y.detach().mul_(2))
    y = norm(x)
    assert torch.equal(layer(y), layer(y.clone()))


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_forward_hook"])
def test_hooks(device, hook):
    module = Attention(device, norm_of(RMSNorm, device), torch.float32)
    expected = results(module, x := normal(9, K, device=device))
    calls = []
    getattr(module.norm, hook)(lambda *args: calls.append(len(args)))
    assert all(map(torch.equal, results(module, x), expected)) and len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(device, dtype):
    norm, layer = norm_of(RMSNorm, device, dtype=dtype), normal_linear(device, K)
    x = normal(9, K, device=device, dtype=dtype)
    with torch.autocast(device.type, torch.bfloat16):
        expected = plain(norm)(x)
        layer(x)
        with OpCounter() as counter:
            y = layer(h := norm(x))
        assert y.dtype == torch.bfloat16 and h.dtype == expected.dtype
        assert torch.equal(y, layer(h.clone()))
    torch.testing.assert_close(h, expected)
    assert counter.of(*FUSED) == (dtype == torch.float32)


# ---- the module ----


@every_norm
def test_it_is_a_norm_of_pytorch(make):
    norm = norm_of(make, torch.device("cpu"))
    base = nn.RMSNorm if isinstance(norm, RMSNorm) else nn.LayerNorm
    assert isinstance(norm, base)
    other = base(K, bias=norm.bias is not None) if base is nn.LayerNorm else base(K)
    other.load_state_dict(norm.state_dict())
    x = normal(3, K, device=torch.device("cpu"))
    for again in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(again(x), norm(x)) and repr(again) == repr(norm)
    torch.testing.assert_close(make(K)(x), make(K, elementwise_affine=False)(x))


@pytest.mark.parametrize("norm", [RMSNorm((2, K)), LayerNorm((2, K)), RMSNorm(K, 1e-5, False)])
def test_other_shapes_are_those_of_pytorch(norm):
    x = normal(3, 2, K, device=torch.device("cpu"), grad=True)
    assert torch.equal(norm(x), plain(norm)(x))
    with pytest.raises(RuntimeError):
        norm(x[..., :-1])


def test_default_eps_is_that_of_pytorch():
    for dtype in DTYPES:
        x = normal(4, K, device=torch.device("cpu"), dtype=dtype) * 1e-3
        torch.testing.assert_close(RMSNorm(K, dtype=dtype)(x), nn.RMSNorm(K, dtype=dtype)(x))
