"""FP8 matrix products that apply an activation and quantize; part of `torchext.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch.batching import each_quantized_product
from .._dispatch.declaration import declare
from .._dispatch.errors import python_error
from .._dispatch.flops import product_flops
from .._dispatch.layout import empty_data, empty_group_scale


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
    """The gate-up product of an MLP, SwiGLU, and quantization, in one kernel.

    With gate, up = (dequantized a @ dequantized b.T (+ bias)).chunk(2, dim=-1), in FP32:
    `quantize_1x128(silu(gate) * up)`. The product itself is never rounded and never in memory.
    Error bounds: docs/numerics.md.

    Outputs require no gradient, like those of a quantizer.

    Args:
        a, a_scale, b_scale: as for `fp8_gemm_nt`, of any granularity.
        b: [2 * I, K], FP8: the I rows of the gate, then those of up (the order of vLLM's
            `gate_up_proj` and of Hugging Face's, where it is one weight).
        bias: [2 * I], bfloat16, float16 or float32, contiguous.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.
        num_sms: as for `fp8_gemm_nt`.

    Returns:
        data: [..., I], FP8, and
        scale: [..., ceil(I / 128)], float32: laid out as `quantize_1x128` returns them.

    Raises:
        ValueError: as `fp8_gemm_nt` does; a b of an odd number of rows.
        TypeError: an operand, scale, bias or dtype of another dtype.
        RuntimeError: a GPU that this build has no kernels for.
    """
    try:
        return _fp8_gemm_nt_swiglu_quantize(
            a, a_scale, b, b_scale, bias=bias, dtype=dtype, pow2_scale=pow2_scale, num_sms=num_sms
        )
    except RuntimeError as error:
        raise python_error(error) from None


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
    """A product, GELU, and quantization, in one kernel.

    With x = dequantized a @ dequantized b.T (+ bias), in FP32: `quantize_1x128(gelu(x))`. The
    product itself is never rounded and never in memory. Error bounds: docs/numerics.md.

    Outputs require no gradient, like those of a quantizer.

    Args:
        a, a_scale, b, b_scale: as for `fp8_gemm_nt`, of any granularity.
        tanh_approximation: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))), PyTorch's
            `approximate="tanh"`, instead of x / 2 * (1 + erf(x / sqrt(2))).
        bias: [N], bfloat16, float16 or float32, contiguous.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.
        num_sms: as for `fp8_gemm_nt`.

    Returns:
        data: [..., N], FP8, and
        scale: [..., ceil(N / 128)], float32: laid out as `quantize_1x128` returns them.

    Raises:
        ValueError: as `fp8_gemm_nt` does.
        TypeError: an operand, scale, bias or dtype of another dtype.
        RuntimeError: a GPU that this build has no kernels for.
    """
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
        raise python_error(error) from None


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
    """A product, squared ReLU, and quantization, in one kernel.

    With x = dequantized a @ dequantized b.T (+ bias), in FP32: `quantize_1x128(relu(x)**2)`. The
    product itself is never rounded and never in memory. Error bounds: docs/numerics.md.

    Outputs require no gradient, like those of a quantizer.

    Args:
        a, a_scale, b, b_scale: as for `fp8_gemm_nt`, of any granularity.
        bias: [N], bfloat16, float16 or float32, contiguous.
        dtype: torch.float8_e4m3fn (None) or torch.float8_e5m2.
        pow2_scale: round scales up to powers of two.
        num_sms: as for `fp8_gemm_nt`.

    Returns:
        data: [..., N], FP8, and
        scale: [..., ceil(N / 128)], float32: laid out as `quantize_1x128` returns them.

    Raises:
        ValueError: as `fp8_gemm_nt` does.
        TypeError: an operand, scale, bias or dtype of another dtype.
        RuntimeError: a GPU that this build has no kernels for.
    """
    try:
        return _fp8_gemm_nt_relu2_quantize(
            a, a_scale, b, b_scale, bias=bias, dtype=dtype, pow2_scale=pow2_scale, num_sms=num_sms
        )
    except RuntimeError as error:
        raise python_error(error) from None
