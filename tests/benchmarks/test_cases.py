"""The table of cases, and their selection on the command line."""

import json

import pytest

from benchmarks.cases import SUITES, Case, cpu_cases, cuda_cases, goal_cases, select

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
    assert {case.suite for case in cases} == {
        suite for suite in SUITES if device == "cpu" or suite != "training"
    }
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
    for case in (
        next(case for case in cuda_cases() if case.energy),
        next(case for case in cpu_cases() if case.threads and case.peers),
    ):
        assert Case.from_dict(json.loads(json.dumps(case.as_dict()))) == case


def test_results_of_versions_without_threads_dtypes_and_peers_can_be_read():
    case = cuda_cases()[0]
    new = ("threads", "dtype", "peers")
    assert Case.from_dict({k: v for k, v in case.as_dict().items() if k not in new}) == case


def test_a_case_that_names_its_peers_has_no_others():
    open_to_all, listed = Case("gemm", "fprop", "", "", (1, 1, 1)), cpu_cases()[0]
    assert listed.peers == ("copy",)
    assert [listed.has(name) for name in ("torchext", "copy", "plain")] == [True, True, False]
    assert [open_to_all.has(name) for name in ("torchext", "copy", "plain")] == [True, False, True]


def test_a_cpus_goals_are_measured_on_all_threads_and_on_one():
    shapes: dict[int, set] = {0: set(), 1: set()}
    for case in goal_cases():
        shapes[0].add((case.op, case.dtype, case.shape))
    for case in cpu_cases():
        if case.threads == 1 and not case.host:
            shapes[1].add((case.op, case.dtype, case.shape))
    assert shapes[0] == shapes[1]
    sweep = {case.shape[0] for case in goal_cases() if case.model == "sweep"}
    assert min(sweep) == 1 and max(sweep) == 4096
