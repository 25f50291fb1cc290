"""The grouped GEMMs of torchext.compat.deep_gemm, with each group compared with float64.

Above 500 lines because each of DeepGEMM's groupings and names has its own call.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from support.deep_gemm_testing import by_block, by_token, matrix, stacked
from support.gemm_testing import Operand, assert_within_bound
from torchext import ops
from torchext.compat import deep_gemm
from torchext.compat.deep_gemm import grouped

KEPT = 7.0  # the content of d before a call


def weights(groups, n, k, device, recipe=None):
    make = by_token if recipe == (1, 1, 128) else by_block
    return [make(n, k, device) for _ in range(groups)]


def ids_of(lengths, alignment, device):
    """DeepGEMM's m_indices: groups padded to a multiple of `alignment` with rows of id -1."""
    ids = []
    for group, length in enumerate(lengths):
        ids += [group] * length + [-1] * (-length % alignment)
    return torch.tensor(ids, dtype=torch.int32, device=device)


def assert_groups(d, a, bs, ids, tensor_core, without_group=0.0):
    """Each row of d is its row of `a` times its group's b; other rows equal `without_group`."""
    ids = ids.cpu()
    for group, b in enumerate(bs):
        rows = (ids == group).nonzero().flatten()
        assert_within_bound(d.cpu()[rows], a.rows(rows), b, tensor_core=tensor_core)
    assert (d.cpu()[ids < 0] == without_group).all()


def turned(pair):
    """[G, N, K] -> [G, K, N], contiguous, with its scale: b as nn takes it."""
    return tuple(x.mT.contiguous() for x in pair)


# ---- groups of rows ----

LENGTHS = {
    "as DeepGEMM pads them": ([100, 128, 5], 128),
    "ragged, straddling tiles": ([70, 3, 130], 1),
    "some empty": ([0, 37, 0, 0, 20, 0], 1),
    "padded to 16": ([5, 0, 33], 16),
    "padding only": ([0, 0], 128),
}


@pytest.mark.parametrize("recipe", [None, (1, 1, 128)], ids=str)
@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("layout", ["nt", "nn"])
def test_contiguous(layout, case, recipe, device, tensor_core, copies):
    lengths, alignment = LENGTHS[case]
    ids = ids_of(lengths, alignment, device)
    n, k = 40, 200
    a, bs = by_token(len(ids), k, device), weights(len(lengths), n, k, device, recipe)
    b = stacked(bs)
    function = getattr(deep_gemm, f"m_grouped_fp8_gemm_{layout}_contiguous")
    d = torch.full((len(ids), n), KEPT, dtype=torch.bfloat16, device=device)
    function(a.quantized, b if layout == "nt" else turned(b), d, ids, recipe=recipe)
    assert_groups(d, a, bs, ids, tensor_core)


@pytest.mark.parametrize("n", [16, 768])
def test_contiguous_in_any_order(n, device, tensor_core):
    """Rows of a group need not be neighbors, and rows of id -1 may lie between them."""
    a, bs = by_token(90, 128, device), weights(3, n, 128, device)
    ids = torch.randint(-1, 3, (90,), dtype=torch.int32, device=device)
    d = torch.full((90, n), KEPT, device=device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a.quantized, stacked(bs), d, m_indices=ids)
    assert_groups(d, a, bs, ids, tensor_core)


@pytest.mark.parametrize("alignment", [1, 16, 128])
@pytest.mark.parametrize("lengths", [[100, 128, 5], [0, 37, 0, 0, 20, 0], [0, 0]], ids=str)
def test_contiguous_by_ends_of_groups(lengths, alignment, device, tensor_core, copies):
    """use_psum_layout: groups begin at multiples of the alignment. Rows after the last group belong
    to no group; unlike rows between groups, they are not written."""
    deep_gemm.set_mk_alignment_for_contiguous_layout(alignment)
    ids = ids_of([*lengths, 0], alignment, device)
    padded, ids = len(ids), torch.cat((ids, ids.new_full((9,), -1)))
    stops, end = [], 0
    for length in lengths:
        end = deep_gemm.align(end, alignment) + length
        stops.append(end)
    ends = torch.tensor(stops, dtype=torch.int32, device=device)
    found, padding = deep_gemm.utils.layout.rows_of_groups(ends, len(ids))
    assert torch.equal(found, ids)
    assert torch.equal(padding[:padded], ids[:padded] < 0) and not padding[padded:].any()
    a, bs = by_token(len(ids), 200, device), weights(len(lengths), 40, 200, device)
    d = torch.full((len(ids), 40), KEPT, device=device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        a.quantized, stacked(bs), d, ends, use_psum_layout=True, expected_m_for_psum_layout=64
    )
    assert (d[padded:] == KEPT).all()
    d[padded:] = 0
    assert_groups(d, a, bs, ids, tensor_core)


def poisoned(a, ids):
    """`a` padded with torch.empty: NaN in the data and scales of rows of no group."""
    data, scale = (x.clone() for x in a.quantized)
    data.view(torch.uint8)[ids < 0] = 0x7F
    scale[ids < 0] = torch.nan
    return data, scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lengths", [[100, 0, 5], [0, 0, 0], [128, 1, 127]], ids=str)
@pytest.mark.parametrize("layout", ["nt", "nn", "ends"])
def test_padding_becomes_zero(layout, lengths, dtype, device, tensor_core, copies):
    """DeepGEMM multiplies whole blocks of rows, so that zero padding gives zeros. It also stores
    zeros for blocks that are all padding."""
    ids = ids_of(lengths, 128, device)
    padded = len(ids)
    if layout != "ends":
        ids = torch.cat((ids, ids.new_full((200,), -1)))  # whole blocks of padding
    a, bs = by_token(len(ids), 200, device), weights(3, 40, 200, device)
    b = turned(stacked(bs)) if layout == "nn" else stacked(bs)
    d = torch.full((len(ids), 44), torch.nan, dtype=dtype, device=device)[:, :40]
    function = getattr(deep_gemm, f"m_grouped_fp8_gemm_{layout.replace('ends', 'nt')}_contiguous")
    if layout == "ends":
        stops, end = [], 0
        for length in lengths:
            end = deep_gemm.align(end, 128) + length
            stops.append(end)
        ends = torch.tensor(stops, dtype=torch.int32, device=device)
        function(poisoned(a, ids), b, d, ends, use_psum_layout=True)
    else:
        function(poisoned(a, ids), b, d, ids)
    assert padded == len(ids) or layout != "ends"
    assert_groups(d, a, bs, ids, tensor_core)


def test_wgrad_over_padding_is_finite(device, tensor_core, copies):
    """A training step puts experts' outputs into torch.empty and runs wgrad over padded rows."""
    lengths, n, k = [100, 0, 28], 40, 256
    ids = ids_of(lengths, 128, device)
    a, bs = by_token(len(ids), k, device), weights(3, n, k, device)
    y = torch.full((len(ids), n), torch.nan, dtype=torch.bfloat16, device=device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(poisoned(a, ids), stacked(bs), y, ids)
    ks = [128, 0, 128]
    x = torch.randn(len(ids), 24, device=device)
    d = torch.full((3, n, 24), torch.nan, device=device)
    deep_gemm.k_grouped_fp8_gemm_tn_contiguous(
        deep_gemm.per_channel_cast_to_fp8(y, False), deep_gemm.per_channel_cast_to_fp8(x, False),
        d, ks, torch.tensor(ks, dtype=torch.int32, device=device),
    )  # fmt: skip
    for group, rows in enumerate((slice(0, 100), slice(0, 0), slice(128, 156))):
        expected = y[rows].float().T @ x[rows]
        assert (d[group] - expected).norm() <= 0.06 * expected.norm()


@pytest.mark.parametrize("use_psum_layout", [False, True])
@pytest.mark.parametrize("layout", ["nt", "nn"])
def test_contiguous_in_bf16(layout, use_psum_layout, device):
    lengths = [100, 0, 28]
    ids = ids_of(lengths, 128, device)
    a = torch.randn(len(ids), 64, device=device).bfloat16()
    b = torch.randn(3, 40, 64, device=device).bfloat16()
    expected = torch.zeros(len(ids), 40)
    for group in range(3):
        rows = (ids == group).cpu()
        expected[rows] = a.cpu()[rows].float() @ b[group].cpu().float().T
    a[ids < 0] = torch.nan
    shuffled = ids if use_psum_layout else ids[torch.randperm(len(ids))]
    order = torch.argsort(shuffled, stable=True)
    back = torch.argsort(ids, stable=True)
    source = torch.empty_like(a)
    source[order], wanted = a[back], torch.empty_like(expected)
    wanted[order.cpu()] = expected[back.cpu()]
    d = torch.full((len(ids), 40), torch.nan, dtype=torch.bfloat16, device=device)
    function = getattr(deep_gemm, f"m_grouped_bf16_gemm_{layout}_contiguous")
    ends = torch.tensor([100, 128, 156], dtype=torch.int32, device=device)
    function(
        source, b if layout == "nt" else b.mT.contiguous(), d,
        ends if use_psum_layout else shuffled, use_psum_layout=use_psum_layout,
    )  # fmt: skip
    torch.testing.assert_close(d.cpu(), wanted.bfloat16())


@pytest.mark.large
def test_deep_gemms_shapes(device, tensor_core):
    """DeepGEMM's smallest expert shapes, for two experts with few rows."""
    n, k = 4096, 2048
    ids = ids_of([3, 2], 4, device)
    a, bs = by_token(len(ids), k, device), weights(2, n, k, device)
    d = torch.full((len(ids), n), KEPT, dtype=torch.bfloat16, device=device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a.quantized, stacked(bs), d, ids)
    assert_groups(d, a, bs, ids, tensor_core)


# ---- masked groups ----


@pytest.mark.parametrize("counts", [[20, 0, 33], [0, 0, 0], [33, 33, 33], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("recipe", [None, (1, 1, 128)], ids=str)
def test_masked(recipe, counts, device, tensor_core, copies):
    groups, m, n, k = 3, 33, 40, 200
    a, bs = [by_token(m, k, device) for _ in range(groups)], weights(groups, n, k, device, recipe)
    masked_m = torch.tensor(counts, dtype=torch.int32, device=device)
    ids = torch.arange(m) < masked_m.cpu()[:, None]
    a_data, a_scale = stacked(a)
    # Row-major; M-major in each group, as in DeepGEMM; M-major over all groups, as in torchext
    scales = [a_scale, deep_gemm.get_mn_major_tma_aligned_tensor(a_scale)]
    folded = deep_gemm.get_mn_major_tma_aligned_tensor(a_scale.reshape(groups * m, -1))
    scales.append(folded.unflatten(0, (groups, m)))
    results = []
    for scale in scales:
        d = torch.full((groups, m, n), KEPT, dtype=torch.bfloat16, device=device)
        deep_gemm.m_grouped_fp8_gemm_nt_masked(
            (a_data, scale), stacked(bs), d, masked_m, expected_m=16, recipe=recipe
        )
        results.append(d)
        for group in range(groups):
            group_ids = torch.where(ids[group], 0, -1)
            assert_groups(d[group], a[group], [bs[group]], group_ids, tensor_core, KEPT)
    assert all(torch.equal(results[0], other) for other in results)


def test_scales_over_all_groups_are_read_in_place(device, monkeypatch):
    seen = []
    monkeypatch.setattr(
        grouped.ops, "m_grouped_fp8_gemm_nt_masked", lambda *args, **kw: seen.append(args)
    )
    a_data, a_scale = ops.quantize_1x128(torch.randn(3, 33, 256, device=device))
    b = stacked(weights(3, 40, 256, device))
    d, counts = torch.empty(3, 33, 40, device=device), torch.zeros(3, dtype=torch.int32)
    deep_gemm.fp8_m_grouped_gemm_nt_masked((a_data, a_scale), b, d, counts.to(device), 8)
    assert seen[0][1] is a_scale and seen[0][3] is b[1]


# ---- groups of K ----


def k_grouped(layout, rows, ks, device):
    """For each group, operands [rows, k] with 1x128 scales; and the pair that the op takes."""
    operands, data, scales = [], [], []
    for k in ks:
        padded = deep_gemm.align(k, 128)
        x = matrix(rows, k, device)
        full = torch.nn.functional.pad(x, (0, padded - k)).t().contiguous()
        data_t, scale = deep_gemm.per_channel_cast_to_fp8(full, use_ue8m0=False)
        operands.append(Operand.of(data_t[:k].t(), scale.t(), 1))
        data.append(data_t[:k].t().flatten() if layout == "nt" else data_t[:k])
        scales.append(scale)
    scale = torch.cat(scales)
    return operands, (torch.cat(data), scale.t() if layout == "nt" else scale)


@pytest.mark.parametrize("ks", [[128, 0, 256], [384], [100, 37, 0, 200, 16], [0, 0]], ids=str)
@pytest.mark.parametrize("layout", ["nt", "tn"])
def test_k_grouped(layout, ks, device, tensor_core, copies):
    m, n = 40, 72
    a, a_pair = k_grouped(layout, m, ks, device)
    b, b_pair = k_grouped(layout, n, ks, device)
    ks_tensor = torch.tensor(ks, dtype=torch.int32, device=device)
    function = getattr(deep_gemm, f"k_grouped_fp8_gemm_{layout}_contiguous")
    for dtype in (torch.float32, torch.bfloat16):
        c = (torch.randn(len(ks), m, n) * 32).to(dtype).to(device)
        accumulated, added, stored = c.clone(), torch.empty_like(c), torch.full_like(c, torch.nan)
        function(a_pair, b_pair, accumulated, ks, ks_tensor, accumulated)
        function(a_pair, b_pair, added, ks_cpu=tuple(ks), ks_tensor=ks_tensor, c=c)
        function(a_pair, b_pair, stored, ks, grouped_layout=ks_tensor)
        assert torch.equal(added, accumulated)
        for group in range(len(ks)):
            operands = a[group], b[group]
            assert_within_bound(
                accumulated[group], *operands, tensor_core=tensor_core, old=c[group]
            )
            assert_within_bound(stored[group], *operands, tensor_core=tensor_core)
    if layout == "nt" and all(k % 16 == 0 for k in ks):
        assert not copies


@pytest.mark.parametrize("ks", [[128, 512, 256], [512, 1024], [100, 700, 0, 16]], ids=str)
def test_k_grouped_by_packed_exponents(ks, device, copies):
    """Each group's exponents begin a new int32, even if the shape does not show it."""
    sizes = torch.tensor(ks, dtype=torch.int32, device=device)
    wide, packed = [], []
    for rows in (40, 24):
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for k in ks:
            x = torch.randn(deep_gemm.align(k, 128), rows, device=device)
            x[k:] = 0
            data, scale = deep_gemm.per_channel_cast_to_fp8(x * 2.0 ** len(parts), use_ue8m0=True)
            parts.append((data[:k], scale))
        data, scale = (torch.cat(x) for x in zip(*parts, strict=True))
        exponents = deep_gemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(
            scale, sizes, ks, 128, 128
        )
        assert exponents.shape == (sum(deep_gemm.ceil_div(k, 512) for k in ks), rows)
        wide.append((data, scale))
        packed.append((data, exponents))
    expected, d = (torch.full((len(ks), 40, 24), torch.nan, device=device) for _ in range(2))
    deep_gemm.k_grouped_fp8_gemm_tn_contiguous(*wide, expected, ks, sizes)
    deep_gemm.k_grouped_fp8_gemm_tn_contiguous(*packed, d, ks, sizes)
    assert torch.equal(d, expected) and d.isfinite().all()


def test_k_grouped_rows_that_broke_deep_gemm(device, tensor_core):
    """m = 768 with small groups, which has broken DeepGEMM."""
    ks = [128, 128]
    (a, a_pair), (b, b_pair) = (k_grouped("nt", rows, ks, device) for rows in (768, 16))
    d = torch.zeros(2, 768, 16, device=device)
    ks_tensor = torch.tensor(ks, dtype=torch.int32, device=device)
    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a_pair, b_pair, d, ks, ks_tensor, d)
    for group in range(2):
        assert_within_bound(d[group], a[group], b[group], tensor_core=tensor_core)


# ---- other names ----


def test_names_of_1_x(device, tensor_core):
    a, bs = by_token(30, 256, device), weights(3, 40, 256, device)
    ids = ids_of([20, 0, 10], 1, device)
    d = torch.full((30, 40), KEPT, dtype=torch.bfloat16, device=device)
    deep_gemm.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(a.quantized, stacked(bs), d, ids)
    assert_groups(d, a, bs, ids, tensor_core)
    counts = torch.tensor([10, 3, 0], dtype=torch.int32, device=device)
    d = torch.full((3, 10, 40), KEPT, dtype=torch.bfloat16, device=device)
    three = a.data.view(3, 10, 256), a.scale.view(3, 10, 2)
    deep_gemm.m_grouped_gemm_fp8_fp8_bf16_nt_masked(three, stacked(bs), d, counts, 5)
    ids = torch.where(torch.arange(10) < counts.cpu()[:, None], torch.arange(3)[:, None], -1)
    assert_groups(d.view(30, 40), a, bs, ids.flatten(), tensor_core, KEPT)
    ks, d = [128, 256], torch.ones(2, 40, 24, device=device)
    (a, (a_data, a_scale)), (b, (b_data, b_scale)) = (
        k_grouped("nt", rows, ks, device) for rows in (40, 24)
    )
    deep_gemm.k_grouped_wgrad_gemm_fp8_fp8_fp32_nt(
        (a_data, a_scale.t()), (b_data, b_scale.t()), d, ks
    )
    ones = torch.ones(40, 24)
    for group in range(2):
        assert_within_bound(d[group], a[group], b[group], tensor_core=tensor_core, old=ones)


# ---- settings, torch.compile ----


def _accumulate(call, d):
    return call(d, c=d)


def calls(device):
    """For each function: (a call that takes d, d's shape), with operands bound."""
    a, bs = by_token(150, 256, device), stacked(weights(3, 40, 256, device))
    ids = torch.randint(-1, 3, (150,), dtype=torch.int32, device=device)
    ends, counts = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in ([60, 130, 140], [50, 0, 20])
    )
    three, turned_bs = (a.data.view(3, 50, 256), a.scale.view(3, 50, 2)), turned(bs)
    nt, nn = deep_gemm.m_grouped_fp8_gemm_nt_contiguous, deep_gemm.m_grouped_fp8_gemm_nn_contiguous
    masked = deep_gemm.m_grouped_fp8_gemm_nt_masked
    found = [
        (lambda d: nt(a.quantized, bs, d, ids), (150, 40)),
        (lambda d: nn(a.quantized, turned_bs, d, m_indices=ids), (150, 40)),
        (lambda d: nt(a.quantized, bs, d, ends, use_psum_layout=True), (150, 40)),
        (lambda d: masked(three, bs, d, counts, 30), (3, 50, 40)),
    ]
    for layout, ks in (("nt", [128, 256]), ("tn", [128, 256]), ("tn", [100, 20])):
        function = getattr(deep_gemm, f"k_grouped_fp8_gemm_{layout}_contiguous")
        x, y = (k_grouped(layout, rows, ks, device)[1] for rows in (40, 24))
        sizes = torch.tensor(ks, dtype=torch.int32, device=device)
        call = functools.partial(function, x, y, ks=ks, grouped_layout=sizes)
        found.append((functools.partial(_accumulate, call), (2, 40, 24)))
    return found


@pytest.mark.parametrize("num_sms", [1, 3])
def test_num_sms(num_sms, device, copies, monkeypatch):
    def spy(op, passed):
        def call(*args, **kwargs):
            passed.append(kwargs["num_sms"])
            return op(*args, **kwargs)

        return call

    for call, shape in calls(device):
        expected, d = (torch.full(shape, KEPT, device=device) for _ in range(2))
        passed: list[int] = []
        call(expected)
        with monkeypatch.context() as patch:
            for name in ops.OPS:
                if "grouped" in name or name == "fp8_gemm_nt":
                    patch.setattr(grouped.ops, name, spy(getattr(ops, name), passed))
            deep_gemm.set_num_sms(num_sms)
            call(d)
        deep_gemm.set_num_sms(deep_gemm._runtime._count_sms())
        assert set(passed) == {num_sms}
        assert torch.equal(d, expected)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend, device, copies):
    """All functions compile to one graph."""
    found = calls(device)

    def step(outputs):
        for (call, _), d in zip(found, outputs, strict=True):
            call(d)

    expected, given = ([torch.full(x, KEPT, device=device) for _, x in found] for _ in range(2))
    step(expected)
    torch._dynamo.reset()
    torch.compile(step, fullgraph=True, backend=backend)(given)
    for d, reference in zip(given, expected, strict=True):
        assert torch.equal(d, reference)


# ---- errors ----

_A, _BS = by_token(20, 256, "cpu"), stacked(weights(3, 40, 256, "cpu"))
IDS, D = torch.zeros(20, dtype=torch.int32), torch.empty(20, 40)
CONTIGUOUS = dict(a=(_A.data, _A.scale), b=_BS, d=D, grouped_layout=IDS)
MASKED = dict(
    a=(_A.data.view(1, 20, 256).expand(3, -1, -1).contiguous(), torch.ones(3, 20, 2)), b=_BS,
    d=torch.empty(3, 20, 40), masked_m=IDS[:3], expected_m=5,
)  # fmt: skip
_, _X = k_grouped("nt", 20, [128, 128], "cpu")
_, _XT = k_grouped("tn", 20, [128, 128], "cpu")
SIZES = torch.tensor([128, 128], dtype=torch.int32)
K_NT = dict(a=_X, b=_X, d=torch.empty(2, 20, 20), ks=[128, 128], grouped_layout=SIZES)
K_TN = dict(K_NT, a=_XT, b=_XT)
BF16 = dict(
    a=torch.zeros(20, 64).bfloat16(), b=torch.zeros(3, 40, 64).bfloat16(),
    d=torch.zeros(20, 40).bfloat16(), grouped_layout=IDS,
)  # fmt: skip
WRONG: list[tuple[str, Any, list[tuple[type[Exception], str, dict[str, Any]]]]] = [
    ("m_grouped_fp8_gemm_nt_contiguous", CONTIGUOUS, [
        (TypeError, "grouped_layout must be torch.int32 .*int64", dict(grouped_layout=IDS.long())),
        (ValueError, r"grouped_layout must be contiguous of shape \[20\] .*\[3\]",
         dict(grouped_layout=IDS[:3])),
        (ValueError, r"grouped_layout must be contiguous of shape \[3\] .*\[20\]",
         dict(use_psum_layout=True)),
        (ValueError, r"d must be \[M, N\] .*\[20, 41\]", dict(d=torch.empty(20, 41))),
        (ValueError, r"data and the scale of b must have 3 dimensions",
         dict(b=(_BS[0][0], _BS[1][0]))),
        (ValueError, r"scale of b, of 128x128 .* shape \[3, 1, 2\]",
         dict(b=(_BS[0], torch.ones(3, 40, 2)))),
        (ValueError, "recipe must be", dict(recipe=(1, 1, 32))),
        (ValueError, "epilogue must be None .*'silu'", dict(epilogue="silu")),
        (TypeError, "data of b must be .*FP4 .* out of scope",
         dict(b=(_BS[0].view(torch.int8), _BS[1]))),
        (TypeError, "grouped_layout must be given once .*m_indices", dict(m_indices=IDS)),
    ]),
    ("m_grouped_fp8_gemm_nn_contiguous", CONTIGUOUS, [
        (ValueError, r"a and b must agree in K.*\[3, 256, 40\]", {}),
    ]),
    ("m_grouped_fp8_gemm_nt_masked", MASKED, [
        (TypeError, "masked_m must be torch.int32", dict(masked_m=IDS[:3].long())),
        (ValueError, r"masked_m must be contiguous of shape \[3\]", dict(masked_m=IDS)),
        (ValueError, r"d must be \[G, M, N\]", dict(d=torch.empty(3, 20, 41))),
        (ValueError, r"scale of a, of 1x128 .* shape \[3, 20, 2\]",
         dict(a=(MASKED["a"][0], torch.ones(3, 20, 1)))),
        (ValueError, "expected_m", dict(expected_m=-1)),
        (ValueError, "epilogue must be None", dict(epilogue="silu")),
    ]),
    ("k_grouped_fp8_gemm_nt_contiguous", K_NT, [
        (ValueError, "use_psum_layout and use_padded_sf_layout must be False",
         dict(use_psum_layout=True)),
        (ValueError, "use_psum_layout and use_padded_sf_layout must be False",
         dict(use_padded_sf_layout=True)),
        (ValueError, r"recipe must be \(1, 1, 128\)", dict(recipe=(1, 1, 32))),
        (TypeError, "ks must be a list of integers.*Tensor", dict(ks=SIZES)),
        (ValueError, r"d must be \[G, M, N\], with G = 1",
         dict(ks=[256], grouped_layout=SIZES[:1])),
        (ValueError, r"grouped_layout must be contiguous of shape \[2\]",
         dict(grouped_layout=SIZES[:1])),
        (ValueError, r"c must have d's shape and dtype", dict(c=torch.empty(2, 20, 21))),
        (ValueError, r"data of a must be contiguous, of 20 \* 384 elements", dict(ks=[128, 256])),
        (TypeError, "scale of a must be torch.float32 .*unpack_ue8m0_from_int",
         dict(a=(_X[0], _X[1].int()))),
        (ValueError, r"scale of a, of 1x128 .* shape \[20, 2\]", dict(a=(_X[0], _X[1].t()))),
        (TypeError, "ks must be given once", dict(ks_cpu=[128, 128])),
    ]),
    ("k_grouped_fp8_gemm_tn_contiguous", K_TN, [
        (ValueError, r"data of a must have shape \[384, 20\]", dict(ks=[128, 256])),
        (ValueError, "use_psum_layout", dict(use_psum_layout=True)),
        (ValueError, r"scale of a, of four UE8M0 exponents each, must have shape \[20, 2\]",
         dict(a=(_XT[0], torch.zeros(1, 20, dtype=torch.int32)))),
    ]),
    ("m_grouped_bf16_gemm_nt_contiguous", BF16, [
        (TypeError, "a must be torch.bfloat16 .*float32", dict(a=BF16["a"].float())),
        (ValueError, "b must have 3 dimensions", dict(b=BF16["b"][0])),
        (ValueError, "a and b must agree in K", dict(b=BF16["b"][:, :, 1:])),
        (TypeError, "grouped_layout must be torch.int32", dict(grouped_layout=IDS.long())),
    ]),
]  # fmt: skip
CASES = [(name, rest, *case) for name, rest, cases in WRONG for case in cases]


@pytest.mark.parametrize("name, arguments, error, message, wrong", CASES)
def test_errors_say_what_was_expected(name, arguments, error, message, wrong):
    with pytest.raises(error, match=rf"(?s)^{name}: .*{message}"):
        getattr(deep_gemm, name)(**{**arguments, **wrong})


def test_ids_out_of_range_are_refused_on_the_cpu():
    with pytest.raises(ValueError, match="group_ids"):
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(**{**CONTIGUOUS, "grouped_layout": IDS + 3})
