"""The table of cases, and their selection on the command line."""

import pytest

from benchmarks.cases import SUITES, Case, cuda_cases, select

DEEPSEEK = {
    (2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048),
}  # fmt: skip


def test_deepseek_shapes_from_one_row_to_8192():
    fprop = [c for c in cuda_cases() if c.op == "fprop" and c.model == "deepseek-v3"]
    assert {c.shape[1:] for c in fprop} == DEEPSEEK
    for layer in DEEPSEEK:
        rows = {c.shape[0] for c in fprop if c.shape[1:] == layer}
        assert {1, 64, 4096, 8192} <= rows


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_distinct_and_the_important_ones_come_first(device):
    cases = select(device, SUITES)
    assert len({case.name for case in cases}) == len(cases)
    assert [case.priority for case in cases] == sorted(case.priority for case in cases)
    assert {case.suite for case in cases} == set(SUITES)
    quick = select(device, SUITES, quick=True)
    assert quick == [case for case in cases if case.priority == 0]


def test_selection_by_suite_model_and_shape():
    assert {c.suite for c in select("cuda", ["gemm"])} == {"gemm"}
    assert {c.model for c in select("cuda", SUITES, ["qwen3-32b"])} == {"qwen3-32b"}
    given = select("cpu", SUITES, ["3x5x7", "3x5x7"], quick=True)
    assert {c.shape for c in given if c.suite in ("gemm", "linear")} == {(3, 5, 7)}
    assert {c.shape for c in given if c.suite == "grouped"} == {(2, 3, 5, 7)}
    assert {c.shape for c in given if c.suite == "quantize"} == {(3, 7)}
    assert len(given) == len(set(given))


@pytest.mark.parametrize("shape", ["gpt-5", "3x4", "3x4x", "axbxc"])
def test_unknown_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"--shapes must be MxNxK or, on cuda, one of .* \(got"):
        select("cuda", SUITES, [shape])


def test_cases_survive_the_trip_to_a_worker():
    case = next(case for case in cuda_cases() if case.energy)
    assert Case.from_dict(case.as_dict()) == case
