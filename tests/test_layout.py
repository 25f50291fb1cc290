"""torchext.ops.restore_layout gives a copied quantized pair the layout that GEMMs require."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor

from torchext import ops


def _by_size(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.size(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _packed(tensor: Tensor) -> Tensor:
    """Copies into a larger buffer, at an unaligned offset."""
    buffer = torch.empty(tensor.numel() + 3, dtype=tensor.dtype, device=tensor.device)
    return buffer[3:].view(tensor.shape).copy_(tensor)


def _saved(tensor: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


def _safetensors(tensor: Tensor) -> Tensor:
    safetensors = pytest.importorskip("safetensors.torch")
    data = safetensors.save({"odd": torch.zeros(3, dtype=torch.uint8), "x": tensor.contiguous()})
    return safetensors.load(data)["x"].to(tensor.device)


COPIES = {
    "clone": torch.clone,
    "contiguous": Tensor.contiguous,
    "by size": _by_size,
    "packed": _packed,
    "deepcopy": copy.deepcopy,
    "torch.save": _saved,
    "safetensors": _safetensors,
    "bytes": lambda t: _by_size(t).view(torch.uint8).clone().view(t.dtype),
    "float": lambda t: t.float().contiguous().to(t.dtype),
    "transposed": lambda t: t.mT.contiguous().mT,
    "strided": lambda t: t.repeat_interleave(3, -1)[..., ::3],
}
every_copy = pytest.mark.parametrize("restore", COPIES.values(), ids=COPIES)

SIZES = [(9, 200, 72), (256, 256, 256), (300, 129, 5), (1, 300, 1), (130, 1, 8), (3, 16, 0)]


def _random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device)


def pairs(m: int, n: int, k: int, device: torch.device) -> list[tuple[tuple[Tensor, Tensor], ...]]:
    """Operands a [m, k] and b [n, k] of each granularity, including transposes."""
    x, w = _random(m, k, device=device), _random(n, k, device=device)
    rows, blocks = ops.quantize_1x128(x), ops.quantize_128x128(w)
    x_t, w_t = x.t().contiguous(), w.t().contiguous()
    transposed, transposed_w = ops.quantize_1x128_t(x_t), ops.quantize_1x128_t(w_t)
    _, scale, data_t = ops.quantize_128x128_dual(w_t)
    return [
        (rows, blocks),
        (transposed, transposed_w),
        (rows, (data_t, scale.t())),
        (ops.quantize_rowwise(x), ops.quantize_rowwise(w)),
        (ops.quantize_tensorwise(x), ops.quantize_tensorwise(w, dtype=torch.float8_e5m2)),
    ]


@every_copy
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_of_restored_copies_are_the_originals(device, restore, size):
    for a, b in pairs(*size, device):
        expected = ops.fp8_gemm_nt(*a, *b)
        copies = [ops.restore_layout(*map(restore, pair)) for pair in (a, b)]
        assert torch.equal(ops.fp8_gemm_nt(*copies[0], *copies[1]), expected)
        for pair, restored in zip((a, b), copies, strict=True):
            for original, tensor in zip(pair, restored, strict=True):
                assert tensor.dtype == original.dtype and tensor.shape == original.shape
                assert torch.equal(tensor.float(), original.float())


@every_copy
def test_leading_dimensions(device, restore):
    x, w = _random(3, 5, 200, device=device), _random(72, 200, device=device)
    b = ops.quantize_128x128(w)
    for quantize in (ops.quantize_1x128, ops.quantize_rowwise):
        a = quantize(x)
        b = ops.quantize_128x128(w) if quantize is ops.quantize_1x128 else quantize(w)
        restored = ops.restore_layout(*map(restore, a))
        assert torch.equal(ops.fp8_gemm_nt(*restored, *b), ops.fp8_gemm_nt(*a, *b))
    one_row = ops.quantize_1x128(x[0, 0])
    b = ops.quantize_128x128(w)
    restored = (
        ops.restore_layout(*map(restore, one_row))
        if restore is not COPIES["transposed"]
        else one_row
    )
    assert torch.equal(ops.fp8_gemm_nt(*restored, *b), ops.fp8_gemm_nt(*one_row, *b))


@every_copy
def test_stacks_for_grouped_products(device, restore):
    x, w = _random(9, 200, device=device), _random(2, 72, 200, device=device)
    a = ops.quantize_1x128(x)
    offsets = torch.tensor([4, 9], dtype=torch.int32, device=device)
    for b in (ops.quantize_128x128(w), ops.quantize_1x128(w)):
        restored = ops.restore_layout(*map(restore, b))
        got = ops.m_grouped_fp8_gemm_nt_contiguous(*a, *restored, offsets)
        assert torch.equal(got, ops.m_grouped_fp8_gemm_nt_contiguous(*a, *b, offsets))


def test_expanded_scales(device):
    a, b = (
        ops.quantize_1x128(_random(9, 200, device=device)),
        ops.quantize_128x128(_random(72, 200, device=device)),
    )
    halves = torch.full((1, 1), 0.5, device=device).expand(9, 2)  # strides (0, 0)
    got = ops.fp8_gemm_nt(*ops.restore_layout(a[0], halves), *b)
    a[1].fill_(0.5)
    assert torch.equal(got, ops.fp8_gemm_nt(*a, *b))


def test_what_has_its_layout_is_not_copied(device):
    for size in SIZES:
        for pair in (pair for operands in pairs(*size, device) for pair in operands):
            restored = ops.restore_layout(*pair)
            assert restored[0] is pair[0] and restored[1] is pair[1]


def test_gradient_of_the_scale_passes(device):
    data, scale = ops.quantize_1x128(_random(9, 300, device=device))
    scale = _by_size(scale).requires_grad_()
    data, restored = ops.restore_layout(data, scale)
    assert restored.stride() == (1, 12)
    ops.dequantize(data, restored, out_dtype=torch.float32).sum().backward()
    assert scale.grad is not None and scale.grad.any()


def test_compiled(device):
    def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
        a, a_scale = ops.restore_layout(a, a_scale)
        return ops.fp8_gemm_nt(a, a_scale, *ops.restore_layout(b, b_scale))

    torch._dynamo.reset()
    for a, b in pairs(9, 200, 72, device):
        operands = [_by_size(tensor) for tensor in (*a, *b)]
        compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*operands), ops.fp8_gemm_nt(*a, *b))


def test_tensors_without_addresses(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = _random(9, 200, device=device)
    with FakeTensorMode() as mode:
        data, scale = ops.quantize_1x128(mode.from_tensor(x))
        data, scale = ops.restore_layout(data.clone(), scale.contiguous())
    assert data.stride() == (208, 1) and scale.stride() == (1, 12)
    stacked = torch.stack([ops.quantize_1x128(x)[0]] * 2)
    scales = torch.stack([ops.quantize_1x128(x)[1]] * 2)
    got = torch.vmap(lambda *pair: ops.dequantize(*ops.restore_layout(*pair), out_dtype=x.dtype))(
        stacked, scales
    )
    assert torch.equal(got[1], ops.dequantize(*ops.quantize_1x128(x), out_dtype=x.dtype))


def test_products_name_the_remedy(device, gpu):
    a, b = (
        ops.quantize_1x128(_random(9, 200, device=device)),
        ops.quantize_128x128(_random(72, 200, device=device)),
    )
    with pytest.raises(ValueError, match=r"a must have .* torchext\.ops\.restore_layout\(data, sc"):
        ops.fp8_gemm_nt(a[0].clone(), a[1], *b)  # the CPU reads rows of any pitch
    with pytest.raises(ValueError, match=r"a_scale with .* torchext\.ops\.restore_layout\(data, s"):
        ops.fp8_gemm_nt(a[0], a[1].contiguous(), *b)


def test_what_is_no_quantized_pair_is_refused(device):
    data, scale = ops.quantize_1x128(_random(9, 200, device=device))
    with pytest.raises(
        TypeError, match=r"restore_layout: data must be .*uint8\); view bytes of FP8 data"
    ):
        ops.restore_layout(data.view(torch.uint8), scale)
    with pytest.raises(
        TypeError, match=r"restore_layout: scale must be torch\.float32 \(got .*half|float16"
    ):
        ops.restore_layout(data, scale.half())
    with pytest.raises(ValueError, match=r"restore_layout: scale must have .*\(got \[2, 9\]\)"):
        ops.restore_layout(data, scale.t())
    with pytest.raises(ValueError, match=r"restore_layout: scale must be on the device of data"):
        ops.restore_layout(data, scale.to("meta"))
