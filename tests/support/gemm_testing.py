"""Helpers for tests of FP8 GEMMs: operands of every granularity, and the bounds of docs/numerics.md
on the distance between a result and the float64 result."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from torchext._catalog.entry import E4M3, E5M2

WIDE = [torch.bfloat16, torch.float16, torch.float32]
SMALLEST_NORMAL = {
    E4M3: 2.0**-6, E5M2: 2.0**-14, torch.float16: 2.0**-14, torch.bfloat16: 2.0**-126,
    torch.float32: 2.0**-126,
}  # fmt: skip
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
LEAST = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}

ops = torch.ops.torchext


# ---- operands ----


@dataclass(frozen=True)
class Operand:
    """A quantized matrix (data, scale); its data and each element's scale in float64 on the CPU.

    A matrix that is not quantized has scales of 1.
    """

    data: torch.Tensor
    scale: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor

    @property
    def dequantized(self):
        return self.values * self.scales

    @property
    def quantized(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.data, self.scale

    @staticmethod
    def of(data, scale, row_group):
        values = data.double().cpu()
        rows, columns = values.shape
        scales = scale.double().cpu().repeat_interleave(row_group, 0)
        if scale.shape[0] == 1:
            scales = scales[:1].expand(rows, -1)
        if scale.shape[1] != 1:
            scales = scales.repeat_interleave(128, 1)
        return Operand(data, scale, values, scales[:rows, :columns].expand(rows, columns))

    @staticmethod
    def wide(x):
        values = x.double().cpu()
        return Operand(x, torch.ones(1, 1), values, torch.ones_like(values))

    @property
    def transposed(self):
        return replace(self, values=self.values.t(), scales=self.scales.t())

    def rows(self, index):
        """The operand with some rows of `values` and `scales`; `data` and `scale` stay whole."""
        return replace(self, values=self.values[index], scales=self.scales[index])

    def columns(self, begin, end):
        """The operand with zeros outside these columns of `values`.

        Its K blocks are those of the whole matrix, as they are in the kernel.
        """
        values = torch.zeros_like(self.values)
        values[:, begin:end] = self.values[:, begin:end]
        return replace(self, values=values)


QUANTIZERS = {
    "1d2d": (ops.quantize_1x128, ops.quantize_128x128),
    "1d1d": (ops.quantize_1x128, ops.quantize_1x128),
    "rowwise": (ops.quantize_rowwise, ops.quantize_rowwise),
    "tensorwise": (ops.quantize_tensorwise, ops.quantize_tensorwise),
}


def unquantized(granularity, shape, *, scaled=True):
    """Random normal values times random powers of two for each row and each scale group along K.

    The two operands get different powers, so that a scale applied in the wrong place is visible.
    """

    def sizes(*shape):
        return 2.0 ** torch.randint(-3, 2, shape) if scaled else torch.ones(shape)

    *leading, k = shape
    x = torch.randn(shape)
    if granularity != "tensorwise":
        x *= sizes(*leading, 1)
    if granularity in ("1d2d", "1d1d"):
        x *= sizes(-(-k // 128)).repeat_interleave(128)[:k]
    return x


def operands(granularity, m, n, k, device, *, dtypes=(E4M3, E4M3), scaled=True):
    quantize_a, quantize_b = QUANTIZERS[granularity]
    x, w = (unquantized(granularity, (rows, k), scaled=scaled).to(device) for rows in (m, n))
    a = Operand.of(*quantize_a(x, dtype=dtypes[0]), 1)
    b = Operand.of(*quantize_b(w, dtype=dtypes[1]), 128 if granularity == "1d2d" else 1)
    return a, b


# ---- bounds ----


@dataclass(frozen=True)
class TensorCore:
    """How a tensor core rounds.

    step: how many products one step adds. lost: the largest truncation error of each product, of
    the sum so far and of the new sum, relative to the largest magnitude in the step.
    """

    step: int
    lost: float

    @property
    def lost_in_a_block(self):
        """The relative error of one K block, with 2 % for the growth of sums by earlier errors."""
        return 1.02 * (128 // self.step) * (self.step + 2) * self.lost


# sm_80 multiplies f16, truncates terms 24 bits below the largest, and sums like FP32.
TENSOR_CORES = {
    "sm90": TensorCore(32, 2.0**-13),
    "sm89": TensorCore(16, 2.0**-13),
    "sm80": TensorCore(8, 2.0**-23),
}
# The weights-only product multiplies FP16 or BF16 by mma.sync on all of them. sm_90 truncates terms
# 25 bits below the largest. An FP32 input is three BF16, so its block takes three times the steps.
WIDE_TENSOR_CORES = {
    "sm90": TensorCore(16, 2.0**-23),
    "sm89": TensorCore(8, 2.0**-23),
    "sm80": TensorCore(8, 2.0**-23),
}


def tensor_core_error(a, b, unit):
    """The largest error of each output by the tensor core, summed over the K blocks.

    On Hopper, one step covers 32 elements of K. It aligns the non-zero products and the sum so far
    to the largest exponent among them, truncates each to 13 fraction bits, adds them exactly, and
    truncates the sum to 13 bits: at most 34 errors of 2**-13 times the largest magnitude in the
    step. Exponents are not normalized, so a subnormal operand counts as the smallest normal number.
    A K block has four steps; 2 % more cover the growth of sums by earlier errors. The bound is
    0.017 times the largest product or partial sum of the block. docs/numerics.md has the bounds of
    the other tensor cores.
    """
    m, n, k = a.values.shape[0], b.values.shape[0], a.values.shape[1]
    lost = torch.zeros(m, n, dtype=torch.float64)
    # FP32 holds every product of two FP8 numbers.
    fp8 = {a.data.dtype, b.data.dtype} <= {E4M3, E5M2}
    product_dtype = torch.float32 if fp8 else torch.float64
    for start in range(0, k, 128):
        block = slice(start, min(start + 128, k))
        qa, qb = a.values[:, block], b.values[:, block]
        lifted = [
            torch.where(q == 0, 0.0, q.abs().clamp(min=SMALLEST_NORMAL[x.data.dtype]))
            for q, x in ((qa, a), (qb, b))
        ]
        rows, columns = (x.to(product_dtype) for x in lifted)
        # Eight rows at a time, whose products stay in the cache.
        largest = torch.cat([(few[:, None] * columns).amax(2) for few in rows.split(8)]).double()
        partial = torch.zeros_like(largest)
        for qa_step, qb_step in zip(qa.split(unit.step, 1), qb.split(unit.step, 1), strict=True):
            partial = partial + qa_step @ qb_step.t()
            largest = largest.maximum(partial.abs())
        lost += unit.lost_in_a_block * largest * a.scales[:, start, None] * b.scales[:, start]
    return lost


def sum_error(a, b, *, tensor_core, addends=(), terms=None):
    """The largest error of a GEMM before its result is rounded, from float64 operands.

    sum |a b| * (terms + 4) * 2**-24    FP32 scales and sums, in any order; `terms` is K by default
    + tensor_core_error                 unless FP32 arithmetic sums
    + (|a @ b| + |addends|) * 2**-23    additions of bias and old output in FP32
    """
    da, db = a.dequantized, b.dequantized
    terms = da.shape[1] if terms is None else terms
    error = (da.abs() @ db.abs().t()) * ((terms + 4) * 2.0**-24)
    if tensor_core:
        error = error + tensor_core_error(a, b, tensor_core)
    size = (da @ db.t()).abs()
    for addend in addends:
        size = size + addend.abs()
    return error + (size + error) * (2.0**-23 * len(addends))


def assert_within_bound(
    result, a, b, *, tensor_core, bias=None, old=None, terms=None, out_dtype=None, more_error=0.0
):
    """Asserts that `result` is a @ b.T (+ bias) (+ old) as closely as docs/numerics.md promises.

    The bound is sum_error plus the rounding of (|exact| + sum_error) to the output's dtype. The
    rounding is at least half the smallest subnormal of that dtype. more_error: added to sum_error.
    """
    out_dtype = out_dtype or result.dtype
    exact = a.dequantized @ b.dequantized.t()
    addends = [
        addend.double().cpu().expand_as(exact) for addend in (bias, old) if addend is not None
    ]
    for addend in addends:
        exact = exact + addend
    assert result.dtype == out_dtype
    assert result.shape == exact.shape
    error = sum_error(a, b, tensor_core=tensor_core, addends=addends, terms=terms) + more_error
    rounding = ((exact.abs() + error) * ROUNDING[out_dtype]).clamp(min=LEAST[out_dtype] / 2)
    bound = error + rounding
    distance = (result.double().cpu() - exact).abs()
    assert (distance <= bound).all(), f"{(distance / bound).max():.3f} times the bound"


def check(a, b, tensor_core, *, out_dtype=torch.bfloat16, bias=None, out=None, accumulate=False):
    """Runs fp8_gemm_nt, compares its result with the exact one, and returns its result."""
    old = out.clone() if accumulate else None
    if out is None:
        result = ops.fp8_gemm_nt(*a.quantized, *b.quantized, bias=bias, out_dtype=out_dtype)
        assert result.is_contiguous()
    else:
        ops.fp8_gemm_nt.out(*a.quantized, *b.quantized, out=out, accumulate=accumulate, bias=bias)
        result, out_dtype = out, out.dtype
    assert_within_bound(
        result, a, b, tensor_core=tensor_core, bias=bias, old=old, out_dtype=out_dtype
    )
    return result
