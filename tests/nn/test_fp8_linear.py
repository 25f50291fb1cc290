"""torchext.nn.FP8Linear: numbers, gradients, bits in state_dict, and that nothing casts or copies
its FP8 weight."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save

from support.linear_testing import OpCounter, normal, sqnr
from torchext import memory_report, ops
from torchext.nn import FP8Linear
from torchext.nn.linear import Linear

E4M3 = torch.float8_e4m3fn
both_modes = pytest.mark.parametrize("mode", ["w8a8", "w8a16"])


def layer(
    device: torch.device, mode: Any = "w8a8", n: int = 136, k: int = 208, **options: Any
) -> tuple[torch.nn.Linear, FP8Linear]:
    """A BF16 layer whose weight FP8 represents, and the FP8 layer of it."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(k, n, device=device, dtype=torch.bfloat16)
    quantized = FP8Linear.from_linear(linear, mode, **options)
    wide = ops.dequantize(quantized.weight, quantized.weight_scale_inv, out_dtype=torch.float32)
    linear.weight.data = wide.bfloat16()
    return linear, quantized


def input_of(device: torch.device, k: int = 208) -> Tensor:
    return normal(3, 5, k, device=device, dtype=torch.bfloat16, grad=True)


@both_modes
@pytest.mark.parametrize("k", [208, 200])
def test_output_and_gradients(device, mode, k):
    linear, quantized = layer(device, mode, k=k)
    x = input_of(device, k)
    y, expected = quantized(x), linear(x)
    dy = torch.randn_like(y)
    assert y.shape == (3, 5, 136)
    assert y.dtype == x.dtype
    assert sqnr(expected, y) > {"w8a8": 30, "w8a16": 45}[mode]
    dx, db = torch.autograd.grad(y, (x, quantized.bias), dy)
    wanted_dx, wanted_db = torch.autograd.grad(expected, (x, linear.bias), dy)
    assert sqnr(wanted_dx, dx) > {"w8a8": 30, "w8a16": 45}[mode]
    assert torch.allclose(db, wanted_db, rtol=1e-2, atol=1e-2)
    with torch.inference_mode():
        assert torch.equal(quantized(x), y)


def test_w8a8_multiplies_the_bits_that_training_multiplies(device):
    linear = torch.nn.Linear(208, 136, device=device)
    x = normal(7, 208, device=device)
    with torch.no_grad():
        expected = Linear.from_linear(linear)(x)
        assert torch.equal(FP8Linear.from_linear(linear)(x), expected)


@both_modes
def test_one_byte_for_each_element_and_backward_keeps_no_more(device, mode):
    _, quantized = layer(device, mode, n=256, k=512)
    assert quantized.weight.untyped_storage().nbytes() == 256 * 512
    x = normal(4, 512, device=device, dtype=torch.bfloat16, grad=True)
    with memory_report(quantized) as report:
        y = quantized(x)
        assert report.modules == ()
    assert report.saved == 0  # the weight itself, which counts as a parameter
    assert report.parameters == 256 * 512 + 4 * 2 * 4 + 256 * 2
    assert report.fp8_weights == 0  # none beside the parameters
    y.sum().backward()


def test_state_dict_has_the_bits_of_a_checkpoint(device):
    linear = torch.nn.Linear(300, 200, device=device)
    quantized = FP8Linear.from_linear(linear)
    data, scale = ops.quantize_128x128(linear.weight.detach())
    state = quantized.state_dict()
    assert list(state) == ["weight", "bias", "weight_scale_inv"]
    assert torch.equal(state["weight"].view(torch.uint8), data.contiguous().view(torch.uint8))
    assert state["weight"].is_contiguous()
    assert torch.equal(state["weight_scale_inv"], scale)
    other = FP8Linear(300, 200, device=device)
    for assign in (False, True):
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(linear.weight), quantized(linear.weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_scales_in_other_dtypes_load_as_fp32(dtype):
    state = FP8Linear(256, 128, bias=False).state_dict()
    state["weight_scale_inv"] = torch.tensor([[0.5, 2.0]]).to(dtype)
    for assign in (False, True):
        loaded = FP8Linear(256, 128, bias=False)
        loaded.load_state_dict(state, assign=assign)
        assert loaded.weight_scale_inv.dtype == torch.float32
        assert loaded.weight_scale_inv.tolist() == [[0.5, 2.0]]


def test_tensors_of_a_checkpoint_are_used_in_place(device):
    x = input_of(device)
    data, _ = ops.quantize_128x128(normal(136, 208, device=device))
    for scale in (torch.tensor(0.25), torch.tensor([0.25]), torch.full((136, 1), 0.25)):
        whole = FP8Linear.from_tensors(data, scale.to(device).bfloat16())
        assert whole.weight.data_ptr() == data.data_ptr()
        expected = x @ (data.float() * 0.25).bfloat16().t()
        assert sqnr(expected, whole(x)) > 25
        (dx,) = torch.autograd.grad(whole(x).sum(), x)
        assert sqnr((data.float() * 0.25).sum(0).expand_as(x), dx) > 25
    with pytest.raises(ValueError, match=r"weight_scale_inv must be \[2, 2\] .*got \[3, 2\]"):
        FP8Linear.from_tensors(data, torch.ones(3, 2))
    with pytest.raises(TypeError, match=r"weight must be torch.float8_e4m3fn .*bfloat16"):
        FP8Linear.from_tensors(data.bfloat16(), torch.ones(2, 2))
    with pytest.raises(TypeError, match=r"weight_scale_inv must be .*got torch.float16"):
        FP8Linear.from_tensors(data, torch.ones(2, 2).half())


def test_loading_refuses_what_would_be_silently_wrong():
    quantized = FP8Linear(256, 128)
    state = quantized.state_dict()
    with pytest.raises(RuntimeError, match=r"weight must be torch.float8_e4m3fn \(got torch.float"):
        quantized.load_state_dict({**state, "weight": torch.zeros(128, 256)})
    del state["weight_scale_inv"]
    with pytest.raises(RuntimeError, match="weight_scale_inv must come with weight"):
        quantized.load_state_dict(state, strict=False)


def test_casts_leave_the_weight_and_its_scales_alone(device):
    _, quantized = layer(device)
    before = copy.deepcopy(quantized)
    for cast in (
        lambda m: m.half(), lambda m: m.to(torch.float64), lambda m: m.bfloat16(),
        lambda m: m.type(torch.float32), lambda m: m.to(device, torch.float32),
    ):  # fmt: skip
        cast(quantized)
        assert quantized.weight.dtype == E4M3
        assert torch.equal(quantized.weight.float(), before.weight.float())
        assert torch.equal(quantized.weight_scale_inv, before.weight_scale_inv)
    assert quantized.bias.dtype == torch.float32
    assert quantized.to("meta").weight.dtype == E4M3
    assert quantized.to_empty(device=device).weight.shape == (136, 208)


@both_modes
def test_copies_and_files(device, mode):
    _, quantized = layer(device, mode)
    x = input_of(device)
    saved = io.BytesIO()
    torch.save(quantized, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(quantized),
        pickle.loads(pickle.dumps(quantized)),
        torch.load(saved, weights_only=False),
    ]
    for other in copies:
        assert torch.equal(other(x), quantized(x))
        assert type(other.weight) is torch.nn.Parameter
        assert other.mode == mode


def test_distributed_checkpoint(tmp_path):
    _, quantized = layer(torch.device("cpu"))
    save(quantized.state_dict(), storage_writer=FileSystemWriter(tmp_path))
    other = FP8Linear(208, 136, dtype=torch.bfloat16)
    state = other.state_dict()
    load(state, storage_reader=FileSystemReader(tmp_path))
    other.load_state_dict(state)
    x = input_of(torch.device("cpu"))
    assert torch.equal(other(x), quantized(x))


@pytest.mark.slow
@both_modes
def test_compiles_to_one_graph(device, mode):
    torch._dynamo.reset()
    _, quantized = layer(device, mode)
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    x = input_of(device)
    y, expected = compiled(x), quantized(x)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, torch.autograd.grad(expected, x, dy)[0])
    with torch.inference_mode():
        assert torch.equal(compiled(x), expected)


@both_modes
def test_autocast(mode):
    _, quantized = layer(torch.device("cpu"), mode)
    x = input_of(torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantized(x.float()), quantized(x))


@pytest.mark.parametrize("pow2_scale", [False, True])
def test_merge(device, pow2_scale):
    linear, quantized = layer(device, pow2_scale=pow2_scale)
    weight, parameter = linear.weight.detach().float(), quantized.weight
    delta = 0.2 * weight.std() * torch.randn_like(weight)
    error = quantized.merge(delta)
    assert quantized.weight is parameter
    merged = ops.dequantize(parameter, quantized.weight_scale_inv, out_dtype=torch.float32)
    wanted = ops.quantize_128x128(weight + delta, pow2_scale=pow2_scale)
    assert sqnr(ops.dequantize(*wanted, out_dtype=torch.float32), merged) > 40
    assert error.of_weight == pytest.approx(
        float((merged - weight - delta).norm() / (weight + delta).norm()), rel=0.02
    )
    assert error.of_delta == pytest.approx(
        float((merged - weight - delta).norm() / delta.norm()), rel=0.02
    )
    assert quantized.merge(torch.zeros_like(delta)).of_delta == 0
    with pytest.raises(ValueError, match=r"delta must have shape \[136, 208\]"):
        quantized.merge(delta.t())


def test_merge_keeps_the_shape_of_scales(device):
    weight, delta = normal(136, 208, device=device), 0.1 * normal(136, 208, device=device)
    for quantize in (ops.quantize_rowwise, ops.quantize_tensorwise):
        layer = FP8Linear.from_tensors(*quantize(weight))
        shape = layer.weight_scale_inv.shape
        assert layer.merge(delta).of_weight < 0.05
        assert layer.weight_scale_inv.shape == shape
        state = layer.state_dict()
        got = ops.dequantize(state["weight"], state["weight_scale_inv"], out_dtype=torch.float32)
        assert sqnr(weight + delta, got) > 25


def test_dequantize_gives_a_linear_back(device):
    linear, quantized = layer(device)
    bias = quantized.bias
    back = quantized.dequantize_()
    assert back is quantized
    assert type(back) is torch.nn.Linear
    assert back.bias is bias
    assert list(back.state_dict()) == ["weight", "bias"]
    assert torch.equal(back.weight, linear.weight)
    assert back.weight.requires_grad


def test_reset_parameters():
    torch.manual_seed(3)
    quantized = FP8Linear(256, 128)
    torch.manual_seed(3)
    with OpCounter() as counter:
        meta = FP8Linear(256, 128, device="meta").to_empty(device="cpu")
        meta.reset_parameters()
    assert counter.of("quantize_128x128") > 0
    assert torch.equal(meta(torch.ones(1, 256)), quantized(torch.ones(1, 256)))


def test_errors():
    wrong: Any = "int8"
    quantized = FP8Linear(256, 128)
    x = torch.randn(2, 256)
    with pytest.raises(ValueError, match=r"mode must be 'w8a8' or 'w8a16'"):
        FP8Linear(256, 128, mode=wrong)
    with pytest.raises(TypeError, match=r"linear must be a torch.nn.Linear"):
        FP8Linear.from_linear(wrong)
    quantized.requires_grad_(True)
    with pytest.raises(RuntimeError, match="weight must not require a gradient"):
        quantized(x)
    quantized.requires_grad_(False)
    quantized.weight.data = quantized.weight.data.bfloat16()
    with pytest.raises(TypeError, match=r"weight must be torch.float8_e4m3fn .*param_dtype"):
        quantized(x)
