"""DeepGEMM's dense FP8 GEMMs, by torch.ops.torchext.fp8_gemm_nt."""

from __future__ import annotations

from torch import Tensor

from ... import ops
from ..._dispatch.layout import GROUP, ceil_div
from ._operands import (
    Pair,
    Recipe,
    check_c,
    check_epilogue,
    checked_scale,
    k_major,
    pair,
    row_scale,
    rows_per_b_scale,
)
from ._runtime import budget


def fp8_gemm_nt(
    a: Pair,
    b: Pair,
    d: Tensor,
    c: Tensor | None = None,
    recipe: Recipe | None = None,
    recipe_a: Recipe | None = None,
    recipe_b: Recipe | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    alpha: float | None = None,
    *,
    epilogue: None = None,
) -> None:
    """d = dequantized a @ dequantized b.T (+ c), in place.

    Sums are FP32 and rounded once; see `torchext.ops.fp8_gemm_nt`. Any M, N and K.

    Args:
        a: (data, scale). Data [M, K], torch.float8_e4m3fn or torch.float8_e5m2. Scale
            [M, ceil(K / 128)], float32 of any strides: M-major ones, as
            `get_mn_major_tma_aligned_tensor` returns them, are read in place, others transposed
            first. Or int32 [M, ceil(K / 512)] of four UE8M0 exponents each, decoded at each call.
        b: (data, scale). Data [N, K]. Scale [ceil(N / 128), ceil(K / 128)], float32 of any strides;
            or [N, ceil(K / 128)] with recipe=(1, 1, 128), like a's.
        d: [M, N], written in place; bfloat16, float16 or float32, contiguous rows.
        c: [M, N], of d's dtype: added to the product. `d` itself, to accumulate; otherwise it is
            copied to d first.
        recipe: (1, 128, 128) (None, unless b's scale is int32) or (1, 1, 128).
        recipe_a, recipe_b: (1, 128) and (128, 128) or (1, 128), instead of recipe.
        compiled_dims: ignored: no kernel is compiled at run time.
        disable_ue8m0_cast: ignored: no kernel casts scales.
        alpha: None; DeepGEMM has it on Blackwell.
        epilogue: None; torchext has no other.

    Data must be K-major, with rows that start at multiples of 16 bytes. Others are copied into such
    rows at each call, with a warning the first time.

    Raises:
        ValueError: shapes or a recipe that do not fit together; an alpha; strides of `d`.
        TypeError: an argument of another type or dtype.
        RuntimeError: `d` requires a gradient; a GPU that this build has no kernels for.
    """
    op = "fp8_gemm_nt"
    check_epilogue(op, epilogue)
    _gemm(op, pair(op, "a", a, 2), pair(op, "b", b, 2), d, c, recipe, recipe_a, recipe_b, alpha)


def fp8_gemm_nn(
    a: Pair,
    b: Pair,
    d: Tensor,
    c: Tensor | None = None,
    recipe: Recipe | None = None,
    recipe_a: Recipe | None = None,
    recipe_b: Recipe | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    alpha: float | None = None,
    *,
    epilogue: None = None,
) -> None:
    """d = dequantized a @ dequantized b (+ c), in place.

    `fp8_gemm_nt` of b transposed: data [K, N], scale [ceil(K / 128), ceil(N / 128)] or, with
    recipe=(1, 1, 128), [ceil(K / 128), N]. A contiguous b is copied at each call: tensor cores read
    FP8 along K only. A transpose b.t() of a K-major b is read in place.
    """
    op = "fp8_gemm_nn"
    check_epilogue(op, epilogue)
    a, b = pair(op, "a", a, 2), _transposed(op, "b", b)
    _gemm(op, a, b, d, c, recipe, recipe_a, recipe_b, alpha)


def fp8_gemm_tn(
    a: Pair,
    b: Pair,
    d: Tensor,
    c: Tensor | None = None,
    recipe: Recipe | None = None,
    recipe_a: Recipe | None = None,
    recipe_b: Recipe | None = None,
    compiled_dims: str = "mn",
    disable_ue8m0_cast: bool = False,
    alpha: float | None = None,
    *,
    epilogue: None = None,
) -> None:
    """d = dequantized a.T @ dequantized b (+ c), in place: wgrad of operands in their stored order.

    `fp8_gemm_nt` of both transposed: a's data [K, M], scale [ceil(K / 128), M]; b's as in
    `fp8_gemm_nn`. Contiguous data are copied at each call, as there.
    """
    op = "fp8_gemm_tn"
    check_epilogue(op, epilogue)
    a, b = _transposed(op, "a", a), _transposed(op, "b", b)
    _gemm(op, a, b, d, c, recipe, recipe_a, recipe_b, alpha)


def fp8_gemm_tt(
    a: Pair,
    b: Pair,
    d: Tensor,
    c: Tensor | None = None,
    recipe: Recipe | None = None,
    recipe_a: Recipe | None = None,
    recipe_b: Recipe | None = None,
    compiled_dims: str = "mn",
    disable_ue8m0_cast: bool = False,
    alpha: float | None = None,
    *,
    epilogue: None = None,
) -> None:
    """d = dequantized a.T @ dequantized b.T (+ c), in place.

    `fp8_gemm_nt` of a transposed: data [K, M], scale [ceil(K / 128), M]. Contiguous data are copied
    at each call, as in `fp8_gemm_nn`.
    """
    op = "fp8_gemm_tt"
    check_epilogue(op, epilogue)
    a, b = _transposed(op, "a", a), pair(op, "b", b, 2)
    _gemm(op, a, b, d, c, recipe, recipe_a, recipe_b, alpha)


# DeepGEMM 2.4 to 2.6 name them for FP4 operands too, and have these names for the same functions.
fp8_fp4_gemm_nt = fp8_gemm_nt
fp8_fp4_gemm_nn = fp8_gemm_nn
fp8_fp4_gemm_tn = fp8_gemm_tn
fp8_fp4_gemm_tt = fp8_gemm_tt


def _transposed(op: str, name: str, operand: Pair) -> tuple[Tensor, Tensor]:
    data, scale = pair(op, name, operand, 2)
    return data.t(), scale.t()


def _gemm(
    op: str,
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    d: Tensor,
    c: Tensor | None,
    recipe: Recipe | None,
    recipe_a: Recipe | None,
    recipe_b: Recipe | None,
    alpha: float | None,
) -> None:
    """The product of a [M, K] and b [N, K], of any strides."""
    (a_data, a_scale), (b_data, b_scale) = a, b
    (m, k), (n, b_k) = a_data.shape, b_data.shape
    if alpha is not None:
        raise ValueError(
            f"{op}: alpha must be None, as on Hopper in DeepGEMM (got {alpha}); multiply b's scale "
            "by it"
        )
    if k != b_k or d.shape != (m, n):
        raise ValueError(
            f"{op}: a and b must agree in K, and d must be [M, N] (got, as operands of "
            f"fp8_gemm_nt, a [M, K] = {[m, k]}, b [N, K] = {[n, b_k]}, and d {list(d.shape)})"
        )
    check_c(op, c, d)
    rows = rows_per_b_scale(op, recipe, recipe_a, recipe_b, b_scale)
    a_scale = row_scale(op, "a", a_scale, (m,), k)
    if rows == 1:
        b_scale = row_scale(op, "b", b_scale, (n,), k)
    else:
        b_scale = checked_scale(op, "b", b_scale, (ceil_div(n, GROUP),), k, rows)
    if c is not None and c is not d:
        d.copy_(c)
    ops.fp8_gemm_nt(
        k_major(op, "a", a_data),
        a_scale,
        k_major(op, "b", b_data),
        b_scale,
        out=d,
        accumulate=c is not None,
        num_sms=budget(),
    )
