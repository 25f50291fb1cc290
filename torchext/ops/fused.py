"""FP8 GEMMs that apply an activation and quantize the result; part of `torchext.ops`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._dispatch.batching import each_quantized_product
from .._dispatch.declaration import declare
from .._dispatch.flops import product_flops
from .._dispatch.layout import empty_data, empty_group_scale
from .._dispatch.scales import call_with_float32_scales, float32_in_graph
from .._dispatch.sharding_rules import fused_product
from .._dispatch.sm_budget import gemm_sms


def _empty_quantized(a: Tensor, columns: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    leading = tuple(a.shape[:-1])
    data = empty_data(a, leading, columns, dtype or torch.float8_e4m3fn)
    return data, empty_group_scale(a, leading, columns)


def _fake_swiglu(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
    num_sms: int = 0,
) -> tuple[Tensor, Tensor]:
    return _empty_quantized(a, b.shape[0] // 2, dtype)


_fp8_gemm_nt_swiglu_quantize = declare(
    "fp8_gemm_nt_swiglu_quantize",
    fake=_fake_swiglu,
    sharding=fused_product("fp8_gemm_nt_swiglu_quantize", columns=False),
    flops=product_flops,
    batching=each_quantized_product,
).op


def fp8_gemm_nt_swiglu_quantize(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
    num_sms: int = 0,
) -> tuple[Tensor, Tensor]:
    """The gate-up GEMM of an MLP, SwiGLU and quantization in one kernel.

    Returns `quantize_1x128(silu(gate) * up)` with
    gate, up = (dequantized a @ dequantized b.T (+ bias)).chunk(2, dim=-1) in FP32. The GEMM's
    result is neither rounded nor written to memory. Error bounds: docs/numerics.md.

    Outputs require no gradient, like those of a quantizer.

    Args:
        a, a_scale, b_scale: as for `fp8_gemm_nt`, of any granularity.
        b: [2 * I, K], FP8: the I rows of the gate, then the I rows of up. This is the order of
            `gate_up_proj` in vLLM, and in Hugging Face models that hold both in one weight.
        bias: [2 * I], bfloat16, float16 or float32, contiguous.
        dtype: dtype of the returned data: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.
        num_sms: as for `fp8_gemm_nt`.

    Returns:
        data: [..., I], FP8, with the strides of `quantize_1x128`'s data.
        scale: [..., ceil(I / 128)], float32, M-major, with the strides of `quantize_1x128`'s scale.

    Raises:
        ValueError: as for `fp8_gemm_nt`; b has an odd number of rows.
        TypeError: an operand, scale or bias has another dtype; `dtype` is not an FP8 dtype.
        RuntimeError: this build has no kernels for the GPU.
    """
    if is_compiling():
        a_scale, b_scale = float32_in_graph((a, a_scale), (b, b_scale))
    num_sms = num_sms or gemm_sms(a)
    try:
        return _fp8_gemm_nt_swiglu_quantize(
            a, a_scale, b, b_scale, bias=bias, dtype=dtype, pow2_scale=pow2_scale, num_sms=num_sms
        )
    except RuntimeError as error:
        return call_with_float32_scales(
            error,
            fp8_gemm_nt_swiglu_quantize,
            *(a, a_scale, b, b_scale),
            pairs=((0, 1), (2, 3)),
            bias=bias,
            dtype=dtype,
            pow2_scale=pow2_scale,
            num_sms=num_sms,
        )


def _fake_gelu(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    tanh_approximation: bool = False,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
    num_sms: int = 0,
) -> tuple[Tensor, Tensor]:
    return _empty_quantized(a, b.shape[0], dtype)


_fp8_gemm_nt_gelu_quantize = declare(
    "fp8_gemm_nt_gelu_quantize",
    fake=_fake_gelu,
    sharding=fused_product("fp8_gemm_nt_gelu_quantize", columns=True),
    flops=product_flops,
    batching=each_quantized_product,
).op


def fp8_gemm_nt_gelu_quantize(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    tanh_approximation: bool = False,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
    num_sms: int = 0,
) -> tuple[Tensor, Tensor]:
    """A GEMM, GELU and quantization in one kernel.

    Returns `quantize_1x128(gelu(x))` with x = dequantized a @ dequantized b.T (+ bias) in FP32. x
    is neither rounded nor written to memory. Error bounds: docs/numerics.md.

    Outputs require no gradient, like those of a quantizer.

    Args:
        a, a_scale, b, b_scale: as for `fp8_gemm_nt`, of any granularity.
        tanh_approximation: if True, gelu(x) is PyTorch's `approximate="tanh"`,
            x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))), instead of
            x / 2 * (1 + erf(x / sqrt(2))).
        bias: [N], bfloat16, float16 or float32, contiguous.
        dtype: dtype of the returned data: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.
        num_sms: as for `fp8_gemm_nt`.

    Returns:
        data: [..., N], FP8, with the strides of `quantize_1x128`'s data.
        scale: [..., ceil(N / 128)], float32, M-major, with the strides of `quantize_1x128`'s scale.

    Raises:
        ValueError: as for `fp8_gemm_nt`.
        TypeError: an operand, scale or bias has another dtype; `dtype` is not an FP8 dtype.
        RuntimeError: this build has no kernels for the GPU.
    """
    if is_compiling():
        a_scale, b_scale = float32_in_graph((a, a_scale), (b, b_scale))
    num_sms = num_sms or gemm_sms(a)
    try:
        return _fp8_gemm_nt_gelu_quantize(
            a,
            a_scale,
            b,
            b_scale,
            tanh_approximation=tanh_approximation,
            bias=bias,
            dtype=dtype,
            pow2_scale=pow2_scale,
            num_sms=num_sms,
        )
    except RuntimeError as error:
        return call_with_float32_scales(
            error,
            fp8_gemm_nt_gelu_quantize,
            *(a, a_scale, b, b_scale),
            pairs=((0, 1), (2, 3)),
            tanh_approximation=tanh_approximation,
            bias=bias,
            dtype=dtype,
            pow2_scale=pow2_scale,
            num_sms=num_sms,
        )


def _fake_relu2(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
    num_sms: int = 0,
) -> tuple[Tensor, Tensor]:
    return _empty_quantized(a, b.shape[0], dtype)


_fp8_gemm_nt_relu2_quantize = declare(
    "fp8_gemm_nt_relu2_quantize",
    fake=_fake_relu2,
    sharding=fused_product("fp8_gemm_nt_relu2_quantize", columns=True),
    flops=product_flops,
    batching=each_quantized_product,
).op


def fp8_gemm_nt_relu2_quantize(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
    num_sms: int = 0,
) -> tuple[Tensor, Tensor]:
    """A GEMM, squared ReLU and quantization in one kernel.

    Returns `quantize_1x128(relu(x)**2)` with x = dequantized a @ dequantized b.T (+ bias) in FP32.
    x is neither rounded nor written to memory. Error bounds: docs/numerics.md.

    Outputs require no gradient, like those of a quantizer.

    Args:
        a, a_scale, b, b_scale: as for `fp8_gemm_nt`, of any granularity.
        bias: [N], bfloat16, float16 or float32, contiguous.
        dtype: dtype of the returned data: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.
        num_sms: as for `fp8_gemm_nt`.

    Returns:
        data: [..., N], FP8, with the strides of `quantize_1x128`'s data.
        scale: [..., ceil(N / 128)], float32, M-major, with the strides of `quantize_1x128`'s scale.

    Raises:
        ValueError: as for `fp8_gemm_nt`.
        TypeError: an operand, scale or bias has another dtype; `dtype` is not an FP8 dtype.
        RuntimeError: this build has no kernels for the GPU.
    """
    if is_compiling():
        a_scale, b_scale = float32_in_graph((a, a_scale), (b, b_scale))
    num_sms = num_sms or gemm_sms(a)
    try:
        return _fp8_gemm_nt_relu2_quantize(
            a, a_scale, b, b_scale, bias=bias, dtype=dtype, pow2_scale=pow2_scale, num_sms=num_sms
        )
    except RuntimeError as error:
        return call_with_float32_scales(
            error,
            fp8_gemm_nt_relu2_quantize,
            *(a, a_scale, b, b_scale),
            pairs=((0, 1), (2, 3)),
            bias=bias,
            dtype=dtype,
            pow2_scale=pow2_scale,
            num_sms=num_sms,
        )
