"""What the tests of FP8 products share: operands of every granularity, and the bounds that
docs/numerics.md derives on the distance of a result from the float64 product."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from support.op_samples import E4M3, E5M2
from torchext import _architectures

WIDE = [torch.bfloat16, torch.float16, torch.float32]
SMALLEST_NORMAL = {E4M3: 2.0**-6, E5M2: 2.0**-14}
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
LEAST = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}

ops = torch.ops.torchext


# ---- operands ----


@dataclass(frozen=True)
class Operand:
    """A quantized matrix, and, in float64 on the CPU, its data and the scale of each element."""

    data: torch.Tensor
    scale: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor

    @property
    def dequantized(self):
        return self.values * self.scales

    @property
    def quantized(self):
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

    def rows(self, index):
        """Some of its rows, of `values` and `scales` alone."""
        return replace(self, values=self.values[index], scales=self.scales[index])

    def columns(self, begin, end):
        """With zeros instead of other columns: a kernel's blocks of K are those of the whole."""
        values = torch.zeros_like(self.values)
        values[:, begin:end] = self.values[:, begin:end]
        return replace(self, values=values)


def tensor_core_of(config: pytest.Config) -> TensorCore | None:
    """What sums FP8 products: a TensorCore, maybe simulated; None where FP32 arithmetic does."""
    where = config.getoption("--device")
    if where == "cpu":
        return None
    capability = config.getoption("--sim-arch")
    if where == "cuda":
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    return TENSOR_CORES.get(_architectures.path_of(capability))


QUANTIZERS = {
    "1d2d": (ops.quantize_1x128, ops.quantize_128x128),
    "1d1d": (ops.quantize_1x128, ops.quantize_1x128),
    "rowwise": (ops.quantize_rowwise, ops.quantize_rowwise),
    "tensorwise": (ops.quantize_tensorwise, ops.quantize_tensorwise),
}


def unquantized(granularity, shape, *, scaled=True):
    """N(0, 1), the rows and the groups of K (of either operand, differently) scaled by powers of
    two so that a scale applied in the wrong place cannot go unseen."""

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
    """How one rounds: the products of a step, and the place, relative to the largest magnitude
    involved, below which each product, the sum so far and the new sum are truncated."""

    step: int
    lost: float

    @property
    def lost_in_a_block(self):
        """Of 128 of K, with 2 % for what the errors add to the sums."""
        return 1.02 * (128 // self.step) * (self.step + 2) * self.lost


# sm_80 multiplies f16, truncates terms 24 bits below the largest, and sums like FP32.
TENSOR_CORES = {
    "sm90": TensorCore(32, 2.0**-13),
    "sm89": TensorCore(16, 2.0**-13),
    "sm80": TensorCore(8, 2.0**-23),
}


def tensor_core_error(a, b, unit):
    """The most that the tensor core loses of each output, summed over the blocks of 128 of K.

    Hopper's: a step of 32 of K aligns its non-zero products and the sum so far to the largest
    exponent among them, truncates each to 13 fraction bits, adds them exactly, and truncates the
    sum likewise: at most 34 errors of 2**-13 times the largest magnitude involved. Exponents are
    not normalized, so a subnormal operand counts as the smallest normal one. Four steps a block,
    and 2 % for what the errors add to the sums: 0.017 times the largest product or partial sum of
    the block. The others': docs/numerics.md.
    """
    m, n, k = a.values.shape[0], b.values.shape[0], a.values.shape[1]
    lost = torch.zeros(m, n, dtype=torch.float64)
    for start in range(0, k, 128):
        block = slice(start, min(start + 128, k))
        qa, qb = a.values[:, block], b.values[:, block]
        lifted = [
            torch.where(q == 0, 0.0, q.abs().clamp(min=SMALLEST_NORMAL[x.data.dtype]))
            for q, x in ((qa, a), (qb, b))
        ]
        few_rows = lifted[0].split(32)  # what memory allows
        largest = torch.cat([(rows[:, None] * lifted[1]).amax(2) for rows in few_rows])
        for end in range(unit.step, qa.shape[1] + unit.step, unit.step):
            largest = largest.maximum((qa[:, :end] @ qb[:, :end].t()).abs())
        lost += unit.lost_in_a_block * largest * a.scales[:, start, None] * b.scales[:, start]
    return lost


def sum_error(a, b, *, tensor_core, addends=(), terms=None):
    """The largest error of a product before it is rounded, with float64 operands.

    sum |a b| * (terms + 4) * 2**-24    FP32: scales and sums, in any order; terms: K
    + tensor_core_error                 not where FP32 arithmetic sums
    + (|a @ b| + |addends|) * 2**-23    bias and old output are added in FP32
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
    result, a, b, *, tensor_core, bias=None, old=None, terms=None, out_dtype=None
):
    """That `result` is a @ b.T (+ bias) (+ old) as closely as docs/numerics.md promises: within
    sum_error and the rounding of (|exact| + sum_error) to the output's dtype, which is at least
    half its least subnormal."""
    out_dtype = out_dtype or result.dtype
    exact = a.dequantized @ b.dequantized.t()
    addends = [
        addend.double().cpu().expand_as(exact) for addend in (bias, old) if addend is not None
    ]
    for addend in addends:
        exact = exact + addend
    assert result.dtype == out_dtype
    assert result.shape == exact.shape
    error = sum_error(a, b, tensor_core=tensor_core, addends=addends, terms=terms)
    rounding = ((exact.abs() + error) * ROUNDING[out_dtype]).clamp(min=LEAST[out_dtype] / 2)
    bound = error + rounding
    distance = (result.double().cpu() - exact).abs()
    assert (distance <= bound).all(), f"{(distance / bound).max():.3f} times the bound"


def check(a, b, tensor_core, *, out_dtype=torch.bfloat16, bias=None, out=None, accumulate=False):
    """Runs fp8_gemm_nt, compares with the exact result, and returns what the op made of it."""
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
