"""Sizes, and DeepGEMM's casts to FP8 in plain PyTorch.

The casts keep DeepGEMM's definition, on any device and under torch.compile:

    scale = max(amax, 1e-4) / 448       rounded up to a power of two if use_ue8m0
    data  = float8_e4m3fn(x * (1 / scale))

torchext.ops.quantize_1x128 and quantize_128x128 differ from it in three ways: they divide by the
scale, where a product with the rounded reciprocal can land on the neighboring FP8 value; groups
whose amax is below 1e-4 keep a scale of their own (and zeros have scale 1); and a group with NaN or
Inf is NaN as a whole. With use_ue8m0, and every amax finite and at least 1e-4, the two agree to the
bit (pow2_scale=True). Where speed matters, call torchext's: these read and write FP32
intermediates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...._dispatch.layout import round_up

LARGEST = 448.0  # of float8_e4m3fn
SMALLEST_AMAX = 1e-4


def ceil_div(x: int, y: int) -> int:
    """x / y, rounded up."""
    return (x + y - 1) // y


def align(x: int, y: int) -> int:
    """The smallest multiple of `y` that is at least `x`."""
    return round_up(x, y)


def ceil_to_ue8m0(x: Tensor) -> Tensor:
    """|x| rounded up to a power of two, 2^-126 to 2^127, as float32."""
    bits = x.abs().float().view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return (exponent.clamp(1, 254) << 23).view(torch.float32)


def pack_ue8m0_to_int(x: Tensor) -> Tensor:
    """Powers of two as their exponents, four to an int32, the first in the lowest byte.

    Args:
        x: [..., 4 * n], float32, positive powers of two.

    Returns:
        [..., n], int32.

    Raises:
        TypeError: x is not float32.
        ValueError: its last dimension is no multiple of 4, or a value is no power of two.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"pack_ue8m0_to_int: x must be torch.float32 (got {x.dtype})")
    if x.dim() == 0 or x.shape[-1] % 4 != 0:
        raise ValueError(
            "pack_ue8m0_to_int: x's last dimension must be a multiple of 4 (got shape "
            f"{list(x.shape)}); pad it with 1.0"
        )
    return exponents_in_ints("pack_ue8m0_to_int", "x", x)


def exponents_in_ints(op: str, name: str, scales: Tensor) -> Tensor:
    """Exponents of powers of two [..., n], four to an int32: [..., ceil(n / 4)], padded with 0."""
    bits = scales.contiguous().view(torch.int32)
    if ((bits < 0) | ((bits & 0x7FFFFF) != 0)).any():
        raise ValueError(
            f"{op}: {name} must hold positive powers of two (got others); cast with use_ue8m0=True"
            ", or round it with ceil_to_ue8m0 before the data are divided by it"
        )
    return _exponents(pad(bits, (0, -bits.shape[-1] % 4)))


def _exponents(bits: Tensor) -> Tensor:
    exponents = (bits >> 23).to(torch.uint8).reshape(-1)  # flat: of no column, strides mean nothing
    return exponents.view(torch.int32).view(*bits.shape[:-1], bits.shape[-1] // 4)


def unpack_ue8m0_from_int(packed_sf: Tensor) -> Tensor:
    """[..., n] int32 of four exponents each -> [..., 4 * n] float32, 2**(exponent - 127).

    The exponent 255 is NaN.
    """
    if packed_sf.dtype != torch.int32:
        raise TypeError(
            f"unpack_ue8m0_from_int: packed_sf must be torch.int32 (got {packed_sf.dtype})"
        )
    # A copy: strides of dimensions of size 1 may be anything, also in what is called contiguous.
    flat = packed_sf.clone(memory_format=torch.contiguous_format).view(-1)
    scales = flat.view(torch.uint8).view(torch.float8_e8m0fnu).float()
    return scales.view(*packed_sf.shape[:-1], 4 * packed_sf.shape[-1])


def _cast(groups: Tensor, dims: tuple[int, ...], use_ue8m0: bool) -> tuple[Tensor, Tensor]:
    """FP8 data of the shape of `groups`, and their scales with `dims` reduced to 1."""
    amax = groups.abs().float().amax(dim=dims, keepdim=True)
    scale = amax.clamp(min=SMALLEST_AMAX) / LARGEST
    if use_ue8m0:
        scale = ceil_to_ue8m0(scale)
    return (groups.float() * (1.0 / scale)).to(torch.float8_e4m3fn), scale


def _check_matrix(op: str, x: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"{op}: x must be a matrix (got shape {list(x.shape)}); reshape it")


def per_token_cast_to_fp8(
    x: Tensor, use_ue8m0: bool, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """Casts to FP8 with a scale for every `gran_k` elements of a row.

    Args:
        x: [M, K], bfloat16, float16 or float32. Any K.
        use_ue8m0: round scales up to powers of two.
        gran_k: elements to a scale; the GEMMs take 128.
        use_packed_ue8m0: return the scales' exponents, four to an int32, the last ones padded.

    Returns:
        data: [M, K], float8_e4m3fn, contiguous.
        scale: [M, ceil(K / gran_k)], float32, contiguous; packed, [M, ceil(K / gran_k / 4)], int32.

    Raises:
        ValueError: x is no matrix; use_packed_ue8m0 without use_ue8m0.
    """
    _check_matrix("per_token_cast_to_fp8", x)
    if use_packed_ue8m0 and not use_ue8m0:
        raise ValueError(
            "per_token_cast_to_fp8: use_packed_ue8m0 must come with use_ue8m0=True (got False): "
            "only powers of two have an exponent alone"
        )
    rows, columns = x.shape
    groups = ceil_div(columns, gran_k)
    padded = pad(x, (0, groups * gran_k - columns)).view(rows, groups, gran_k)
    data, scale = _cast(padded, (2,), use_ue8m0)
    data = data.view(rows, groups * gran_k)[:, :columns].contiguous()
    scale = scale.view(rows, groups)
    if use_packed_ue8m0:
        scale = _exponents(pad(scale, (0, -groups % 4), value=1.0).view(torch.int32))
    return data, scale


def per_channel_cast_to_fp8(x: Tensor, use_ue8m0: bool, gran_k: int = 128) -> tuple[Tensor, Tensor]:
    """Casts to FP8 with a scale for every `gran_k` elements of a column, as wgrad's operands.

    Args:
        x: [K, N], bfloat16, float16 or float32, K a multiple of gran_k.
        use_ue8m0: round scales up to powers of two.
        gran_k: elements to a scale; the GEMMs take 128.

    Returns:
        data: [K, N], float8_e4m3fn, contiguous.
        scale: [K / gran_k, N], float32, contiguous.

    Raises:
        ValueError: x is no matrix, or K no multiple of gran_k.
    """
    _check_matrix("per_channel_cast_to_fp8", x)
    rows, columns = x.shape
    if rows % gran_k != 0:
        raise ValueError(
            f"per_channel_cast_to_fp8: x must have a multiple of gran_k={gran_k} rows (got shape "
            f"{list(x.shape)}); pad it with zeros"
        )
    data, scale = _cast(x.reshape(rows // gran_k, gran_k, columns), (1,), use_ue8m0)
    return data.view(rows, columns), scale.view(rows // gran_k, columns)


def per_block_cast_to_fp8(x: Tensor, use_ue8m0: bool, gran_k: int = 128) -> tuple[Tensor, Tensor]:
    """Casts to FP8 with a scale for every block of `gran_k` rows and `gran_k` columns.

    Args:
        x: [N, K], bfloat16, float16 or float32. Any N and K.
        use_ue8m0: round scales up to powers of two.
        gran_k: rows and columns to a scale; the GEMMs take 128.

    Returns:
        data: [N, K], float8_e4m3fn, contiguous.
        scale: [ceil(N / gran_k), ceil(K / gran_k)], float32, contiguous.

    Raises:
        ValueError: x is no matrix.
    """
    _check_matrix("per_block_cast_to_fp8", x)
    rows, columns = x.shape
    down, across = ceil_div(rows, gran_k), ceil_div(columns, gran_k)
    padded = pad(x, (0, across * gran_k - columns, 0, down * gran_k - rows))
    data, scale = _cast(padded.view(down, gran_k, across, gran_k), (1, 3), use_ue8m0)
    data = data.view(padded.shape)[:rows, :columns].contiguous()
    return data, scale.view(down, across)


def per_custom_dims_cast_to_fp8(
    x: Tensor, dims: tuple[int, ...], use_ue8m0: bool
) -> tuple[Tensor, Tensor]:
    """Casts to FP8 with a scale for every index of the dimensions `dims`.

    Args:
        x: of any shape, bfloat16, float16 or float32.
        dims: the dimensions to keep; the others are reduced.
        use_ue8m0: round scales up to powers of two.

    Returns:
        data: float8_e4m3fn, of x's shape.
        scale: float32, of the shape of `dims`, sizes of 1 dropped.
    """
    others = tuple(dim for dim in range(x.dim()) if dim not in dims)
    data, scale = _cast(x, others, use_ue8m0)
    return data, scale.squeeze()


def cast_back_from_fp8(
    x_fp8: Tensor, sf: Tensor, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> Tensor:
    """Undoes `per_token_cast_to_fp8`: data * scale, [M, K], float32."""
    _check_matrix("cast_back_from_fp8", x_fp8)
    if use_packed_ue8m0:
        sf = unpack_ue8m0_from_int(sf)
    return x_fp8.float() * sf.repeat_interleave(gran_k, 1)[:, : x_fp8.shape[1]]
