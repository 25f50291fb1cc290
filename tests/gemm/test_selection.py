"""The choice of a Hopper kernel: what explain_gemm reports, and that no choice changes results."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import torchext
from support.gemm_testing import (
    E4M3,
    E5M2,
    TENSOR_CORES,
    assert_within_bound,
    check,
    operands,
)
from torchext import gemm_selection as selection
from torchext import ops

sim = pytest.importorskip("torchext.sim")


@pytest.mark.parametrize("m", [1, 16, 64, 128, 512, 4096])
def test_the_chosen_is_the_cheapest(m):
    explanation = torchext.explain_gemm(m, 7168, 2304)
    cycles = [candidate.cycles for candidate in explanation.candidates]
    assert cycles == sorted(cycles)
    assert explanation.chosen == explanation.candidates[0]
    assert explanation.source == "cost model"
    assert f"chosen by: {explanation.source}" in str(explanation)
    assert len(str(explanation).splitlines()) == len(cycles) + 2


@pytest.mark.parametrize(
    "sizes, options, why",
    [
        ((512, 768, 1024), {}, r"swap_64x64 has 96 tiles, 1 wave of 132 SMs, bound by loads "
         r"through L2 \(377 cycles per K block\); "
         r"swap_32x128, the next, takes 4.8% more cycles"),
        ((4096, 4096, 7168), {}, r"256x128 in pairs has 512 tiles, 4 waves of 132 SMs, bound by "
         r"shared memory \(1152 .*; 128x256 in pairs, the next, takes as many cycles"),
        ((16, 4096, 7168), {"memory_gigabytes_per_second": 4917},
         r"swap_16x64 with split_k=2 .*bound by instruction issue"),
        ((16, 4096, 7168), {"memory_gigabytes_per_second": 3350},
         r"bound by the bytes that memory must move"),
        ((8, 2112, 7168), {"num_sms": 20}, "of 20 SMs"),
    ],
)  # fmt: skip
def test_the_last_line_says_why(sizes, options, why):
    explanation = torchext.explain_gemm(*sizes, **options)
    last = str(explanation).splitlines()[-1]
    assert last == f"* chosen by: cost model: {explanation.why}"
    assert re.search(why, explanation.why), explanation.why


def test_few_tokens_swap_and_split_and_many_share_rows():
    decode = torchext.explain_gemm(8, 2112, 7168).chosen
    assert decode.name.startswith("swap_")
    assert decode.tile_m <= 32
    prefill = torchext.explain_gemm(8192, 7168, 16384).chosen
    assert prefill.tile_m * prefill.tile_n >= 128 * 128


def test_memory_waits_for_the_sums_of_wave_after_wave():
    """Eight CTAs for each part of K would be busy for less time, but in six waves instead of one.
    On an H200, such kernels took up to 1.9 times as long as those without a split."""
    explanation = torchext.explain_gemm(16, 5120, 25600, memory_gigabytes_per_second=H100)
    cycles = {(c.name, c.split_k): c.cycles for c in explanation.candidates}
    assert explanation.chosen.split_k == 1
    assert cycles["swap_16x64", 8] > 1.1 * cycles["swap_16x64", 1]


@pytest.mark.parametrize("num_sms", [1, 2, 3, 77, 131])
def test_no_more_sms_than_allowed(num_sms):
    for m in (8, 700):
        chosen = torchext.explain_gemm(m, 4096, 7168, num_sms=num_sms).chosen
        assert chosen.cluster <= num_sms


def test_the_parts_of_k_do_not_depend_on_num_sms():
    """The parts of K decide the order of sums, and so the bits."""
    whole = torchext.explain_gemm(8, 2112, 7168).chosen
    for num_sms in range(8, 132, 20):
        assert torchext.explain_gemm(8, 2112, 7168, num_sms=num_sms).chosen.split_k == whole.split_k


H100, H200 = 3350, 4917  # GB/s of memory, rated


def test_the_memory_of_the_gpu_counts():
    """An H200 moves the same bytes in fewer cycles. The waste of a last, small wave of tiles counts
    only where memory does not bound the time, so the two choose differently."""
    few_rows = {
        memory: torchext.explain_gemm(1, 51200, 5120, memory_gigabytes_per_second=memory)
        for memory in (H100, H200)
    }
    least = {memory: answer.chosen.memory_cycles for memory, answer in few_rows.items()}
    launch = (H200 * least[H200] - H100 * least[H100]) / (H200 - H100)
    assert 0 < launch < least[H200] < least[H100]
    assert few_rows[H100].chosen != few_rows[H200].chosen
    assert torchext.explain_gemm(1, 51200, 5120) in few_rows.values() or torch.cuda.is_available()
    many = [
        torchext.explain_gemm(4096, 7168, 2304, memory_gigabytes_per_second=memory).chosen.name
        for memory in (H100, H200)
    ]
    assert many[0] == many[1]


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_a_simulated_gpu_has_its_own_memory(gpu):
    """The launcher asks the device: it takes the tile that explain_gemm gives for its memory."""
    m, n, k = 32, 20480, 512
    a, b = torch.zeros(m, k, dtype=E4M3), torch.zeros(n, k, dtype=E4M3)
    with sim.simulate(timing=gpu, timing_only=True) as simulation:
        ops.fp8_gemm_nt(a, torch.ones(k // 128, m).t(), b, torch.ones(n // 128, k // 128))
    chosen = {
        name: torchext.explain_gemm(m, n, k, memory_gigabytes_per_second=memory).chosen.name
        for name, memory in (("h100", H100), ("h200", H200))
    }
    assert chosen["h100"] != chosen["h200"]
    assert simulation.reports[0].kernel.endswith(f"_{chosen[gpu]}")


def test_k_grouped_products_are_not_swapped():
    explanation = torchext.explain_gemm(
        64, 64, 4096, granularity="1d1d", grouping="along_k", groups=4
    )
    assert not any(c.name.startswith("swap_") for c in explanation.candidates)


def test_granularity_in_the_words_of_a_recipe():
    for word, same in (("blockwise", "1d2d"), ("tensorwise", "rowwise")):
        explained = torchext.explain_gemm(64, 512, 512, granularity=word)
        assert explained == torchext.explain_gemm(64, 512, 512, granularity=same)


@pytest.mark.parametrize(
    "arguments",
    [
        {"granularity": "2d2d"},
        {"grouping": "columns"},
        {"a_dtype": torch.bfloat16},
        {"groups": 0},
        {"num_sms": 133},
        {"memory_gigabytes_per_second": 0},
        {"expected_m": -1},
    ],
)
def test_explain_refuses(arguments):
    with pytest.raises(ValueError, match="explain_gemm: "):
        torchext.explain_gemm(16, 16, 16, **arguments)


def test_forced_is_used_and_undone():
    with selection.forced("64x256"):
        assert torchext.explain_gemm(8, 2112, 7040).chosen.name == "64x256"
        assert torchext.explain_gemm(8, 2112, 7040).source == "forced"
        assert torchext.explain_gemm(8, 2112, 7040).why.startswith("64x256 was asked for; the mod")
    assert torchext.explain_gemm(8, 2112, 7040).source == "cost model"


@pytest.mark.parametrize(
    ("name", "options"),
    [("128x100", {}), ("128x128", {"split_k": 2}), ("swap_16x64", {"cluster": 2})],
)
def test_forced_refuses_what_there_is_not(name, options):
    a, b = operands("1d2d", 20, 30, 200, torch.device("cpu"))
    refused = pytest.raises(ValueError, match="no kernel")
    with sim.simulate(), selection.forced(name, **options), refused:
        ops.fp8_gemm_nt(a.data, a.scale, b.data, b.scale)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_tma_adds_to_fp32_outputs(out_dtype):
    """TMA adds in L2, so no thread loads the old output. Sums in BF16 are still made by threads."""
    a, b = operands("1d1d", 150, 200, 300, torch.device("cpu"))
    out = torch.randn(150, 200).to(out_dtype)
    with sim.simulate(num_sms=3) as simulation, selection.forced("128x128"):
        check(a, b, TENSOR_CORES["sm90"], out=out, accumulate=True)
    executed = simulation.reports[-1].instructions
    reduces = sum(count for op, count in executed.items() if op.startswith("cp.reduce.async.bulk"))
    assert bool(reduces) == (out_dtype == torch.float32)


def variants(granularity, dtypes):
    for name in selection.configurations(granularity, *dtypes):
        swapped = name.startswith("swap_")
        for cluster in (1, 2, 4, 8) if swapped else (1, 2):
            yield name, {"split_k": cluster} if swapped else {"cluster": cluster}


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["1d2d", "1d1d", "rowwise"])
@pytest.mark.parametrize("dtypes", [(E4M3, E4M3), (E5M2, E4M3)])
def test_every_tile_gives_the_same_bits(granularity, dtypes):
    """Tiles that split K into the same number of parts give the same bits, with odd numbers of SMs,
    tiles and columns, a bias and a ragged K."""
    a, b = operands(granularity, 147, 330, 1100, torch.device("cpu"), dtypes=dtypes)
    bias = torch.randn(330)
    first: dict[int, torch.Tensor] = {}
    for name, options in variants(granularity, dtypes):
        with sim.simulate(num_sms=9, completion="random"), selection.forced(name, **options):
            result = ops.fp8_gemm_nt(*a.quantized, *b.quantized, bias=bias)
        expected = first.setdefault(options.get("split_k", 1), result)
        assert torch.equal(result, expected), (name, options)
    for result in first.values():
        assert_within_bound(result, a, b, tensor_core=TENSOR_CORES["sm90"], bias=bias)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_every_tile_stores_any_rows(out_dtype, accumulate):
    """out is aligned for TMA or not; memory beside it is not written."""
    a, b = operands("1d2d", 70, 204, 300, torch.device("cpu"))
    for name, options in variants("1d2d", (E4M3, E4M3)):
        for before in (0, 3, 8):
            wide = torch.randn(70, before + 204 + 12).to(out_dtype)
            old = wide.clone()
            out = wide[:, before : before + 204]
            with sim.simulate(num_sms=9, seed=before), selection.forced(name, **options):
                check(a, b, TENSOR_CORES["sm90"], out=out, accumulate=accumulate)
            assert torch.equal(wide[:, :before], old[:, :before])
            assert torch.equal(wide[:, before + 204 :], old[:, before + 204 :])


GROUPS = torch.tensor([70, 70, 333, 401], dtype=torch.int32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["offsets", "group_ids", "masked"])
def test_every_tile_computes_groups(kind):
    """Groups of any length, one of them empty; rows of no group are not written. Tiles that split K
    into the same number of parts give the same bits, and the CPU the same up to rounding."""
    m, n, k = 420, 204, 300
    x, w = torch.randn(m, k), torch.randn(4, n, k)
    a, b = ops.quantize_1x128(x), ops.quantize_128x128(w)
    if kind == "masked":
        data, scale = (t.view(4, m // 4, -1) for t in a)
        a = data, scale
        counts = torch.tensor([105, 0, 33, 70], dtype=torch.int32)
        used = (torch.arange(m // 4) < counts[:, None]).flatten()
    else:
        ids = torch.bucketize(torch.arange(m), GROUPS, right=True).to(torch.int32)
        ids[ids == 4] = -1
        used = ids >= 0

    def run():
        out = torch.full((m, n), torch.nan, dtype=torch.bfloat16)
        if kind == "masked":
            ops.m_grouped_fp8_gemm_nt_masked(*a, *b, counts, out=out.view(4, m // 4, n))
        else:
            by: dict[str, Any] = {"offsets": GROUPS} if kind == "offsets" else {"group_ids": ids}
            ops.m_grouped_fp8_gemm_nt_contiguous(*a, *b, **by, out=out)
        assert out[~used].isnan().all()
        return out[used]

    on_cpu = run().double()
    first: dict[int, torch.Tensor] = {}
    for name, options in variants("1d2d", (E4M3, E4M3)):
        with sim.simulate(num_sms=9, completion="random"), selection.forced(name, **options):
            result = run()
        expected = first.setdefault(options.get("split_k", 1), result)
        assert torch.equal(result, expected), (name, options)
        error = (result.double() - on_cpu).abs()
        assert (error <= on_cpu.abs().amax(1, keepdim=True) / 64).all()


def test_every_tile_sums_groups_along_k():
    a, b = (ops.quantize_1x128(torch.randn(rows, 700)) for rows in (140, 204))
    ends = torch.tensor([130, 130, 500, 700], dtype=torch.int32)
    on_cpu = ops.k_grouped_fp8_gemm_nt(*a, *b, ends, out_dtype=torch.float32)
    first = None
    for name, options in variants("1d1d", (E4M3, E4M3)):
        if name.startswith("swap_"):
            continue
        with sim.simulate(num_sms=5, completion="random"), selection.forced(name, **options):
            result = ops.k_grouped_fp8_gemm_nt(*a, *b, ends, out_dtype=torch.float32)
        first = result if first is None else first
        assert torch.equal(result, first), (name, options)
        assert (result - on_cpu).abs().max() <= 1e-3 * on_cpu.abs().max()
