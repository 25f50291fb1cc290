"""torchext.nn.Linear: a torch.nn.Linear in every visible way, FP8 in every GEMM."""

from __future__ import annotations

import collections
import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from torchext import Recipe
from torchext.nn import Linear

RECIPES = {
    "deepseek_v3": Recipe.deepseek_v3(),
    "deepseek_v3_pow2": Recipe.deepseek_v3(pow2_scale=True),
    "rowwise": Recipe.rowwise(),
    "tensorwise": Recipe.tensorwise(),
    "tensorwise_e4m3": Recipe("tensorwise"),
    "mixed": Recipe("blockwise", input_dtype=torch.float8_e5m2, grad_dtype=torch.float8_e5m2),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
main_recipes = pytest.mark.parametrize(
    "recipe", [RECIPES[name] for name in ("deepseek_v3", "rowwise", "tensorwise")], ids=str
)

QUANTIZE_WEIGHT = ("quantize_128x128", "quantize_128x128_dual")
QUANTIZE_ACTIVATION = ("quantize_1x128", "quantize_1x128_t", "quantize_1x128_dual")


class OpCounter(TorchDispatchMode):
    """Counts calls of torch.ops.torchext.*, and of ATen's matrix products, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("torchext::") or name in ("aten::mm", "aten::addmm", "aten::bmm"):
            self.calls[name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))

    def of(self, *names: str) -> int:
        return sum(self.calls[name] for name in names)


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """What autograd keeps for backward while the context is open."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def sqnr(reference: Tensor, value: Tensor) -> float:
    """Signal to quantisation noise in dB."""
    reference, value = reference.double(), value.double()
    noise = (reference - value).square().sum()
    return (10 * torch.log10(reference.square().sum() / noise)).item()


def normal_linear(
    device: torch.device,
    in_features: int = 200,
    out_features: int = 136,
    recipe: Recipe | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
) -> Linear:
    torch.manual_seed(0)
    linear = Linear(in_features, out_features, bias, device, dtype, recipe=recipe)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_()
    return linear


def normal(
    *shape: int, device: torch.device, dtype: torch.dtype = torch.float32, grad: bool = False
):
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_(grad)


def train_step(linear: torch.nn.Module, x: Tensor) -> Tensor:
    y = linear(x)
    y.square().mean().backward()
    return y


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
    assert y.dtype == x.grad.dtype == linear.weight.grad.dtype == linear.bias.grad.dtype == dtype
    # Two bits of mantissa keep e5m2 itself to 25.6 dB and, multiplied by e4m3 (31.6 dB), to 24.6.
    coarse = torch.float8_e5m2
    least_y = 24.0 if recipe.input_dtype is coarse else 25.0
    least_dx = 24.0 if recipe.grad_dtype is coarse else 25.0
    least_dw = 22.0 if recipe.input_dtype is coarse else least_dx
    wide_x, wide_w, wide_dy = x.detach().double(), linear.weight.detach().double(), dy.double()
    assert sqnr(wide_x @ wide_w.t() + linear.bias.double(), y) >= least_y
    assert sqnr(wide_dy @ wide_w, x.grad) >= least_dx
    assert sqnr(wide_dy.t() @ wide_x, linear.weight.grad) >= least_dw
    assert sqnr(wide_dy.sum(0), linear.bias.grad) >= 40


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
        assert torch.equal(linear.bias.grad, torch.full_like(linear.bias, 300.0))
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
    assert torch.equal(linear.weight.grad, flat.weight.grad)
    assert torch.equal(linear.bias.grad, flat.bias.grad)


@main_recipes
@pytest.mark.parametrize("k, n", [(1, 1), (3, 130), (129, 1), (17, 255)])
def test_any_number_of_features(device, recipe, k, n):
    linear = normal_linear(device, k, n, recipe)
    x = normal(50, k, device=device, grad=True)
    y = train_step(linear, x)
    reference = x.double() @ linear.weight.double().t() + linear.bias.double()
    assert sqnr(reference, y) >= 24
    assert x.grad.isfinite().all() and linear.weight.grad.isfinite().all()


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
    x = storage.transpose(1, 2).requires_grad_()  # [3, 4, 200], features not contiguous
    linear(x).transpose(0, 2).sum().backward()  # gradient: one value, every stride 0
    other = normal_linear(device, recipe=recipe)
    other_x = x.detach().contiguous().requires_grad_()
    y = other(other_x)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, other_x.grad)
    assert torch.equal(linear.weight.grad, other.weight.grad)


@pytest.mark.parametrize("shape", [(), (5,), (3, 199), (200, 3)], ids=str)
def test_wrong_shape_is_refused_like_torch_does(device, shape):
    linear = normal_linear(device)
    x = torch.ones(shape, device=device)
    with pytest.raises(
        RuntimeError, match=r"torchext\.nn\.Linear: input: expected .*\[\.\.\., 200\]"
    ):
        linear(x)
    with pytest.raises(RuntimeError):
        torch.nn.Linear(200, 136, device=device)(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_wrong_dtype_is_refused(device, dtype):
    with pytest.raises(TypeError, match="input: expected torch.float32, .* got " + str(dtype)):
        normal_linear(device)(torch.zeros(3, 200, device=device).to(dtype))
    with pytest.raises(TypeError, match=r"weight: expected torch\.float32, .* got torch.float64"):
        normal_linear(device).double()(torch.zeros(3, 200, device=device))


def test_wrong_device_is_refused(device):
    with pytest.raises(RuntimeError, match=r"input: expected device .* got meta"):
        normal_linear(device)(torch.zeros(3, 200, device="meta"))


# ---- what is kept for backward, and what work is done ----


def test_input_is_saved_in_fp8_only(device):
    linear = normal_linear(device, 256, 384)
    x = normal(512, 256, device=device, grad=True)
    with saved_tensors() as saved:
        linear(x)
    by_dtype = {t.dtype: sum(s.nbytes for s in saved if s.dtype == t.dtype) for t in saved}
    # x_t and w_t in FP8; a scale for 128 values of x_t and for each block of w_t.
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
    assert all(t.numel() < x.numel() // 64 for t in saved if t.itemsize > 1)  # scales alone


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
    assert counter.calls["quantize_1x128_t"] == 1  # the gradient, for wgrad alone
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
    with OpCounter() as counter:
        train_step(linear, normal(24, 200, device=device))
    assert counter.calls["fp8_gemm_nt"] == 1
    assert counter.of(*QUANTIZE_ACTIVATION) == 1
    assert linear.bias.grad is not None


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
    with pytest.raises(RuntimeError, match=r"backward: expected .* \(create_graph=True\)"):
        dx.square().sum().backward()
    (once,) = torch.autograd.grad(linear(x).sum(), x)
    assert torch.equal(dx, once)


# ---- the cached FP8 weight ----


def assert_quantised_afresh(linear: Linear, x: Tensor, times: int = 1) -> None:
    """The next forward quantises the weight `times` times, and is that of a new layer."""
    with OpCounter() as counter:
        y = linear(x)
    assert counter.of(*QUANTIZE_WEIGHT) == times
    assert torch.equal(y, copy.deepcopy(linear)(x))


@main_recipes
def test_weight_is_quantised_once_for_all_micro_steps(device, recipe):
    linear = normal_linear(device, recipe=recipe)
    x = normal(8, 200, device=device, grad=True)
    train_step(linear, x)
    first = linear._cached_weight
    for _ in range(3):
        train_step(linear, x)
    with torch.no_grad():
        linear(x)
    assert linear._cached_weight is first
    linear.weight.grad.zero_()
    assert linear._cached_weight is first


def test_gradient_accumulation_adds_up(device):
    accumulated, single = normal_linear(device), normal_linear(device)
    x = normal(2, 8, 200, device=device)
    for half in x:
        accumulated(half).sum().backward()
    gradients = []
    for half in x:
        single.zero_grad()
        single(half).sum().backward()
        gradients.append(single.weight.grad.clone())
    assert torch.equal(accumulated.weight.grad, gradients[0] + gradients[1])


class WritesThroughData(torch.optim.Optimizer):
    """An optimiser in the old style: autograd's version counter does not see it."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.5)


def _halve(linear: Linear) -> None:
    with torch.no_grad():
        linear.weight.mul_(0.5)


def _swap_data(linear: Linear) -> None:
    linear.weight.data = linear.weight.data * 0.5


def _transpose_data(linear: Linear) -> None:
    linear.weight.data = linear.weight.data.t()


def _load(linear: Linear) -> None:
    linear.load_state_dict({name: t * 0.5 for name, t in linear.state_dict().items()})


def _load_assign(linear: Linear) -> None:
    state = {name: t * 0.5 for name, t in linear.state_dict().items()}
    linear.load_state_dict(state, assign=True)


def _replace(linear: Linear) -> None:
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 0.5)


def _sgd(linear: Linear) -> None:
    torch.optim.SGD(linear.parameters(), lr=0.5).step()


def _adamw(linear: Linear) -> None:
    torch.optim.AdamW(linear.parameters(), lr=0.5).step()


def _old_optimizer(linear: Linear) -> None:
    WritesThroughData(linear.parameters()).step()


def _manual(linear: Linear) -> None:
    linear.weight.data.mul_(0.5)
    linear.refresh_weight()


def _bfloat16(linear: Linear) -> None:
    linear.to(torch.bfloat16)


def _recipe(linear: Linear) -> None:
    linear.recipe = Recipe.deepseek_v3(pow2_scale=True)


CHANGES = [
    _halve,
    _swap_data,
    _transpose_data,
    _load,
    _load_assign,
    _replace,
    _sgd,
    _adamw,
    _old_optimizer,
    _manual,
    _bfloat16,
    _recipe,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_weight_is_quantised_anew_after(device, change: Callable[[Linear], None]):
    linear = normal_linear(device, 160, 160)
    x = normal(8, 160, device=device, grad=True)
    train_step(linear, x)
    assert_quantised_afresh(linear, x, times=0)
    change(linear)
    assert_quantised_afresh(linear, x)


def test_storage_freed_and_used_again_is_noticed(device):
    # `.data =` leaves the version counter alone, and an allocator may hand the old address out
    # again: only the storage's identity tells the two apart.
    linear = normal_linear(device, 160, 160)
    x = normal(8, 160, device=device)
    for scale in (0.5, 2.0, 4.0, 8.0):
        linear(x)
        values = linear.weight.detach() * scale
        linear.weight.data = torch.empty(0, device=device)
        linear.weight.data = values
        assert_quantised_afresh(linear, x)


def test_switch_of_mode_frees_the_cache(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    linear(x)
    linear.train()  # as it was: some trainers say so before every micro-step
    assert linear._cached_weight is not None
    linear.eval()
    assert linear._cached_weight is None
    linear(x)
    torch.nn.Sequential(linear).train()
    assert linear._cached_weight is None


def test_cached_weight_dies_with_the_layer(device):
    linear = normal_linear(device)
    linear(normal(8, 200, device=device))
    data = linear._cached_weight.quantized.data
    reference = torch.multiprocessing.reductions.StorageWeakRef(data.untyped_storage())
    del data, linear
    assert reference.expired()


def test_cache_is_not_copied_pickled_or_saved(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    y = linear(x)
    saved = io.BytesIO()
    torch.save(linear, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(linear),
        pickle.loads(pickle.dumps(linear)),
        torch.load(saved, weights_only=False),
    ]
    for clone in copies:
        assert type(clone) is Linear and clone.recipe == linear.recipe
        assert clone._cached_weight is None
        assert torch.equal(clone(x), y)
    assert set(linear.state_dict()) == {"weight", "bias"}
    assert not list(linear.buffers())
    assert linear._cached_weight is not None


def test_deepcopy_does_not_share_parameters(device):
    linear = normal_linear(device)
    clone = copy.deepcopy(linear)
    _halve(clone)
    assert not torch.equal(clone.weight, linear.weight)


def test_inference_mode_then_training(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    with torch.inference_mode():
        y = linear(x)
    assert linear._cached_weight is not None
    assert torch.equal(train_step(linear, x.requires_grad_()), y)


def test_weights_made_in_inference_mode_are_not_cached(device):
    with torch.inference_mode():
        linear = normal_linear(device)
        x = normal(8, 200, device=device)
        before = linear(x)
        linear.weight.mul_(0.5)
        linear.bias.mul_(0.5)
        assert linear._cached_weight is None
        assert torch.equal(linear(x), before * 0.5)


def test_captured_graph_sees_the_parameter(device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs: runs with --device cuda")
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    with torch.no_grad():
        linear(x)  # fills the cache
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(x)
        linear.weight.mul_(0.5)
        linear.bias.mul_(0.5)
        graph.replay()
        assert torch.equal(y, linear(x))


# ---- as torch.nn.Linear ----


def test_it_is_a_torch_linear(device):
    torch.manual_seed(3)
    linear = Linear(200, 136, device=device)
    torch.manual_seed(3)
    plain = torch.nn.Linear(200, 136, device=device)
    assert isinstance(linear, torch.nn.Linear)
    assert torch.equal(linear.weight, plain.weight) and torch.equal(linear.bias, plain.bias)
    assert repr(linear) == repr(plain)[:-1] + ", recipe=blockwise)"
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
    with pytest.raises(TypeError, match=r"recipe: expected a torchext\.Recipe; got 'rowwise'"):
        Linear(8, 16, recipe="rowwise")


@main_recipes
def test_meta_device(device, recipe):
    with torch.device("meta"):
        linear = Linear(200, 136, recipe=recipe)
        x = torch.empty(2, 3, 200, requires_grad=True)
    y = linear(x)
    assert y.is_meta and y.shape == (2, 3, 136)
    y.sum().backward()
    assert x.grad.shape == x.shape and linear.weight.grad.shape == (136, 200)
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
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Linear; got .*Bilinear"):
        Linear.from_linear(torch.nn.Bilinear(2, 2, 2))


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
    assert linear.weight.grad.dtype == linear.bias.grad.dtype == torch.float32
    assert linear(x).dtype == input_dtype
    if input_dtype == torch.float32:
        assert torch.equal(linear(x).to(dtype), y)  # quantised from FP32, rounded once
    with torch.autocast(device.type, dtype, enabled=False):
        assert linear(x).dtype == input_dtype


@main_recipes
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(device, recipe, use_reentrant):
    linear, plain = normal_linear(device, recipe=recipe), normal_linear(device, recipe=recipe)
    x = normal(8, 200, device=device, grad=True)
    with OpCounter() as counter:
        y = checkpoint(linear, x, use_reentrant=use_reentrant)
        y.square().mean().backward()
    dx, x.grad = x.grad, None
    assert torch.equal(y, train_step(plain, x))
    assert torch.equal(dx, x.grad)
    assert torch.equal(linear.weight.grad, plain.weight.grad)
    assert torch.equal(linear.bias.grad, plain.bias.grad)
    if recipe.granularity == "blockwise":
        assert counter.of(*QUANTIZE_WEIGHT) == 1


def test_hooks(device):
    linear = normal_linear(device)
    seen = []
    linear.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    linear.register_full_backward_hook(lambda module, dx, dy: seen.append((dx, dy)))
    linear.weight.register_hook(lambda grad: grad * 0)
    x = normal(8, 200, device=device, grad=True)
    y = linear(x)
    assert torch.equal(y, normal_linear(device)(x * 2))
    y.sum().backward()
    ((dx, dy),) = seen
    assert torch.equal(dx[0] * 2, x.grad) and dy[0].shape == y.shape
    assert not linear.weight.grad.any()


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
    assert_quantised_afresh(linear, x.detach())


@pytest.mark.parametrize(
    "parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm]
)
def test_parametrised_weight_is_quantised_each_time(device, parametrize):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    linear(x)  # a cache that must not be used below
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


def test_functional_call(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    linear(x)
    cached = linear._cached_weight
    swapped = {name: (p.detach() * 2).requires_grad_() for name, p in linear.named_parameters()}
    y = torch.func.functional_call(linear, swapped, (x,))
    assert torch.equal(y, linear(x) * 2)
    y.sum().backward()
    assert swapped["weight"].grad is not None and linear.weight.grad is None
    assert linear._cached_weight is cached


# ---- torch.compile ----


@main_recipes
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("shape", [(8, 200), (2, 5, 200)], ids=str)
def test_compile_gives_one_graph_each_way(device, recipe, backend, shape):
    graphs = collections.Counter()

    def counted(direction: str):
        def compiler(module, inputs):
            graphs[direction] += 1
            if backend == "aot_eager":
                return make_boxed_func(module.forward)
            return compile_fx_inner(module, inputs)

        return compiler

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    torch._dynamo.reset()
    eager, linear = normal_linear(device, recipe=recipe), normal_linear(device, recipe=recipe)
    x = normal(*shape, device=device, grad=True)
    compiled = torch.compile(
        linear,
        fullgraph=True,
        backend=aot_autograd(
            fw_compiler=counted("forward"),
            bw_compiler=counted("backward"),
            decompositions=select_decomp_table(),
        ),
    )
    with saved_tensors() as saved:
        y = compiled(x)
    y.square().mean().backward()
    dx, x.grad = x.grad, None
    assert torch.equal(y, train_step(eager, x))
    assert torch.equal(dx, x.grad)
    assert torch.equal(linear.weight.grad, eager.weight.grad)
    torch.testing.assert_close(linear.bias.grad, eager.bias.grad)  # the sum's order may differ
    assert all(t.itemsize == 1 for t in saved if t.numel() >= x.numel())

    _halve(linear)
    linear.weight.grad = None
    compiled(x).square().mean().backward()
    fresh = Linear.from_linear(torch.nn.Linear(200, 136, device=device), recipe)
    fresh.load_state_dict(linear.state_dict())
    train_step(fresh, x)
    assert torch.equal(linear.weight.grad, fresh.weight.grad)
    assert graphs == {"forward": 1, "backward": 1}
    assert linear._cached_weight is None


def test_compile_default_backend_with_autocast_and_optimiser(device):
    torch._dynamo.reset()
    linear, eager = normal_linear(device), normal_linear(device)
    compiled = torch.compile(linear, fullgraph=True)
    x = normal(8, 200, device=device, grad=True)
    optimisers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (linear, eager)]
    for _ in range(3):
        for layer, optimiser in zip((compiled, eager), optimisers, strict=True):
            optimiser.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                y = layer(x)
            assert y.dtype == torch.bfloat16
            y.float().square().mean().backward()
            optimiser.step()
    torch.testing.assert_close(linear.weight, eager.weight)
    torch.testing.assert_close(linear.bias, eager.bias)


def test_compile_frozen_weight(device):
    torch._dynamo.reset()
    linear = normal_linear(device).requires_grad_(False)
    x = normal(8, 200, device=device, grad=True)
    y = torch.compile(linear, fullgraph=True)(x)
    y.sum().backward()
    dx, x.grad = x.grad, None
    linear(x).sum().backward()
    assert torch.equal(dx, x.grad)


def test_compiled_optimiser_does_not_recompile(device):
    # The step counter of the weight cache must not become a guard of the optimiser's graph.
    torch._dynamo.reset()
    linear = normal_linear(device)
    optimiser = torch.optim.SGD(linear.parameters(), lr=0.1)
    x = normal(8, 200, device=device)
    counter = CompileCounter()
    step = torch.compile(optimiser.step, backend=counter)
    for _ in range(4):
        train_step(linear, x)
        step()
        assert_quantised_afresh(linear, x)
    assert counter.frame_count <= 1
