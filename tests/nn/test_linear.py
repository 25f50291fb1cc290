"""torchext.nn.Linear behaves as a torch.nn.Linear whose GEMMs run in FP8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from support.linear_testing import (
    QUANTIZE_ACTIVATION,
    QUANTIZE_WEIGHT,
    OpCounter,
    assert_quantized_afresh,
    every_recipe,
    gradient,
    main_recipes,
    normal,
    normal_linear,
    saved_tensors,
    sqnr,
    train_step,
)
from torchext import Recipe, fixed_weights
from torchext.nn import Linear

# ---- numbers ----


@every_recipe
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mnk", [(96, 384, 256), (37, 77, 200), (130, 129, 131)], ids=str)
def test_output_and_gradients_are_close_to_float64(device, recipe, dtype, mnk):
    m, n, k = mnk
    linear = normal_linear(device, k, n, recipe, dtype=dtype)
    x = normal(m, k, device=device, dtype=dtype, grad=True)
    dy = normal(m, n, device=device, dtype=dtype)
    y = linear(x)
    y.backward(dy)
    assert y.dtype == gradient(x).dtype == dtype
    assert gradient(linear.weight).dtype == gradient(linear.bias).dtype == dtype
    # e5m2 has 2 bits of mantissa: data alone has an SQNR of 25.6 dB, and its product with e4m3 data
    # (31.6 dB) 24.6 dB.
    coarse = torch.float8_e5m2
    least_y = 24.0 if recipe.input_dtype is coarse else 25.0
    least_dx = 24.0 if recipe.grad_dtype is coarse else 25.0
    least_dw = 22.0 if recipe.input_dtype is coarse else least_dx
    wide_x, wide_w, wide_dy = x.detach().double(), linear.weight.detach().double(), dy.double()
    assert sqnr(wide_x @ wide_w.t() + linear.bias.double(), y) >= least_y
    assert sqnr(wide_dy @ wide_w, gradient(x)) >= least_dx
    assert sqnr(wide_dy.t() @ wide_x, gradient(linear.weight)) >= least_dw
    assert sqnr(wide_dy.sum(0), gradient(linear.bias)) >= 40


@main_recipes
def test_every_product_runs_in_fp8(device, recipe):
    linear = normal_linear(device, recipe=recipe)
    with OpCounter() as counter:
        train_step(linear, normal(24, 200, device=device, grad=True))
    assert counter.calls["fp8_gemm_nt"] == 3
    assert counter.of("mm", "addmm", "bmm") == 0


@pytest.mark.parametrize("bias", [True, False])
def test_bias_gradient_is_summed_in_fp32(device, bias):
    linear = normal_linear(device, 128, 128, dtype=torch.bfloat16, bias=bias)
    x = normal(300, 128, device=device, dtype=torch.bfloat16)
    y = linear(x)
    y.backward(torch.full_like(y, 1.0))
    if bias:
        # 300 ones: a BF16 running sum would stop at 256.
        assert torch.equal(gradient(linear.bias), torch.full_like(linear.bias, 300.0))
    else:
        assert linear.bias is None


def test_infinity_reaches_the_output_as_nan(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    x[3, 5] = float("inf")
    y = linear(x)
    assert y[3].isnan().all()
    assert y[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


# ---- shapes ----


@main_recipes
@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)], ids=str)
def test_any_leading_shape(device, recipe, leading):
    linear = normal_linear(device, recipe=recipe)
    x = normal(*leading, 200, device=device, grad=True)
    y = linear(x)
    assert y.shape == (*leading, 136)
    assert y.is_contiguous()
    y.sum().backward()
    assert x.grad.shape == x.shape
    flat = normal_linear(device, recipe=recipe)
    flat_x = x.detach().reshape(-1, 200).requires_grad_()
    flat_y = flat(flat_x)
    flat_y.sum().backward()
    assert torch.equal(y.reshape(-1, 136), flat_y)
    assert torch.equal(x.grad.reshape(-1, 200), flat_x.grad)
    assert torch.equal(gradient(linear.weight), gradient(flat.weight))
    assert torch.equal(gradient(linear.bias), gradient(flat.bias))


@main_recipes
@pytest.mark.parametrize("k, n", [(1, 1), (3, 130), (129, 1), (17, 255)])
def test_any_number_of_features(device, recipe, k, n):
    linear = normal_linear(device, k, n, recipe)
    x = normal(50, k, device=device, grad=True)
    y = train_step(linear, x)
    reference = x.double() @ linear.weight.double().t() + linear.bias.double()
    assert sqnr(reference, y) >= 24
    assert gradient(x).isfinite().all() and gradient(linear.weight).isfinite().all()


@main_recipes
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_features(device, recipe):
    no_inputs = Linear(0, 8, device=device, recipe=recipe)
    y = no_inputs(torch.ones(3, 0, device=device))
    assert torch.equal(y, no_inputs.bias.expand(3, 8))
    no_outputs = Linear(8, 0, device=device, recipe=recipe)
    assert no_outputs(torch.ones(3, 8, device=device)).shape == (3, 0)


@main_recipes
def test_strided_inputs_and_gradients(device, recipe):
    linear = normal_linear(device, recipe=recipe)
    storage = normal(3, 200, 4, device=device)
    x = storage.transpose(1, 2).requires_grad_()  # [3, 4, 200]; features are not contiguous
    linear(x).transpose(0, 2).sum().backward()  # the gradient is one value with all strides 0
    other = normal_linear(device, recipe=recipe)
    other_x = x.detach().contiguous().requires_grad_()
    y = other(other_x)
    y.backward(torch.ones_like(y))
    assert torch.equal(gradient(x), other_x.grad)
    assert torch.equal(gradient(linear.weight), gradient(other.weight))


@pytest.mark.parametrize("shape", [(), (5,), (3, 199), (200, 3)], ids=str)
def test_wrong_shape_is_refused_like_torch_does(device, shape):
    linear = normal_linear(device)
    x = torch.ones(shape, device=device)
    with pytest.raises(
        RuntimeError, match=r"torchext\.nn\.Linear: input must have shape \[\.\.\., 200\]"
    ):
        linear(x)
    with pytest.raises(RuntimeError):
        torch.nn.Linear(200, 136, device=device)(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_wrong_dtype_is_refused(device, dtype):
    with pytest.raises(TypeError, match=r"input must be torch\.float32, .* \(got " + str(dtype)):
        normal_linear(device)(torch.zeros(3, 200, device=device).to(dtype))
    with pytest.raises(TypeError, match=r"weight must be torch\.float32, .* \(got torch.float64"):
        normal_linear(device).double()(torch.zeros(3, 200, device=device))


def test_wrong_device_is_refused(device):
    with pytest.raises(RuntimeError, match=r"input must be on device .* \(got meta"):
        normal_linear(device)(torch.zeros(3, 200, device="meta"))


# ---- what is kept for backward, and what work is done ----


def test_input_is_saved_in_fp8_only(device):
    linear = normal_linear(device, 256, 384)
    x = normal(512, 256, device=device, grad=True)
    with saved_tensors() as saved:
        linear(x)
    by_dtype = {t.dtype: sum(s.nbytes for s in saved if s.dtype == t.dtype) for t in saved}
    # x_t and w_t in FP8; a scale for each 128 values of x_t and for each block of w_t.
    assert by_dtype == {
        torch.float8_e4m3fn: 512 * 256 + 384 * 256,
        torch.float32: 4 * (512 * 256 // 128 + (384 // 128) * (256 // 128)),
    }
    assert all(t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for t in saved)


@main_recipes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_wide_is_saved(device, recipe, dtype):
    linear = normal_linear(device, recipe=recipe, dtype=dtype)
    x = normal(256, 200, device=device, dtype=dtype, grad=True)
    with saved_tensors() as saved:
        linear(x)
    assert sum(t.numel() for t in saved if t.itemsize == 1) >= x.numel()
    assert all(t.numel() < x.numel() // 64 for t in saved if t.itemsize > 1)  # only scales


@main_recipes
def test_input_is_freed(device, recipe):
    linear = normal_linear(device, recipe=recipe)
    x = normal(16, 200, device=device, grad=True) * 2
    reference = torch.multiprocessing.reductions.StorageWeakRef(x.untyped_storage())
    y = linear(x)
    del x
    assert reference.expired()
    y.sum().backward()


def test_frozen_input_needs_no_dgrad(device):
    linear = normal_linear(device)
    with OpCounter() as counter, saved_tensors() as saved:
        train_step(linear, normal(24, 200, device=device))
    assert counter.calls["fp8_gemm_nt"] == 2
    assert counter.calls["quantize_128x128"] == 1  # no transposed weight
    assert counter.calls["quantize_1x128_dual_bias_grad"] == 1  # the gradient
    linear = normal_linear(device, bias=False)
    with OpCounter() as counter:
        train_step(linear, normal(24, 200, device=device))
    assert counter.calls["quantize_1x128_t"] == 1  # the gradient, for wgrad only
    assert not any(t.shape == (200, 136) for t in saved)


def test_frozen_weight_needs_no_wgrad_and_no_input(device):
    linear = normal_linear(device).requires_grad_(False)
    x = normal(24, 200, device=device, grad=True)
    with OpCounter() as counter, saved_tensors() as saved:
        train_step(linear, x)
    assert counter.calls["fp8_gemm_nt"] == 2
    assert counter.of("quantize_1x128") == 2 and counter.of(*QUANTIZE_ACTIVATION) == 2
    assert not any(t.dtype == torch.float8_e4m3fn and 24 in t.shape for t in saved)
    assert x.grad is not None and linear.weight.grad is None


def test_trained_bias_alone_needs_no_gemm_in_backward(device):
    linear = normal_linear(device)
    linear.weight.requires_grad_(False)
    x = normal(300, 200, device=device)
    with OpCounter() as counter:
        train_step(linear, x)
    assert counter.calls["fp8_gemm_nt"] == 1
    assert counter.of(*QUANTIZE_ACTIVATION) == 1
    alone = gradient(linear.bias).clone()
    linear.zero_grad()
    linear.weight.requires_grad_(True)
    train_step(linear, x)
    assert torch.equal(gradient(linear.bias), alone)  # summed in the same order


def test_no_grad_saves_nothing(device):
    linear = normal_linear(device).eval()
    with torch.no_grad(), saved_tensors() as saved, OpCounter() as counter:
        y = linear(normal(24, 200, device=device))
    assert not saved and not y.requires_grad
    assert dict(counter.calls) == {"quantize_1x128": 1, "quantize_128x128": 1, "fp8_gemm_nt": 1}


def test_second_gradient_is_refused(device):
    linear = normal_linear(device)
    x = normal(4, 200, device=device, grad=True)
    (dx,) = torch.autograd.grad(linear(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backward must be .* create_graph=True\)"):
        dx.square().sum().backward()
    (once,) = torch.autograd.grad(linear(x).sum(), x)
    assert torch.equal(dx, once)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # raised by make_dual
@pytest.mark.parametrize("grad_mode", [True, False])
def test_forward_derivatives_are_refused(device, grad_mode):
    linear = normal_linear(device).requires_grad_(False)
    x = normal(4, 200, device=device)
    with (
        torch.set_grad_enabled(grad_mode),
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="jvp"),
    ):
        linear(forward_ad.make_dual(x, x))


# ---- as torch.nn.Linear ----


def test_it_is_a_torch_linear(device):
    torch.manual_seed(3)
    linear = Linear(200, 136, device=device)
    torch.manual_seed(3)
    plain = torch.nn.Linear(200, 136, device=device)
    assert isinstance(linear, torch.nn.Linear)
    assert torch.equal(linear.weight, plain.weight) and torch.equal(linear.bias, plain.bias)
    assert repr(linear) == repr(plain)[:-1] + ", fp8=blockwise)"
    assert [name for name, _ in linear.named_parameters()] == ["weight", "bias"]


def test_state_dict_goes_both_ways(device):
    linear = normal_linear(device)
    plain = torch.nn.Linear(200, 136, device=device)
    plain.load_state_dict(linear.state_dict())
    back = Linear(200, 136, device=device)
    back.load_state_dict(plain.state_dict())
    assert torch.equal(back.weight, linear.weight) and torch.equal(back.bias, linear.bias)


def test_factory_arguments():
    linear = Linear(8, 16, False, "meta", torch.bfloat16, recipe=Recipe.rowwise())
    assert linear.bias is None and linear.recipe == Recipe.rowwise()
    assert linear.weight.is_meta and linear.weight.dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"recipe must be a torchext\.Recipe \(got 'rowwise'"):
        Linear(8, 16, recipe="rowwise")


@main_recipes
def test_meta_device(device, recipe):
    with torch.device("meta"):
        linear = Linear(200, 136, recipe=recipe)
        x = torch.empty(2, 3, 200, requires_grad=True)
    y = linear(x)
    assert y.is_meta and y.shape == (2, 3, 136)
    y.sum().backward()
    assert gradient(x).shape == x.shape and gradient(linear.weight).shape == (136, 200)
    linear.to_empty(device=device)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.ones_(linear.bias)
    assert torch.equal(linear(torch.ones(200, device=device)), torch.ones(136, device=device))


def test_from_linear_shares_parameters_and_hooks(device):
    plain = torch.nn.Linear(200, 136, device=device).eval()
    plain.weight.requires_grad_(False)
    calls = []
    plain.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    linear = Linear.from_linear(plain, Recipe.rowwise())
    assert type(plain) is torch.nn.Linear and type(linear) is Linear
    assert linear.weight is plain.weight and linear.bias is plain.bias
    assert not linear.training and linear.recipe == Recipe.rowwise()
    linear(normal(3, 200, device=device))
    assert calls == [Linear]
    linear.weight = torch.nn.Parameter(torch.zeros_like(plain.weight))
    linear.register_forward_hook(lambda module, args, output: None)
    assert linear.weight is not plain.weight and len(plain._forward_hooks) == 1
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear \(got .*Bilinear"):
        Linear.from_linear(torch.nn.Bilinear(2, 2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(device, dtype, input_dtype):
    linear = normal_linear(device)
    plain = torch.nn.Linear(200, 136, device=device)
    x = normal(8, 200, device=device, dtype=input_dtype, grad=True)
    with torch.autocast(device.type, dtype):
        y = linear(x)
        assert y.dtype == plain(x).dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == input_dtype
    assert gradient(linear.weight).dtype == gradient(linear.bias).dtype == torch.float32
    assert linear(x).dtype == input_dtype
    if input_dtype == torch.float32:
        # x is quantized from FP32 directly, and y is rounded once.
        assert torch.equal(linear(x).to(dtype), y)
    with torch.autocast(device.type, dtype, enabled=False):
        assert linear(x).dtype == input_dtype


@main_recipes
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(device, recipe, use_reentrant):
    linear, plain = normal_linear(device, recipe=recipe), normal_linear(device, recipe=recipe)
    x = normal(8, 200, device=device, grad=True)
    with fixed_weights(linear), OpCounter() as counter:
        y = checkpoint(linear, x, use_reentrant=use_reentrant)
        y.square().mean().backward()
    dx, x.grad = gradient(x), None
    assert torch.equal(y, train_step(plain, x))
    assert torch.equal(dx, gradient(x))
    assert torch.equal(gradient(linear.weight), gradient(plain.weight))
    assert torch.equal(gradient(linear.bias), gradient(plain.bias))
    if recipe.granularity == "blockwise":
        assert counter.of(*QUANTIZE_WEIGHT) == 1


def test_hooks(device):
    linear = normal_linear(device)
    seen: list[Any] = []
    linear.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    linear.register_full_backward_hook(lambda module, dx, dy: seen.append((dx, dy)))
    linear.weight.register_hook(lambda grad: grad * 0)
    x = normal(8, 200, device=device, grad=True)
    y = linear(x)
    assert torch.equal(y, normal_linear(device)(x * 2))
    y.sum().backward()
    ((dx, dy),) = seen
    assert torch.equal(dx[0] * 2, gradient(x)) and dy[0].shape == y.shape
    assert not gradient(linear.weight).any()


def test_tied_weights(device):
    embedding = torch.nn.Embedding(160, 200, device=device)
    linear = Linear(200, 160, bias=False, device=device)
    linear.weight = embedding.weight
    other = Linear(200, 160, bias=False, device=device, recipe=Recipe.rowwise())
    other.weight = embedding.weight
    tokens = torch.arange(8, device=device)
    x = embedding(tokens)
    (linear(x) + other(x)).sum().backward()
    torch.optim.SGD(embedding.parameters(), lr=1.0).step()
    assert_quantized_afresh(linear, x.detach())


@pytest.mark.parametrize(
    "parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm]
)
def test_parametrized_weight_is_quantized_each_time(device, parametrize):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    linear(x)  # fills the cache, which must not be used below
    parametrize(linear)
    with OpCounter() as counter:
        train_step(linear, x)
        train_step(linear, x)
    assert counter.of(*QUANTIZE_WEIGHT) == 2
    original = [p for name, p in linear.named_parameters() if "original" in name]
    assert original and all(p.grad is not None for p in original)
    linear.eval()
    weight = linear.weight
    assert sqnr(torch.nn.functional.linear(x, weight, linear.bias), linear(x)) >= 25


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_weight_replaced_by_a_hook(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    expected = linear(x)
    torch.nn.utils.weight_norm(linear)  # replaces the parameter by an attribute
    assert "weight" not in linear._parameters
    assert sqnr(expected, linear(x)) >= 25
    linear(x).sum().backward()
    assert linear.weight_v.grad is not None


def test_functional_call(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    linear(x)
    swapped = {name: (p.detach() * 2).requires_grad_() for name, p in linear.named_parameters()}
    y = torch.func.functional_call(linear, swapped, (x,))
    assert torch.equal(y, linear(x) * 2)
    y.sum().backward()
    assert swapped["weight"].grad is not None and linear.weight.grad is None
    assert_quantized_afresh(linear, x, times=1 if device.type == "cuda" else 0)
