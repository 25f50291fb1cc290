"""Verdicts on the goals, the Markdown and the plots, from invented measurements."""

import json

import pytest

from benchmarks import goals, report
from benchmarks.cases import SUITES, cpu_cases, cuda_cases
from benchmarks.results import Results, finite, scrub
from support.invented_results import cpu_results, record, results


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


def cpu_report(ours: float, theirs: float) -> str:
    return report.markdown(cpu_results(ours, theirs))


def test_every_goal_of_a_cpu_is_stated_for_all_threads_and_for_one():
    fast, slow = verdicts(cpu_results(1.0, 2.0)), verdicts(cpu_results(6.0, 1.0))
    assert {goal["verdict"] for goal in fast.values()} == {"met"}
    assert {goal["verdict"] for goal in slow.values()} == {"not met"}
    for name, goal in fast.items():
        assert goal["measured"] == goal["of"] > 0, name
        if name.endswith("_all_threads"):
            one = fast[name.replace("all_threads", "one_thread")]
            assert one["bound"] == goal["bound"] and "/1 thread/" in one["at"]


def test_a_cpus_goals_are_those_of_the_issue():
    bounds = {
        name.removesuffix("_all_threads"): goal["bound"]
        for name, goal in verdicts(cpu_results(1.0, 1.0)).items()
        if not name.endswith("_one_thread")
    }
    share = {f"cpu_{op}": ">= 0.8" for op in (
        "quantize_1x128", "quantize_128x128", "quantize_1x128_dual", "dequantize",
    )}  # fmt: skip
    assert bounds == share | {
        "cpu_many_rows_vs_bf16": ">= 0.9",
        "cpu_moe_permute_quantize": ">= 0.7",
        "cpu_moe_layer": ">= 1.3",
        "cpu_many_rows_vs_fp32": ">= 2",
        "cpu_m1": ">= 2",
        "cpu_m4": ">= 1.7",
        "cpu_m16": ">= 1.5",
        "cpu_m1_1024": ">= 1",
        "cpu_w8a16_m1": ">= 2",
        "cpu_w8a16_m16": ">= 1.5",
        "cpu_linear_vs_fp32": ">= 1.7",
        "cpu_linear_vs_bf16": ">= 0.85",
        "cpu_experts": ">= 1.5",
        "cpu_training_step": ">= 1.15",
        "cpu_host_op": "<= 5",
        "cpu_host_linear_forward": "<= 20",
    }


def test_weights_only_products_are_compared_by_their_own_time():
    case = next(c for c in cpu_cases() if c.op == "fprop_bf16" and c.shape == (1, 4096, 7168))
    times = {"torchext": 9.0, "torchext_w8a16": 1.0, "bf16": 3.0}
    found = verdicts(results([record(case, name, ms) for name, ms in times.items()], "cpu"))
    assert found["cpu_w8a16_m1_all_threads"]["value"] == pytest.approx(3.0)
    assert found["cpu_m1_all_threads"]["value"] == pytest.approx(1 / 3)


def test_a_roof_is_the_slower_of_arithmetic_and_memory():
    ceilings = {"fp8_flops_per_s": 100.0, "copy_bytes_per_s": 10.0}
    work = {"milliseconds": {"median": 2000.0}, "flops_per_s": 50.0, "bytes_per_s": 1.0}
    assert report.roof_seconds(work, ceilings) == pytest.approx(1.0)  # 100 FLOP
    assert report.roof_seconds(work | {"bytes_per_s": 8.0}, ceilings) == pytest.approx(1.6)


def test_a_cpus_report_has_roofline_and_scaling():
    text = cpu_report(1.0, 2.0)
    shape = "512x4096x7168"
    scaling = text.partition("## Scaling")[2]
    assert f"| gemm/fprop/weight/{shape} | torchext | 2.000 | 1.000 | 2.00 |" in scaling
    # 2 ms on one thread: 2 M N K FLOP at 8e14 a second.
    share = 2 * 512 * 4096 * 7168 / 8e14 / 2e-3
    roofline = text.partition("## Roofline")[2]
    row = f"| gemm/fprop/weight/1 thread/{shape} | torchext | "
    (line,) = [line for line in roofline.splitlines() if line.startswith(row)]
    assert line.endswith(f"{100 * max(share, 0.5):.0f} % |")
    assert "share of BF16 rate" in text and "measured copy bandwidth, one thread" in text


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
        assert f"## {suite}\n" in report.markdown(everything(0.1, 0.2)) + cpu_report(1.0, 1.0)
    columns = {line.count(" | ") for line in text.splitlines() if line.startswith("| fprop/")}
    assert len(columns) == 1


@pytest.mark.slow
def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.plots import draw

    data = everything(0.1, 0.2)
    assert [p.name for p in draw(data, tmp_path)] == ["gemm.png", "layers.png", "quantize.png"]
    of_a_cpu = {path.name for path in draw(cpu_results(1.0, 2.0), tmp_path)}
    assert of_a_cpu == {"gemm.png", "layers.png", "quantize.png", "rows.png"}
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
