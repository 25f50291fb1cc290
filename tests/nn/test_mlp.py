"""MLPs with FP8 between their GEMMs: their numbers, what they save, and when they do not fuse."""

from __future__ import annotations

import collections
import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from support.linear_testing import (
    OpCounter,
    counting_backend,
    gradient,
    normal,
    saved_tensors,
    sqnr,
)
from torchext import Recipe, ops
from torchext.nn import GEGLU, GELUMLP, Linear, ReLU2MLP, SwiGLU

LAYERS: dict[str, Callable[..., Any]] = {
    "SwiGLU": SwiGLU,
    "GEGLU": GEGLU,
    "GEGLU, exact": lambda *a, **k: GEGLU(*a, tanh_approximation=False, **k),
    "GELU": GELUMLP,
    "GELU, tanh": lambda *a, **k: GELUMLP(*a, tanh_approximation=True, **k),
    "ReLU2": ReLU2MLP,
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
every_save = pytest.mark.parametrize("save", ["bf16", "fp8", "recompute"])
large = pytest.mark.large  # needs many GEMMs, or does not depend on the kernels


def layer_of(
    make: Callable[..., Any], device: torch.device, k: int = 200, i: int = 256, **options: Any
) -> Any:
    torch.manual_seed(0)
    layer = make(k, i, device=device, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return layer


def unfused(layer: Any) -> Any:
    """A copy that runs its layers one after another."""
    layer = copy.deepcopy(layer)
    layer.down_proj.register_forward_hook(lambda module, args, y: None)
    return layer


def in_float64(layer: Any) -> torch.nn.Module:
    layer = copy.deepcopy(layer)
    for name, child in list(layer.named_children()):
        wide = torch.nn.Linear(child.in_features, child.out_features, child.bias is not None)
        wide.load_state_dict(child.state_dict())
        setattr(layer, name, wide.double())
    return layer.double()


def results(layer: Any, x: Tensor) -> list[Tensor]:
    """y, and the gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    dy = torch.arange(y.numel(), device=y.device).remainder(11).view_as(y).sub(3).to(y)
    y.backward(dy)
    return [y.detach(), gradient(x), *map(gradient, layer.parameters())]


def runs_fused(layer: Any, x: Tensor) -> bool:
    with OpCounter() as counter:
        layer(x)
    return any("silu" in name or "gelu" in name or "relu2" in name for name in counter.calls)


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


# ---- numbers ----


@every_layer
@every_save
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_against_float64(device, make, save, dtype):
    """At most 3 dB more noise than from FP8 layers with an activation between them."""
    layer = layer_of(make, device, bias=True, dtype=dtype, save=save)
    x = normal(2, 70, 200, device=device, dtype=dtype)
    expected = results(in_float64(layer), x.double())
    got, separate = results(layer, x), results(unfused(layer), x)
    assert runs_fused(layer, x) and not runs_fused(unfused(layer), x)
    for mine, theirs, exact in zip(got, separate, expected, strict=True):
        assert mine.dtype == theirs.dtype == dtype
        assert mine.shape == theirs.shape
        limit = sqnr(exact, theirs) - (3 if save == "fp8" else 0.5)
        assert sqnr(exact, mine) >= max(limit, 18)


test_against_float64 = large(test_against_float64)


def test_bits_are_those_of_the_ops(device):
    """Forward and backward of SwiGLU are the ops that the documentation names, and no other."""
    layer = layer_of(SwiGLU, device, k=72, i=128, dtype=torch.bfloat16, save="bf16")
    x = normal(5, 72, device=device, dtype=torch.bfloat16)
    y, dx, dgate, dup, ddown = results(layer, x)

    weights = [layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight]
    quantized = [ops.quantize_128x128_dual(weight.detach()) for weight in weights]
    (gate, gate_scale, gate_t), (up, up_scale, up_t), (down, down_scale, down_t) = quantized
    data, scale, x_t, x_t_scale = ops.quantize_1x128_dual(x)
    wide = torch.cat(
        [
            ops.fp8_gemm_nt(data, scale, gate, gate_scale),
            ops.fp8_gemm_nt(data, scale, up, up_scale),
        ],
        1,
    )
    h, h_scale, h_t, h_t_scale = ops.silu_mul_quantize_1x128_dual(wide)
    assert torch.equal(y, ops.fp8_gemm_nt(h, h_scale, down, down_scale))

    dy = torch.arange(y.numel(), device=device).remainder(11).view_as(y).sub(3).to(y)
    dy, dy_scale, dy_t, dy_t_scale = ops.quantize_1x128_dual(dy)
    assert torch.equal(ddown, ops.fp8_gemm_nt(dy_t, dy_t_scale, h_t, h_t_scale))
    dh = ops.fp8_gemm_nt(dy, dy_scale, down_t, down_scale.t())
    dwide, dwide_scale, dwide_t, dwide_t_scale, *_ = ops.silu_mul_backward_quantize_1x128_dual(
        dh, wide
    )
    dw = ops.fp8_gemm_nt(dwide_t, dwide_t_scale, x_t, x_t_scale)
    assert torch.equal(torch.cat([dgate, dup]), dw)
    expected = ops.fp8_gemm_nt(dwide[:, :128], dwide_scale[:, :1], gate_t, gate_scale.t())
    ops.fp8_gemm_nt(
        dwide[:, 128:], dwide_scale[:, 1:], up_t, up_scale.t(), out=expected, accumulate=True
    )
    assert torch.equal(dx, expected)


@large
@every_layer
def test_recomputation_gives_the_same_bits(device, make):
    x = normal(130, 200, device=device)
    kept, again = (layer_of(make, device, bias=True, save=s) for s in ("bf16", "recompute"))
    assert_equal(results(again, x), results(kept, x))


@large
@every_save
def test_nan_reaches_all_that_depends_on_it(device, save):
    layer = layer_of(SwiGLU, device, save=save)
    x = normal(130, 200, device=device)
    x[3, 5] = float("nan")
    y, dx, *weights = results(layer, x)
    assert y[3].isnan().all() and dx[3].isnan().any() and y[4].isfinite().all()
    assert all(weight.isnan().any() for weight in weights)


# ---- what is saved ----


@large
@every_layer
@every_save
def test_bytes_that_are_saved(device, make, save):
    m, k, i = 256, 384, 512
    layer = layer_of(make, device, k, i, dtype=torch.bfloat16, save=save)
    x = normal(m, k, device=device, dtype=torch.bfloat16, grad=True)
    layer(x)
    with saved_tensors() as saved:
        layer(x)
    wide = 2 * i if hasattr(layer, "gate_proj") else i
    weights = k * (i + wide)  # the FP8 transposes
    if save == "recompute":
        weights += wide * k
    data = sum({t.data_ptr(): t.nbytes for t in saved if t.dtype != torch.float32}.values())
    kept = {"bf16": k + 2 * wide, "fp8": k + wide, "recompute": 2 * k}[save]
    assert data == m * kept + weights
    scales = sum({t.data_ptr(): t.nbytes for t in saved if t.dtype == torch.float32}.values())
    assert scales < data / 24


@large
@pytest.mark.parametrize("copied", [torch.clone, lambda t: t.contiguous().clone()])
@every_save
def test_saved_tensors_may_be_copied(device, copied, save):
    layer = layer_of(SwiGLU, device, bias=True, save=save)
    x = normal(133, 200, device=device)
    expected = results(layer, x)
    with torch.autograd.graph.saved_tensors_hooks(copied, copied):
        assert_equal(results(layer, x), expected)


@large
@every_layer
@every_save
def test_every_choice_of_frozen_parameters(device, make, save):
    layer = layer_of(make, device, bias=True, save=save)
    x = normal(20, 200, device=device)
    full = dict(zip(["y", "x", *dict(layer.named_parameters())], results(layer, x), strict=True))
    frozen = ["x", "up_proj.weight", "up_proj.bias", "down_proj.weight", "down_proj.bias"]
    for chosen in itertools.product([False, True], repeat=len(frozen)):
        trains = dict(zip(frozen, chosen, strict=True))
        for name, parameter in layer.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(trains.get(name, trains["up_proj.weight"]))
        leaf = x.detach().requires_grad_(trains["x"])
        y = layer(leaf)
        assert torch.equal(y, full["y"])
        if not y.requires_grad:
            assert not any(p.requires_grad for p in layer.parameters())
            continue
        y.backward(torch.arange(y.numel(), device=device).remainder(11).view_as(y).sub(3).to(y))
        for name, tensor in (("x", leaf), *layer.named_parameters()):
            if tensor.requires_grad:
                assert torch.equal(gradient(tensor), full[name]), name
            else:
                assert tensor.grad is None


# ---- shapes, dtypes, modes ----


@large
@every_layer
@pytest.mark.parametrize(
    "shape", [(200,), (1, 200), (2, 3, 5, 200), (0, 200), (2, 0, 200)], ids=str
)
def test_inputs_of_any_rank(device, make, shape):
    layer = layer_of(make, device)
    x = normal(*shape, device=device)
    got = results(layer, x)
    expected = results(layer, x.view(-1, 200))
    assert_equal([t.view(-1, 200) for t in got[:2]], expected[:2])
    assert_equal(got[2:], expected[2:])
    assert got[0].shape == shape


@large
def test_input_of_any_strides(device):
    layer = layer_of(SwiGLU, device)
    x = normal(200, 3, 17, device=device)
    assert_equal(
        results(layer, x.permute(2, 1, 0)), results(layer, x.permute(2, 1, 0).contiguous())
    )


@large
@every_layer
def test_without_gradients(device, make):
    layer = layer_of(make, device, bias=True)
    x = normal(20, 200, device=device)
    expected = results(layer, x)[0]
    for mode in (torch.no_grad, torch.inference_mode):
        for training in (True, False):
            with mode():
                assert torch.equal(layer.train(training)(x), expected)


@large
def test_autocast(device):
    layer = layer_of(SwiGLU, device)
    x = normal(20, 200, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16 and runs_fused(layer, x)
    y.sum().backward()
    assert gradient(layer.gate_proj.weight).dtype == torch.float32


@large
@every_save
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(device, save, use_reentrant):
    layer = layer_of(SwiGLU, device, save=save)
    x = normal(20, 200, device=device)
    expected = results(layer, x)

    class Checkpointed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.layer, x, use_reentrant=use_reentrant)

    assert_equal(results(Checkpointed(), x), expected)


@large
def test_changed_weights_are_used(device):
    layer = layer_of(SwiGLU, device)
    x = normal(20, 200, device=device)
    before = layer(x)
    for parameter in layer.parameters():
        parameter.data.mul_(0.5)
        after = layer(x)
        assert torch.equal(after, copy.deepcopy(layer)(x))
        assert not torch.equal(after, before)
        before = after


@large
def test_second_derivative_is_refused(device):
    layer = layer_of(SwiGLU, device)
    x = normal(4, 200, device=device, grad=True)
    (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()


# ---- when it does not fuse ----


def _hook(layer: Any) -> None:
    layer.up_proj.register_forward_hook(lambda module, args, y: y * 1)


def _backward_hook(layer: Any) -> None:
    layer.gate_proj.register_full_backward_hook(lambda module, dx, dy: None)


def _parametrize(layer: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(layer.down_proj)


def _replace_forward(layer: Any) -> None:
    layer.down_proj.forward = torch.nn.Linear.forward.__get__(layer.down_proj)


def _other_recipe(layer: Any) -> None:
    layer.up_proj.recipe = Recipe.deepseek_v3(pow2_scale=True)


def _rowwise(layer: Any) -> None:
    for child in layer.children():
        child.recipe = Recipe.rowwise()


def _wide_wgrad(layer: Any) -> None:
    for child in layer.children():
        child.recipe = Recipe.parse("blockwise+wgrad=bf16")


def _plain(layer: Any) -> None:
    layer.down_proj.revert_()


def _lora(layer: Any) -> None:
    class LoRA(torch.nn.Module):
        def __init__(self, base: torch.nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Any:
            return self.base(x) + 1

    layer.gate_proj = LoRA(layer.gate_proj)


CHANGES = [
    _hook,
    _backward_hook,
    _parametrize,
    _replace_forward,
    _other_recipe,
    _rowwise,
    _wide_wgrad,
    _plain,
    _lora,
]


@large
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_layers_that_do_more_are_called(device, change):
    layer = layer_of(SwiGLU, device)
    change(layer)
    x = normal(20, 200, device=device)
    assert not runs_fused(layer, x)
    expected = layer.down_proj(torch.nn.functional.silu(layer.gate_proj(x)) * layer.up_proj(x))
    assert torch.equal(layer(x), expected)


@large
def test_ragged_intermediate_size(device):
    """A gate and up whose scale groups would straddle both are computed one after another."""
    x = normal(20, 200, device=device)
    assert not runs_fused(layer_of(SwiGLU, device, i=200), x)
    assert runs_fused(layer_of(GELUMLP, device, i=200), x)
    for make in (SwiGLU, GELUMLP):
        layer = layer_of(make, device, i=200)
        expected = results(in_float64(layer), x.double())
        assert all(map(lambda e, g: sqnr(e, g) > 18, expected, results(layer, x)))


@large
@every_layer
def test_compiled_in_one_graph(device, make):
    """It runs fused, to the bits of the eager layer, with every size of a batch."""
    layer = layer_of(make, device, bias=True)
    calls: collections.Counter[str] = collections.Counter()
    torch._dynamo.reset()
    compiled = torch.compile(
        copy.deepcopy(layer), fullgraph=True, dynamic=True, backend=counting_backend(calls)
    )
    for rows in (10, 33):
        x = normal(2, rows, 200, device=device)
        assert_equal(results(compiled, x), results(layer, x))
    activation = layer.activation
    gated = activation.endswith("_mul")
    assert calls == {
        "quantize_128x128_dual": 3 if gated else 2,
        "quantize_1x128_dual": 1,  # of x
        "quantize_1x128_dual_bias_grad": 1,  # of dy
        **({"gate_up": 1} if gated else {}),
        f"{activation}_quantize_1x128": 1,
        "quantize_1x128": 1,  # for backward
        f"{activation}_backward_quantize_1x128_dual": 1,
        "fp8_gemm_nt": 7 if gated else 6,
    }


@large
def test_transforms(device):
    layer = layer_of(SwiGLU, device)
    x = normal(6, 200, device=device)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().mean()

    gradients = torch.func.grad(loss)(parameters, x)
    plain = unfused(layer)
    plain(x).square().mean().backward()
    for name, parameter in plain.named_parameters():
        assert sqnr(gradient(parameter), gradients[name]) > 30  # silu differentiated otherwise
    assert torch.func.vmap(layer)(x).shape == x.shape


# ---- as a module ----


@every_layer
def test_state_dict(device, make):
    layer = layer_of(make, device, bias=True)
    copied = layer_of(make, device, bias=True)
    state = {name: tensor + 1 for name, tensor in layer.state_dict().items()}
    names = ["up_proj", "down_proj"]
    if hasattr(layer, "gate_proj"):
        names = ["gate_proj", *names]
    assert list(state) == [f"{name}.{p}" for name in names for p in ("weight", "bias")]
    copied.load_state_dict(state)
    assert_equal([*copied.state_dict().values()], [*state.values()])
    if hasattr(layer, "gate_proj"):
        for p in ("weight", "bias"):
            both = state.pop(f"gate_proj.{p}"), state.pop(f"up_proj.{p}")
            state[f"gate_up_proj.{p}"] = torch.cat(both)
        layer.load_state_dict(state)
        assert_equal([*layer.state_dict().values()], [*copied.state_dict().values()])


@large
def test_copies_and_pickles(device):
    layer = layer_of(SwiGLU, device, save="recompute")
    x = normal(20, 200, device=device)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y) and twin.save == "recompute"


def test_errors(device):
    with pytest.raises(ValueError, match=r"SwiGLU: save must be one of .* \(got 'all'\)"):
        SwiGLU(8, 8, save="all")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"recipe must be a torchext\.Recipe"):
        SwiGLU(8, 8, recipe="blockwise")  # type: ignore[arg-type]
    layer = layer_of(SwiGLU, device, i=128, bias=True)
    with pytest.raises(RuntimeError, match=r"input must have shape \[\.\.\., 200\]"):
        layer(normal(3, 199, device=device))
    with pytest.raises(TypeError, match=r"input must be torch\.float32"):
        layer(torch.zeros(3, 200, device=device, dtype=torch.float64))
    layer.up_proj.bias = torch.nn.Parameter(torch.zeros(127, device=device))
    with pytest.raises(RuntimeError, match=r"bias must have shape \[128\]"):
        layer(normal(3, 200, device=device))


def test_uses_linear_layers():
    assert all(type(child) is Linear for child in SwiGLU(8, 8).children())
    assert repr(SwiGLU(8, 8)).startswith("SwiGLU(\n  save='fp8'")
