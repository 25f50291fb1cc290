"""Peers that need a GPU: a stand-in for DeepGEMM computes from exactly the arguments it gets."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import GROUPED, Case
from benchmarks.contenders import deepgemm
from benchmarks.contenders.plain_fp8 import dequantize, round_up
from benchmarks.problems import GroupedProblem


def columns_aligned(scale: Tensor) -> None:
    """Scales [..., rows, groups] are M-major with columns 16-byte aligned, so no copy is needed."""
    assert scale.stride(-2) == 1 and scale.stride(-1) == round_up(scale.shape[-2], 4)


def spread(pair: tuple[Tensor, Tensor]) -> Tensor:
    return dequantize(*pair)


@pytest.fixture
def deep_gemm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What DeepGEMM 2.6 computes on Hopper, in the layouts that its functions document."""
    module: Any = ModuleType("deep_gemm")

    def contiguous(a, b, d, row_groups, *, disable_ue8m0_cast):
        assert disable_ue8m0_cast and d.dtype == torch.bfloat16 and row_groups.dtype == torch.int32
        columns_aligned(a[1])
        for g, (data, scale) in enumerate(zip(*b, strict=True)):
            rows = row_groups == g
            assert rows.sum() % 128 == 0
            d[rows] = (spread(a)[rows] @ spread((data, scale)).t()).to(d.dtype)

    def masked(a, b, d, counts, expected_m, *, disable_ue8m0_cast):
        assert disable_ue8m0_cast and expected_m > 0 and d.shape[:2] == a[0].shape[:2]
        columns_aligned(a[1])
        for g, count in enumerate(counts.tolist()):
            left, right = spread((a[0][g], a[1][g])), spread((b[0][g], b[1][g]))
            d[g, :count] = (left[:count] @ right.t()).to(d.dtype)

    def along_k(a, b, d, lengths, counts, *, c):
        assert c is d and counts.tolist() == lengths and all(n % 128 == 0 for n in lengths)
        first = 0
        for g, length in enumerate(lengths):
            parts = []
            for (data, scale), rows in zip((a, b), d.shape[1:], strict=True):
                columns_aligned(scale)
                own = data[first * rows : (first + length) * rows].view(rows, length)
                own_scale = scale[:, first // 128 : (first + length) // 128]
                parts.append(spread((own, own_scale)))
            d[g] += parts[0] @ parts[1].t()
            first += length

    module.m_grouped_fp8_gemm_nt_contiguous = contiguous
    module.m_grouped_fp8_gemm_nt_masked = masked
    module.k_grouped_fp8_gemm_nt_contiguous = along_k
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    return module


@pytest.mark.parametrize("op", GROUPED)
def test_deepgemm_is_handed_groups_in_its_own_layouts(deep_gemm, op):
    problem = GroupedProblem(Case("grouped", op, "given", "", (3, 256, 128, 384)), "cpu")
    run = deepgemm.grouped(problem)
    for _ in range(2):
        if run.before:
            run.before()
        assert run.check(run.call())["relative"] < 5e-3
