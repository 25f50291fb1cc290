"""Verdicts on the goals, the Markdown and the plots, from invented measurements."""

import json

import pytest

from benchmarks import goals, report
from benchmarks.cases import SUITES, Case, cuda_cases
from benchmarks.results import Results, finite, scrub


def record(case: Case, contender: str, milliseconds: float, **more: object) -> dict:
    flops = 2.0 * case.shape[0] * case.shape[1] * case.shape[-1]
    return {
        **case.as_dict(),
        "case": case.name,
        "contender": contender,
        "status": "ok",
        "error": {"relative": 1e-3, "worst": 1e-2},
        "milliseconds": {"median": milliseconds, "p20": 1.0, "p80": 1.0, "samples": 9},
        "flops_per_s": flops / milliseconds * 1e3 if case.suite != "quantize" else None,
        "bytes_per_s": 1e12 if case.suite != "linear" else None,
        **more,
    }


def results(measurements: list[dict], device: str = "cuda") -> dict:
    return {
        "schema": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "environment": {"device": device, "gpu": {"name": "Fake GPU"}},
        "ceilings": {
            "copy_bytes_per_s": 4e12,
            "gemm_flops_per_s": 8e14,
            "gemm_dtype": "bfloat16",
            "fp8_flops_per_s": 1.6e15,
        },
        "contenders": [{"name": "torchext", "suite": "gemm", "version": "1"}],
        "measurements": measurements,
    }


def everything(ours: float, theirs: float) -> dict:
    """Results for every case: torchext takes `ours` milliseconds, every peer `theirs`."""
    rows = []
    for case in cuda_cases():
        extra: dict[str, object] = {"host_microseconds": 5.0} if case.host else {}
        for name, ms in (
            ("torchext", ours), ("deepgemm", theirs), ("cublaslt", theirs), ("bf16", theirs)
        ):  # fmt: skip
            joules = {"joules": ms} if case.energy else {}
            rows.append(record(case, name, ms, **extra, **joules))
    return results(rows)


def verdicts(data: dict) -> dict[str, dict]:
    return {goal["goal"]: goal for goal in goals.evaluate(data)}


def test_all_met_when_much_faster_and_none_when_slower():
    fast, slow = verdicts(everything(0.001, 0.002)), verdicts(everything(2.0, 1.0))
    assert fast.keys() == slow.keys() >= {"fprop_vs_deepgemm", "linear_vs_bf16"}
    for name, goal in fast.items():
        assert goal["verdict"] == "met", name
        assert goal["measured"] == goal["of"] > 0, name
    compared = {g.name for g in goals.GOALS if g.peer and g.device == "cuda"}
    for name in compared:
        assert slow[name]["verdict"] == "not met", name


def test_values_are_the_stated_statistic():
    cases = [c for c in cuda_cases() if c.op == "fprop" and c.model == "deepseek-v3"][:2]
    data = results(
        [
            record(cases[0], "torchext", 1.0),
            record(cases[0], "deepgemm", 4.0),
            record(cases[1], "torchext", 1.0),
            record(cases[1], "deepgemm", 0.81),
        ]
    )
    found = verdicts(data)
    assert found["fprop_vs_deepgemm"]["value"] == pytest.approx(1.8)
    worst = found["fprop_vs_deepgemm_worst"]
    assert (worst["verdict"], worst["at"]) == ("not met", cases[1].name)
    assert worst["value"] == pytest.approx(0.81)
    assert worst["measured"] == 2 < worst["of"]
    assert found["blockwise_vs_cublaslt"]["verdict"] == "not measured"
    assert found["energy_vs_deepgemm"]["verdict"] == "not measured"


def test_failed_measurements_count_for_nothing():
    case = next(c for c in cuda_cases() if c.op == "fprop" and c.model == "deepseek-v3")
    bad = record(case, "torchext", 0.1) | {"status": "wrong", "reason": "no"}
    data = results([bad, record(case, "deepgemm", 1.0)])
    assert verdicts(data)["fprop_vs_deepgemm"]["verdict"] == "not measured"


def test_large_shapes_are_arithmetic_bound():
    goal = next(g for g in goals.GOALS if g.name == "large_share_of_peak")
    covered = {c.shape for c in cuda_cases() if goal.covers(c)}
    assert (4096, 7168, 16384) in covered
    assert not any(m <= 128 or k == 512 for m, n, k in covered)


def test_markdown_shows_ratios_failures_and_reasons():
    case = next(c for c in cuda_cases() if c.op == "fprop" and c.shape == (4096, 4096, 7168))
    late = record(case, "bf16", 1.0) | {
        "status": "skipped",
        "reason": "the budget of 9 s was spent",
    }
    bad = record(case, "cublaslt", 1.0) | {"status": "wrong", "reason": "relative error | 0.5"}
    data = results([record(case, "torchext", 0.2), record(case, "deepgemm", 0.3), late, bad])
    data["contenders"].append({"name": "torchao", "suite": "linear", "reason": "ImportError: x"})
    data["stages"] = [{"name": "tests", "status": "failed", "seconds": 3.2, "reason": "1 hung"}]
    data["tests"] = {
        "counts": {"passed": 3, "hung": 1},
        "failures": [{"test": "t.py::a", "outcome": "hung", "message": "no end"}],
        "not_run": [
            {"test": test, "message": "late"} for test in ("t.py::b", "t.py::c[x]", "u.py")
        ],
    }
    data["sanitizer"] = [
        {"tool": "memcheck", "status": "passed", "calls": 24, "seconds": 9.0, "summary": "0 errors"}
    ]
    text = report.markdown(data)
    row = next(line for line in text.splitlines() if line.startswith("| fprop/deepseek-v3"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:5] == ["200.0", "300.0", "1.50", f"{2 * 4096**2 * 7168 / 2e-4 / 1e12:.1f}"]
    assert "relative error \\| 0.5" in text
    assert "1 measurements were skipped because time ran out." in text
    assert "| t.py::a | hung | no end |" in text
    assert "| t.py | late | 2 |\n| u.py | late | all |" in text
    assert "ImportError: x" in text and "3 passed, 1 hung" in text and "memcheck" in text
    for suite in SUITES:  # the report has a section for every suite
        assert f"## {suite}\n" in report.markdown(everything(0.1, 0.2))
    columns = {line.count(" | ") for line in text.splitlines() if line.startswith("| fprop/")}
    assert len(columns) == 1


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.plots import draw

    data = everything(0.1, 0.2)
    assert [p.name for p in draw(data, tmp_path)] == ["gemm.png", "layers.png", "quantize.png"]
    for plot in tmp_path.glob("*.png"):
        assert plot.stat().st_size > 10_000
    assert list(draw(results([]), tmp_path)) == []


def test_results_are_strict_json_without_paths(tmp_path):
    kept = Results(tmp_path / "results.json")
    kept.private = [(str(tmp_path), "<here>")]
    kept.data["measurements"].append({"reason": f"{tmp_path}/x.py", "value": float("nan")})
    kept.write()
    text = kept.path.read_text()
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert data["measurements"] == [{"reason": "<here>/x.py", "value": "nan"}]
    assert Results.open(kept.path).data == data
    assert scrub("a/b/c", [("a/b", "."), ("", "no"), ("/", "no")]) == "./c"
    assert finite({"a": [1.5, float("inf")]}) == {"a": [1.5, "inf"]}
