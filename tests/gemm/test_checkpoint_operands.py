"""Products take weights as checkpoints hold them: rows of any pitch at any address (on the CPU),
and scales in BF16, UE8M0, or of shape [1] and []. The bits are those of the operands that
quantizers make."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from support.op_testing import random
from torchext import ops

M, N, K = 20, 40, 300
UE8M0 = torch.float8_e8m0fnu
CPU = torch.device("cpu")


def rounded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """FP32 scales, laid out as before, that are exact in `dtype`."""
    if dtype is torch.bfloat16:
        return scale.copy_(scale.bfloat16())
    return scale.copy_(torch.exp2(scale.log2().ceil()))


def dense(granularity: str, device: torch.device) -> tuple[Tensor, ...]:
    weights = {"1d2d": ops.quantize_128x128, "1d1d": ops.quantize_1x128}
    return (
        *ops.quantize_1x128(random(M, K, device=device)),
        *weights[granularity](random(N, K, device=device)),
    )


def experts(device: torch.device) -> tuple[Tensor, ...]:
    a, a_scale = ops.quantize_1x128(random(M, K, device=device))
    return a, a_scale, *ops.quantize_128x128(random(3, N, K, device=device))


def ends(*values: int, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def masked(device: torch.device) -> tuple[Tensor, ...]:
    a, a_scale = ops.quantize_1x128(random(3, M, K, device=device))
    return a, a_scale, *ops.quantize_128x128(random(3, N, K, device=device))


# Each: its operands, where their scales are, and the call.
PRODUCTS: dict[str, tuple[Callable[..., Any], tuple[int, ...], Callable[..., Any]]] = {
    "fp8_gemm_nt, 1D2D": (lambda d: dense("1d2d", d), (1, 3), ops.fp8_gemm_nt),
    "fp8_gemm_nt, 1D1D": (lambda d: dense("1d1d", d), (1, 3), ops.fp8_gemm_nt),
    "fp8_linear": (
        lambda d: (random(M, K, device=d), *dense("1d2d", d)[2:]), (2,), ops.fp8_linear
    ),
    "swiglu": (lambda d: dense("1d2d", d), (1, 3), ops.fp8_gemm_nt_swiglu_quantize),
    "gelu": (lambda d: dense("1d2d", d), (1, 3), ops.fp8_gemm_nt_gelu_quantize),
    "relu2": (lambda d: dense("1d2d", d), (1, 3), ops.fp8_gemm_nt_relu2_quantize),
    "contiguous groups": (
        lambda d: (*experts(d), ends(5, 5, M, device=d)),
        (1, 3),
        ops.m_grouped_fp8_gemm_nt_contiguous,
    ),
    "masked groups": (
        lambda d: (*masked(d), ends(M, M, M, device=d)), (1, 3), ops.m_grouped_fp8_gemm_nt_masked
    ),
    "groups of K": (
        lambda d: (*dense("1d1d", d), ends(128, K, device=d)), (1, 3), ops.k_grouped_fp8_gemm_nt
    ),
    "dequantize": (
        lambda d: dense("1d2d", d)[2:],
        (1,),
        lambda data, scale: ops.dequantize(data, scale, out_dtype=torch.float32),
    ),
}  # fmt: skip


def values(results: Any) -> list[Tensor]:
    results = results if isinstance(results, tuple) else (results,)
    return [result.float() for result in results]


@pytest.mark.parametrize("dtype", [torch.bfloat16, UE8M0], ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_scales_in_other_dtypes(product: str, dtype: torch.dtype, device: torch.device) -> None:
    make, scales, call = PRODUCTS[product]
    operands = list(make(device))
    for index in scales:
        operands[index] = rounded(operands[index], dtype)
    expected = values(call(*operands))
    for index in scales:
        operands[index] = operands[index].to(dtype)
    for got, wanted in zip(values(call(*operands)), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("product", PRODUCTS)
def test_scales_in_other_dtypes_in_a_graph(product: str) -> None:
    make, scales, call = PRODUCTS[product]
    operands = list(make(CPU))
    for index in scales:
        operands[index] = rounded(operands[index], UE8M0).to(UE8M0)
    expected = values(call(*operands))
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(values(compiled(*operands)), expected, strict=True):
        assert torch.equal(got, wanted)


def test_other_dtypes_are_refused_with_the_remedy(device: torch.device) -> None:
    a, a_scale, b, b_scale = dense("1d2d", device)
    with pytest.raises(TypeError, match=r"b_scale must be torch.float32 .*float16\); convert it"):
        ops.fp8_gemm_nt(a, a_scale, b, b_scale.half())


def test_scales_of_one_element(device: torch.device) -> None:
    a, a_scale = ops.quantize_rowwise(random(M, K, device=device))
    b, b_scale = ops.quantize_tensorwise(random(N, K, device=device))
    x = random(M, K, device=device)
    gradient = x.clone().requires_grad_()
    expected = ops.fp8_linear(gradient, b, b_scale)
    (dx,) = torch.autograd.grad(expected.sum(), gradient)
    for shape in ((), (1,)):
        scale = b_scale.view(shape)
        assert torch.equal(
            ops.fp8_gemm_nt(a, a_scale, b, scale), ops.fp8_gemm_nt(a, a_scale, b, b_scale)
        )
        assert torch.equal(
            ops.dequantize(b, scale, out_dtype=torch.float32),
            ops.dequantize(b, b_scale, out_dtype=torch.float32),
        )
        for dtype in (torch.float32, torch.bfloat16):
            exact = scale.to(dtype).float().view(1, 1)
            assert torch.equal(ops.fp8_linear(x, b, scale.to(dtype)), ops.fp8_linear(x, b, exact))
        y = ops.fp8_linear(gradient, b, scale)
        assert torch.equal(torch.autograd.grad(y.sum(), gradient)[0], dx)


def before_unreadable_memory(tensor: Tensor) -> Tensor:
    """A dense copy of FP8 data whose last byte is the last of a page; reading on would crash."""
    c = ctypes.CDLL(None, use_errno=True)
    c.mmap.restype = ctypes.c_void_p
    page, size = mmap.PAGESIZE, tensor.numel()
    pages = -(-size // page)
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = c.mmap(
        None,
        ctypes.c_size_t((pages + 1) * page),
        mmap.PROT_READ | mmap.PROT_WRITE,
        anonymous,
        -1,
        ctypes.c_long(0),
    )
    assert c.mprotect(ctypes.c_void_p(start + pages * page), ctypes.c_size_t(page), 0) == 0
    memory = (ctypes.c_uint8 * size).from_address(start + pages * page - size)
    copy = torch.frombuffer(memory, dtype=torch.uint8).view(tensor.shape)
    copy.copy_(tensor.contiguous().view(torch.uint8))
    return copy.view(tensor.dtype)


@pytest.mark.parametrize("k", [7, 129, 300, 520])
def test_the_cpu_reads_dense_rows_at_any_address(k: int) -> None:
    for m, n in ((1, 40), (5, 136), (17, 64), (70, 33)):
        x = random(m, k, device=CPU)
        a, a_scale = ops.quantize_1x128(x)
        b, b_scale = ops.quantize_128x128(random(n, k, device=CPU))
        dense_a, dense_b = before_unreadable_memory(a), before_unreadable_memory(b)
        assert dense_b.stride() == (k, 1)
        assert torch.equal(
            ops.fp8_gemm_nt(dense_a, a_scale, dense_b, b_scale),
            ops.fp8_gemm_nt(a, a_scale, b, b_scale),
        )
        for dtype in (torch.bfloat16, torch.float32):
            wide = x.to(dtype)
            assert torch.equal(
                ops.fp8_linear(wide, dense_b, b_scale), ops.fp8_linear(wide, b, b_scale)
            )
        assert torch.equal(
            ops.dequantize(dense_b, b_scale, out_dtype=torch.float32),
            ops.dequantize(b, b_scale, out_dtype=torch.float32),
        )


def test_the_cpu_reads_dense_experts_at_8_bytes() -> None:
    a, a_scale, b, b_scale = experts(CPU)
    offsets = ends(5, 5, M, device=a.device)
    room = torch.empty(b.numel() + 8, dtype=torch.uint8)
    shifted = room[8 if room.data_ptr() % 16 == 0 else 0 :][: b.numel()].view(b.dtype).view(b.shape)
    shifted.copy_(b)
    assert shifted.data_ptr() % 16 == 8
    assert shifted.stride() == (N * K, K, 1)
    assert torch.equal(
        ops.m_grouped_fp8_gemm_nt_contiguous(a, a_scale, shifted, b_scale, offsets),
        ops.m_grouped_fp8_gemm_nt_contiguous(a, a_scale, b, b_scale, offsets),
    )
