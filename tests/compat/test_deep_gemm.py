"""torchext.compat.deep_gemm: signatures compared with DeepGEMM's, dense GEMMs with float64.
The other files in this folder test grouped GEMMs, casts and layouts.

Above 500 lines because each function has its own signature and options.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import torchext
from support.deep_gemm_testing import by_block, by_token
from support.gemm_testing import Operand, assert_within_bound
from torchext.compat import deep_gemm
from torchext.compat.deep_gemm import _operands, gemm

DENSE = ["nt", "nn", "tn", "tt"]
# m, n, k: sizes at which DeepGEMM has crashed (n = 16, n = 768, 768 x 1536), and ragged ones.
SHAPES = [(1, 16, 128), (40, 16, 256), (33, 768, 128), (37, 133, 200), (1, 1, 1), (130, 5, 384)]
# From its tests and benchmarks, with M or K reduced.
DEEP_GEMM_SHAPES = [(1, 2112, 7168), (128, 576, 7168), (5, 7168, 2048), (1, 24576, 256)]


def stored(operand, transposed):
    """Data and scale as a caller of nn, tn or tt stores them: contiguous, transposed or not."""
    if not transposed:
        return operand.quantized
    return operand.data.t().contiguous(), operand.scale.t().contiguous()


def multiply(layout, a, b, d, **options):
    function = getattr(deep_gemm, f"fp8_gemm_{layout}")
    function(stored(a, layout[0] == "t"), stored(b, layout[1] == "n"), d, **options)


# ---- signatures ----

# DeepGEMM 2.8.0, csrc/apis/gemm.hpp and csrc/apis/layout.hpp at commit 0274ad7 (the py::arg lists),
# deep_gemm/utils/math.py; names in utils also in sgl-deep-gemm 0.2.2. For k-grouped GEMMs:
# sgl-deep-gemm 0.2.2's deep_gemm/__init__.py, which has `ks` as 2.0 to 2.6 do (2.8: ks_cpu).
OUT_OF_SCOPE = [
    "per_token_cast_to_fp4", "cast_back_from_fp4", "transpose_packed_fp4",
    "transform_weights_for_mega_moe", "get_symm_buffer_for_mega_moe", "fp8_fp4_mega_moe",
]  # fmt: skip
RECIPES = "recipe=None, recipe_a=None, recipe_b=None"
SIGNATURES = {
    "fp8_gemm_nt": f"a, b, d, c=None, {RECIPES}, compiled_dims='nk', disable_ue8m0_cast=False, "
    "alpha=None, epilogue=None",
    "fp8_gemm_nn": f"a, b, d, c=None, {RECIPES}, compiled_dims='nk', disable_ue8m0_cast=False, "
    "alpha=None, epilogue=None",
    "fp8_gemm_tn": f"a, b, d, c=None, {RECIPES}, compiled_dims='mn', disable_ue8m0_cast=False, "
    "alpha=None, epilogue=None",
    "fp8_gemm_tt": f"a, b, d, c=None, {RECIPES}, compiled_dims='mn', disable_ue8m0_cast=False, "
    "alpha=None, epilogue=None",
    "m_grouped_fp8_gemm_nt_contiguous": f"a, b, d, grouped_layout, {RECIPES}, compiled_dims='nk', "
    "disable_ue8m0_cast=False, use_psum_layout=False, ensure_zero_padding=True, "
    "expected_m_for_psum_layout=None, epilogue=None",
    "m_grouped_fp8_gemm_nn_contiguous": f"a, b, d, grouped_layout, {RECIPES}, compiled_dims='nk', "
    "disable_ue8m0_cast=False, use_psum_layout=False, ensure_zero_padding=True, epilogue=None",
    "m_grouped_fp8_gemm_nt_masked": f"a, b, d, masked_m, expected_m, {RECIPES}, "
    "compiled_dims='nk', disable_ue8m0_cast=False, epilogue=None",
    "fp8_m_grouped_gemm_nt_masked": f"a, b, d, masked_m, expected_m, {RECIPES}, "
    "compiled_dims='nk', disable_ue8m0_cast=False, epilogue=None",
    "k_grouped_fp8_gemm_nt_contiguous": "a, b, d, ks, grouped_layout, c=None, recipe=(1, 1, 128), "
    "compiled_dims='mn', use_psum_layout=False, use_padded_sf_layout=False",
    "k_grouped_fp8_gemm_tn_contiguous": "a, b, d, ks, grouped_layout, c=None, recipe=(1, 1, 128), "
    "compiled_dims='mn', use_psum_layout=False, use_padded_sf_layout=False",
    "transform_sf_into_required_layout": "sf, mn, k, recipe, num_groups=None, is_sfa=None, "
    "disable_ue8m0_cast=False, psum_layout=None",
    "per_token_cast_to_fp8": "x, use_ue8m0, gran_k=128, use_packed_ue8m0=False",
    "per_channel_cast_to_fp8": "x, use_ue8m0, gran_k=128",
    "per_block_cast_to_fp8": "x, use_ue8m0, gran_k=128",
    "per_custom_dims_cast_to_fp8": "x, dims, use_ue8m0",
    "cast_back_from_fp8": "x_fp8, sf, gran_k=128, use_packed_ue8m0=False",
    "ceil_to_ue8m0": "x",
    "pack_ue8m0_to_int": "x",
    "unpack_ue8m0_from_int": "packed_sf",
    "ceil_div": "x, y",
    "align": "x, y",
    "get_tma_aligned_size": "mn, element_size",
    "get_mn_major_tma_aligned_tensor": "sf",
    "get_mk_alignment_for_contiguous_layout": "",
    "get_m_alignment_for_contiguous_layout": "",
    "get_k_alignment_for_contiguous_layout": "",
    "set_mk_alignment_for_contiguous_layout": "new_value",
    "get_theoretical_mk_alignment_for_contiguous_layout": "expected_m=None, num_groups=None",
    # 2.6.1, csrc/apis/layout.hpp and gemm.hpp at commit 54e2261.
    "get_mn_major_tma_aligned_packed_ue8m0_tensor": "sf, psum_layout=None",
    "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor": "sf, grouped_layout, ks_cpu, "
    "gran_k=128, k_alignment=128, use_psum_layout=False",
    "m_grouped_bf16_gemm_nt_contiguous": "a, b, d, grouped_layout, compiled_dims='nk', "
    "use_psum_layout=False, ensure_zero_padding=True, expected_m_for_psum_layout=None",
    "m_grouped_bf16_gemm_nn_contiguous": "a, b, d, grouped_layout, compiled_dims='nk', "
    "use_psum_layout=False, ensure_zero_padding=True",
    **{f"cublaslt_gemm_{layout}": "a, b, d, c=None" for layout in DENSE},
    **dict.fromkeys(OUT_OF_SCOPE, "args, kwargs"),
    "set_num_sms": "num_sms",
    "get_num_sms": "",
    "set_ignore_compile_dims": "new_value",
    "use_deterministic_algorithms": "enabled",
    "get_deterministic_algorithms": "",
    # DeepGEMM 1.x, deep_gemm/jit_kernels: at commit 279eb03, wgrad_gemm.py; 0b5d353,
    # m_grouped_gemm.py; 5e365d3, utils.py.
    "gemm_fp8_fp8_bf16_nt": "lhs, rhs, out",
    "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous": "lhs, rhs, out, m_indices",
    "m_grouped_gemm_fp8_fp8_bf16_nt_masked": "lhs, rhs, out, masked_m, expected_m",
    "wgrad_gemm_fp8_fp8_fp32_nt": "lhs, rhs, out",
    "k_grouped_wgrad_gemm_fp8_fp8_fp32_nt": "lhs, rhs, out, batch_sizes",
    "get_col_major_tma_aligned_tensor": "x",
}


# 2.4 to 2.6 have these names for functions that later releases name with fp8 only.
FP4_TOO = {
    name.replace("fp8_", "fp8_fp4_"): name
    for name in SIGNATURES
    if name.startswith(("fp8_gemm", "m_grouped_fp8_gemm"))
}


def test_every_function_has_deep_gemms_signature():
    public = {name for name in deep_gemm.__all__ if callable(getattr(deep_gemm, name))}
    assert public == set(SIGNATURES) | set(FP4_TOO)
    for name, same in FP4_TOO.items():
        assert getattr(deep_gemm, name) is getattr(deep_gemm, same)
    for name, expected in SIGNATURES.items():
        parameters = inspect.signature(getattr(deep_gemm, name)).parameters.values()
        given = ", ".join(
            p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default!r}"
            for p in parameters
        )
        assert given == expected, name


def test_modules_lie_where_deep_gemm_has_them():
    for name in deep_gemm.utils.__all__:
        assert getattr(deep_gemm, name) is getattr(deep_gemm.utils, name)
    assert deep_gemm.utils.layout.get_tma_aligned_size is deep_gemm.get_tma_aligned_size
    assert deep_gemm.utils.math.align is deep_gemm.align


def test_code_that_imports_deep_gemm_can_be_given_this(monkeypatch):
    """Runs the block of docs/deep_gemm.md, then the imports of SGLang and vLLM."""
    for name in ("", ".testing", ".utils", ".utils.layout", ".utils.math"):
        monkeypatch.setitem(sys.modules, f"deep_gemm{name}", None)  # restored after the test
    document = Path(__file__).resolve().parents[2] / "docs" / "deep_gemm.md"
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
    (block,) = (text for text in blocks if "sys.modules" in text)
    imports = """
import deep_gemm
import deep_gemm.utils.layout
from deep_gemm import fp8_gemm_nt
from deep_gemm.testing import bench_kineto, calc_diff
from deep_gemm.utils import per_token_cast_to_fp4, per_token_cast_to_fp8
from deep_gemm.utils.layout import get_mn_major_tma_aligned_tensor
from deep_gemm.utils.math import align
"""
    names: dict[str, Any] = {}
    exec(block + imports, names)
    assert names["deep_gemm"] is deep_gemm
    assert names["align"] is deep_gemm.align
    assert names["per_token_cast_to_fp8"] is deep_gemm.per_token_cast_to_fp8
    assert names["calc_diff"] is deep_gemm.testing.calc_diff
    assert not hasattr(deep_gemm, "bf16_gemm_nt")


def test_transformers_finds_what_it_asks_for():
    """The names that integrations/deepgemm.py of transformers 5 takes from a DeepGEMM."""
    for name in (
        "fp8_fp4_gemm_nt", "m_grouped_fp8_fp4_gemm_nt_contiguous",
        "m_grouped_bf16_gemm_nt_contiguous", "m_grouped_bf16_gemm_nn_contiguous",
        "get_mn_major_tma_aligned_packed_ue8m0_tensor", "transform_weights_for_mega_moe",
        "get_symm_buffer_for_mega_moe", "fp8_fp4_mega_moe",
    ):  # fmt: skip
        assert callable(getattr(deep_gemm, name))
    assert callable(deep_gemm.utils.per_token_cast_to_fp8)


@pytest.mark.parametrize("name", OUT_OF_SCOPE)
def test_fp4_is_refused_by_name(name):
    with pytest.raises(NotImplementedError, match=f"^{name}: FP4 is out of scope"):
        getattr(deep_gemm, name)(torch.zeros(4, 4), True)


def test_fp4_operands_are_refused():
    a = by_token(4, 128, "cpu").quantized
    for packed in (torch.int8, torch.uint8):
        b = torch.zeros(8, 64, dtype=packed), torch.ones(1, 1)
        with pytest.raises(TypeError, match=r"data of b must be .*FP4 .* out of scope"):
            deep_gemm.fp8_fp4_gemm_nt(a, b, torch.empty(4, 8))


# ---- GEMMs without scales ----

WIDE = [
    (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32), (torch.float32, torch.bfloat16),
    (torch.float8_e4m3fn, torch.bfloat16), (torch.float8_e4m3fn, torch.float32),
    (torch.float8_e5m2, torch.float32),
]  # fmt: skip


@pytest.mark.parametrize("dtype, out", WIDE, ids=str)
@pytest.mark.parametrize("layout", DENSE)
def test_cublaslt(layout, dtype, out, device, tensor_core):
    function = getattr(deep_gemm, f"cublaslt_gemm_{layout}")
    for m, n, k in [(20, 32, 48), (5, 7, 9), (3, 16, 0), (0, 4, 4)]:
        a, b = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
        stored_a = a.t().contiguous() if layout[0] == "t" else a
        stored_b = b.t().contiguous() if layout[1] == "n" else b
        c = torch.randn(m, n, device=device).to(out)
        kept = c.clone()
        d = torch.full((m, n), torch.nan, dtype=out, device=device)
        function(stored_a, stored_b, d)
        assert_wide_within_bound(d, a, b, tensor_core)
        function(stored_a, stored_b, d, c)
        assert_wide_within_bound(d, a, b, tensor_core, c)
        assert torch.equal(c, kept)
        function(stored_a, stored_b, c, c=c)
        assert torch.equal(c, d)


def assert_wide_within_bound(d, a, b, tensor_core, c=None):
    """The bound of docs/numerics.md for scales of 1.

    Two things differ. Only FP8 kernels of torch sum as FP8 tensor cores do. And where a, b and d
    are BF16, cuBLAS may round the parts of a split K, and again the product before it adds c, to
    BF16. Each of these roundings is at most 2**-8 sum |a b|.
    """
    one = torch.ones(1, 1)
    fp8_kernel = a.dtype == torch.float8_e4m3fn and a.shape[1] % 16 == 0 == b.shape[0] % 16
    magnitude = a.double().abs() @ b.double().abs().t()
    assert_within_bound(
        d,
        Operand.of(a, one, 1),
        Operand.of(b, one, 1),
        tensor_core=tensor_core if fp8_kernel else None,
        old=c,
        more_error=2 * 2.0**-8 * magnitude.cpu() if d.dtype == a.dtype == torch.bfloat16 else 0.0,
    )


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(b=torch.zeros(5, 9)), "agree in K"),
        (dict(b=torch.zeros(5, 8).double()), "in dtype"),
        (dict(d=torch.zeros(5, 4)), r"d must be \[M, N\] = \[4, 5\]"),
        (dict(d=torch.zeros(4, 5).to(torch.float8_e4m3fn)), "not FP8"),
        (dict(c=torch.zeros(4, 5).bfloat16()), "c must have d's"),
    ],
)
def test_cublaslt_errors(wrong, message):
    right = dict(a=torch.zeros(4, 8), b=torch.zeros(5, 8), d=torch.zeros(4, 5))
    with pytest.raises(ValueError, match=f"^cublaslt_gemm_nt: .*{message}"):
        deep_gemm.cublaslt_gemm_nt(**{**right, **wrong})


# ---- FP8 GEMMs ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recipe", [None, (1, 128, 128), (1, 1, 128)], ids=str)
@pytest.mark.parametrize("layout", DENSE)
def test_products(layout, recipe, shape, device, tensor_core, copies):
    m, n, k = shape
    a = by_token(m, k, device)
    b = (by_token if recipe == (1, 1, 128) else by_block)(n, k, device)
    for dtype in (torch.bfloat16, torch.float32):
        d = torch.full((m, n), torch.nan, dtype=dtype, device=device)
        multiply(layout, a, b, d, recipe=recipe, compiled_dims="mnk", disable_ue8m0_cast=True)
        assert_within_bound(d, a, b, tensor_core=tensor_core)


def test_768_by_1536(device, tensor_core):
    """A size at which DeepGEMM's wgrad has crashed while accumulating in FP32."""
    a, b = by_token(768, 128, device), by_token(1536, 128, device)
    d = torch.ones(768, 1536, device=device)
    multiply("nt", a, b, d, c=d, recipe=(1, 1, 128))
    assert_within_bound(d, a, b, tensor_core=tensor_core, old=torch.ones(768, 1536))


@pytest.mark.large
@pytest.mark.parametrize("shape", DEEP_GEMM_SHAPES)
def test_deep_gemms_shapes(shape, device, tensor_core):
    m, n, k = shape
    a, b = by_token(m, k, device), by_block(n, k, device)
    d = torch.full((m, n), torch.nan, dtype=torch.bfloat16, device=device)
    multiply("nt", a, b, d)
    assert_within_bound(d, a, b, tensor_core=tensor_core)
    expected = torch.ops.torchext.fp8_gemm_nt(
        a.data, deep_gemm.get_mn_major_tma_aligned_tensor(a.scale), b.data, b.scale
    )
    assert torch.equal(d, expected)


def test_e5m2_mixes_with_e4m3(device, tensor_core, copies):
    a = Operand.of(*torchext.ops.quantize_1x128(torch.randn(20, 300), dtype=torch.float8_e5m2), 1)
    a = Operand(a.data.to(device), a.scale.to(device), a.values, a.scales)
    b = by_block(40, 300, device)
    d = torch.empty(20, 40, device=device)
    deep_gemm.fp8_gemm_nt(a.quantized, b.quantized, d)
    assert_within_bound(d, a, b, tensor_core=tensor_core)


@pytest.mark.parametrize("recipe", [(1, 128, 128), (1, 1, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_c_is_added(dtype, recipe, device, tensor_core, copies):
    """To accumulate, a caller passes d as c; a c other than d is not modified."""
    a = by_token(20, 300, device)
    b = (by_token if recipe == (1, 1, 128) else by_block)(40, 300, device)
    c = (torch.randn(20, 40) * 32).to(dtype).to(device)
    kept = c.clone()
    for layout in DENSE:
        d = c.clone()
        multiply(layout, a, b, d, c=d, recipe=recipe)
        assert_within_bound(d, a, b, tensor_core=tensor_core, old=kept)
        other = torch.full_like(c, torch.nan)
        multiply(layout, a, b, other, c=c, recipe=recipe)
        assert torch.equal(other, d) and torch.equal(c, kept)


def test_a_sum_over_nothing_is_c(device):
    a, b = by_token(3, 0, device), by_block(5, 0, device)
    c, d = torch.randn(3, 5, device=device), torch.empty(3, 5, device=device)
    multiply("nt", a, b, d, c=c)
    assert torch.equal(d, c)
    multiply("nt", a, b, d)
    assert (d == 0).all()


@pytest.mark.parametrize("shape", [(0, 40, 300), (20, 0, 300), (0, 0, 0)])
@pytest.mark.parametrize("layout", DENSE)
def test_nothing_to_compute(layout, shape, device, copies):
    m, n, k = shape
    d = torch.empty(m, n, device=device)
    multiply(layout, by_token(m, k, device), by_block(n, k, device), d)


def test_d_may_be_columns_of_a_wider_tensor(device, tensor_core):
    a, b = by_token(20, 256, device), by_block(40, 256, device)
    wide = torch.zeros(20, 60, dtype=torch.bfloat16, device=device)
    multiply("nt", a, b, wide[:, 7:47])
    assert_within_bound(wide[:, 7:47], a, b, tensor_core=tensor_core)
    assert (wide[:, :7] == 0).all() and (wide[:, 47:] == 0).all()


# ---- what callers write ----


def test_recipes_may_be_given_for_each_operand(device, copies):
    a, by_rows, by_blocks = (
        by_token(20, 300, device), by_token(40, 300, device), by_block(40, 300, device)
    )  # fmt: skip
    for b, recipe_b in ((by_blocks, (128, 128)), (by_rows, (1, 128))):
        d, expected = torch.empty(20, 40, device=device), torch.empty(20, 40, device=device)
        multiply("nt", a, b, d, recipe_a=(1, 128), recipe_b=recipe_b)
        multiply("nt", a, b, expected, recipe=(1, recipe_b[0], 128))
        assert torch.equal(d, expected)


def test_older_positions_of_compiled_dims(device, tensor_core, copies):
    """Until 2.2, compiled_dims and disable_ue8m0_cast came where recipe_a and recipe_b are now."""
    a, b = by_token(20, 300, device), by_token(40, 300, device)
    d = torch.ones(20, 40, device=device)
    pairs = [list(stored(x, False)) for x in (a, b)]  # lists work like tuples
    deep_gemm.fp8_gemm_nt(*pairs, d, d, [1, 1, 128], "nk", True)  # type: ignore[arg-type]
    assert_within_bound(d, a, b, tensor_core=tensor_core, old=torch.ones(20, 40))


@pytest.mark.parametrize("layout", DENSE)
def test_packed_exponents_are_decoded(layout, device, copies):
    """Blackwell's scales, four UE8M0 exponents in an int32, give the same bits."""
    k = 700
    a, b = (by_token(rows, k, device, use_ue8m0=True) for rows in (20, 40))
    expected, d = torch.empty(20, 40, device=device), torch.empty(20, 40, device=device)
    multiply(layout, a, b, expected, recipe=(1, 1, 128))

    def packed(operand):
        scale = torch.nn.functional.pad(operand.scale, (0, 2), value=1.0)
        return Operand(operand.data, deep_gemm.pack_ue8m0_to_int(scale), None, None)  # type: ignore[arg-type]

    multiply(layout, packed(a), packed(b), d)  # the default recipe is (1, 1, 128) here
    assert torch.equal(d, expected)


def test_num_sms(device, monkeypatch):
    a, b = by_token(300, 256, device), by_block(140, 256, device)
    expected = torch.empty(300, 140, dtype=torch.bfloat16, device=device)
    multiply("nt", a, b, expected)
    passed = []
    op = torchext.ops.fp8_gemm_nt

    def recorded(*args, **options):
        passed.append(options["num_sms"])
        return op(*args, **options)

    monkeypatch.setattr(gemm.ops, "fp8_gemm_nt", recorded)
    for count in (1, 3, 20):
        deep_gemm.set_num_sms(count)
        assert deep_gemm.get_num_sms() == count
        d = torch.empty_like(expected)
        multiply("nt", a, b, d)
        assert torch.equal(d, expected)
    assert passed == [1, 3, 20]


def test_num_sms_can_be_put_back():
    """SGLang's context manager restores num_sms, also without a GPU, which would give the limit."""
    before = deep_gemm.get_num_sms()
    deep_gemm.set_num_sms(13)
    deep_gemm.set_num_sms(before)
    assert deep_gemm.get_num_sms() == before


def test_num_sms_is_checked_against_the_gpu(monkeypatch):
    monkeypatch.setattr(deep_gemm._runtime, "_count_sms", lambda: 132)
    assert deep_gemm.get_num_sms() == 132
    for wrong in (0, -1, 133):
        with pytest.raises(ValueError, match=rf"set_num_sms: num_sms .* 132 SMs \(got {wrong}\)"):
            deep_gemm.set_num_sms(wrong)


def test_names_of_1_x(device, tensor_core):
    a, b, b_rows = by_token(20, 384, device), by_block(40, 384, device), by_token(40, 384, device)
    d = torch.empty(20, 40, dtype=torch.bfloat16, device=device)
    scale = deep_gemm.get_col_major_tma_aligned_tensor(a.scale)
    deep_gemm.gemm_fp8_fp8_bf16_nt((a.data, scale), b.quantized, d)
    assert_within_bound(d, a, b, tensor_core=tensor_core)
    out = torch.ones(20, 40, device=device)
    for a_scale in (a.scale, a.scale.t().contiguous()):
        total = out.clone()
        deep_gemm.wgrad_gemm_fp8_fp8_fp32_nt(
            (a.data, a_scale), (b_rows.data, b_rows.scale.t()), total
        )
        assert_within_bound(total, a, b_rows, tensor_core=tensor_core, old=out)


# ---- layouts ----


def test_scales_that_are_m_major_are_read_in_place(device, monkeypatch):
    seen = []
    monkeypatch.setattr(gemm.ops, "fp8_gemm_nt", lambda *args, **kw: seen.append(args))
    a, b = by_token(37, 256, device), by_block(40, 256, device)
    b_rows = by_token(40, 256, device)
    d = torch.empty(37, 40, device=device)
    a_scale = deep_gemm.get_mn_major_tma_aligned_tensor(a.scale)
    b_scale = deep_gemm.get_mn_major_tma_aligned_tensor(b_rows.scale)
    deep_gemm.fp8_gemm_nt((a.data, a_scale), b.quantized, d)
    deep_gemm.fp8_gemm_nt((a.data, a_scale), (b_rows.data, b_scale), d, recipe=(1, 1, 128))
    for args, expected in zip(seen, (b.scale, b_scale), strict=True):
        assert args[1] is a_scale and args[3] is expected


@pytest.mark.parametrize("m", [1, 4, 37])
def test_scales_of_any_strides(m, device, copies):
    k = 300
    a, b = by_token(m, k, device), by_block(200, k, device)
    expected = torch.empty(m, 200, device=device)
    multiply("nt", a, b, expected)
    wide = torch.full((m + 3, 9), torch.nan, device=device)
    views = [wide[3:, 1:7:2], wide[3:, 2:5], wide.t().contiguous().t()[1 : m + 1, :3]]
    for view in (*views, a.scale.t().contiguous().t()):
        view.copy_(a.scale)
        d = torch.empty_like(expected)
        deep_gemm.fp8_gemm_nt((a.data, view), (b.data, b.scale.t().contiguous().t()), d)
        assert torch.equal(d, expected)


def test_operands_that_tma_can_read_are_not_copied(device, tensor_core, copies):
    k, d = 200, torch.empty(20, 40, device=device)
    x, w = torch.randn(20, k, device=device), torch.randn(40, k, device=device)
    a = Operand.of(*torchext.ops.quantize_1x128(x), 1)
    b = Operand.of(*torchext.ops.quantize_128x128(w), 128)
    a_pair, b_pair = a.quantized, b.quantized
    a_turned, b_turned = ((data.t(), scale.t()) for data, scale in (a_pair, b_pair))
    for layout, first, second in (
        ("nt", a_pair, b_pair), ("nn", a_pair, b_turned), ("tn", a_turned, b_turned),
        ("tt", a_turned, b_pair),
    ):  # fmt: skip
        getattr(deep_gemm, f"fp8_gemm_{layout}")(first, second, d)
        assert_within_bound(d, a, b, tensor_core=tensor_core)
    assert not copies


def test_data_that_start_off_a_16_byte_boundary_are_copied(device, copies):
    a, b = by_token(20, 256, device), by_block(40, 256, device)
    expected, d = (torch.empty(20, 40, device=device) for _ in range(2))
    multiply("nt", a, b, expected)
    assert not copies
    wide = torch.zeros(20, 272, dtype=torch.uint8, device=device)
    wide[:, 8:264] = a.data.view(torch.uint8)
    shifted = wide.view(torch.float8_e4m3fn)[:, 8:264]
    deep_gemm.fp8_gemm_nt((shifted, a.scale), b.quantized, d)
    assert torch.equal(d, expected) and copies == {("fp8_gemm_nt", "a")}


def test_copies_warn_once(device, monkeypatch):
    monkeypatch.setattr(_operands, "_warned", set())
    a, b = by_token(20, 200, device), by_block(40, 256, device)
    d = torch.empty(20, 40, device=device)
    cut = Operand.of(b.data[:, :200], b.scale, 128)  # a row pitch of 256 bytes
    with pytest.warns(UserWarning, match="fp8_gemm_nt: a is copied .* multiples of 16 bytes") as w:
        deep_gemm.fp8_gemm_nt(a.quantized, cut.quantized, d)
    assert [str(warning.filename) for warning in w] == [__file__]
    with pytest.warns(UserWarning, match="fp8_gemm_nn: b is copied .* not K-major"):
        multiply("nn", by_token(20, 256, device), b, d)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deep_gemm.fp8_gemm_nt(a.quantized, cut.quantized, d)
        multiply("nn", by_token(20, 256, device), b, d)


# ---- errors ----


def pairs(m=20, n=40, k=256):
    device = torch.device("cpu")
    return stored(by_token(m, k, device), False), stored(by_block(n, k, device), False)


BF16 = torch.zeros(20, 256, dtype=torch.bfloat16)
A, B = pairs()
D = torch.empty(20, 40)
WRONG = [
    (TypeError, r"a must be a pair \(data, scale\)", dict(a=A[0])),
    (TypeError, r"the data of a must be torch.float8_e4m3fn .* FP4", dict(a=(BF16, A[1]))),
    (TypeError, r"the scale of b must be torch.float32 \(got torch.int32\)",
     dict(b=(B[0], torch.zeros(1, 1, dtype=torch.int32)), recipe=(1, 128, 128))),
    (TypeError, r"the scale of a must be torch.float32, or torch.int32 .*float64",
     dict(a=(A[0], A[1].double()))),
    (ValueError, r"the data and the scale of a must have 2 dimensions",
     dict(a=(A[0][None], A[1][None]))),
    (ValueError, r"scale of a, of 1x128 elements each, must have shape \[20, 2\] \(got \[20, 1\]\)",
     dict(a=(A[0], A[1][:, :1]))),
    (ValueError, r"scale of b, of 128x128 .* shape \[1, 2\] .*pass recipe=\(1, 1, 128\)",
     dict(b=(B[0], torch.ones(40, 2)))),
    (ValueError, r"scale of b, of 1x128 elements each, must have shape \[40, 2\]",
     dict(recipe=(1, 1, 128))),
    (ValueError, r"recipe must be \(1, 128, 128\) or .*got \(1, 1, 32\)", dict(recipe=(1, 1, 32))),
    (ValueError, r"recipe must be .*got \(1, 128, 128, 32\)",
     dict(recipe_a=(1, 128), recipe_b=(128, 32))),
    (ValueError, r"either recipe, or recipe_a and recipe_b", dict(recipe_a=(1, 128))),
    (ValueError, r"either recipe, or recipe_a and recipe_b",
     dict(recipe=(1, 128, 128), recipe_a=(1, 128), recipe_b=(128, 128))),
    (ValueError, r"alpha must be None", dict(alpha=2.0)),
    (ValueError, r"a and b must agree in K.*d \[20, 41\]", dict(d=torch.empty(20, 41))),
    (ValueError, r"a and b must agree in K.*b \[N, K\] = \[40, 128\]", dict(b=pairs(k=128)[1])),
    (ValueError, r"c must have d's shape and dtype.*torch.bfloat16", dict(c=D.bfloat16())),
    (ValueError, r"c must have d's shape and dtype", dict(c=D[:1])),
    (ValueError, r"contiguous rows", dict(d=torch.empty(40, 20).t())),
    (TypeError, r"out must be bfloat16", dict(d=D.double())),
    (RuntimeError, r"must not require a gradient", dict(d=D.clone().requires_grad_())),
]  # fmt: skip


@pytest.mark.parametrize("error, message, arguments", WRONG)
def test_errors_say_what_was_expected(error, message, arguments):
    with pytest.raises(error, match=rf"(?s)^fp8_gemm_nt: .*{message}"):
        deep_gemm.fp8_gemm_nt(**{"a": A, "b": B, "d": D, **arguments})


@pytest.mark.parametrize("layout", DENSE)
def test_errors_name_the_function(layout):
    with pytest.raises(ValueError, match=f"^fp8_gemm_{layout}: alpha"):
        multiply(layout, by_token(3, 128, "cpu"), by_block(5, 128, "cpu"), D, alpha=0.5)


# ---- torch.compile ----


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend, device, copies):
    """Casts, transposed scales, copied operands and a limit on SMs compile to one graph."""

    def step(x, w, d):
        a = deep_gemm.per_token_cast_to_fp8(x, use_ue8m0=False)
        b = deep_gemm.per_block_cast_to_fp8(w, use_ue8m0=True)
        deep_gemm.fp8_gemm_nt(a, b, d)
        a_t = deep_gemm.per_channel_cast_to_fp8(x.t(), use_ue8m0=True)
        scale = deep_gemm.get_mn_major_tma_aligned_tensor(a[1])
        deep_gemm.fp8_gemm_nn((a[0], scale), (b[0].t().contiguous(), b[1].t()), d, c=d)
        deep_gemm.fp8_gemm_tt((a_t[0], a_t[1]), b, d, c=d, recipe=(1, 128, 128))
        return d.sum(), deep_gemm.cast_back_from_fp8(*a)

    x, w = torch.randn(40, 384, device=device), torch.randn(24, 384, device=device)
    d = torch.empty(40, 24, device=device)
    expected = d.clone()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for count in (0, 3, 5):
        if count:
            deep_gemm.set_num_sms(count)
        total, back = compiled(x, w, d)
        eager_total, eager_back = step(x, w, expected)
        assert torch.equal(d, expected) and torch.equal(back, eager_back)
        torch.testing.assert_close(total, eager_total)
    assert copies
