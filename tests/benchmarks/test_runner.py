"""The supervisor: a hang or a crash costs one measurement, not the run."""

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command_line
from benchmarks.cases import QUANTIZERS, Case, explicit_cases
from benchmarks.results import Results
from benchmarks.runner import Runner, subject_ok

SHAPE = (24, 128)


def quantize_cases(*ops: str) -> list[Case]:
    return [Case("quantize", op, "given", "", SHAPE) for op in ops]


def with_ceilings(folder: Path) -> Results:
    """Results that already have ceilings, since measuring them takes seconds."""
    results = Results(folder / "results.json")
    results.data["ceilings"] = {"copy_bytes_per_s": 1.0, "fp8_flops_per_s": 1.0}
    return results


def statuses(results: Results, contender: str) -> dict[str, str]:
    return {
        record["op"]: record["status"]
        for record in results.data["measurements"]
        if record["contender"] == contender
    }


@pytest.mark.slow
def test_wrong_crashing_and_hanging_ops_cost_only_themselves(staged):
    results = with_ceilings(staged)
    lines: list[str] = []
    Runner(
        results,
        "cpu",
        quantize_cases(*QUANTIZERS),
        staged / "log",
        rounds=3,
        case_limit_s=6.0,
        progress=lines.append,
    ).run()
    expected = dict.fromkeys(QUANTIZERS, "ok") | {
        "quantize_rowwise": "wrong",
        "quantize_128x128_dual": "failed",
        "quantize_tensorwise": "failed",
        "dequantize": "failed",
    }
    assert statuses(results, "torchext") == expected
    assert set(statuses(results, "plain").values()) == {"ok"}
    reasons = {r["op"]: r["reason"] for r in results.data["measurements"] if r["status"] != "ok"}
    assert reasons["quantize_tensorwise"] == "died of SIGABRT"
    assert reasons["dequantize"] == "hung: no progress in 6 s"
    assert reasons["quantize_128x128_dual"] == "ValueError: no such kernel"
    assert "output_0_elements': 1" in reasons["quantize_rowwise"]
    assert not subject_ok(results)
    assert len(lines) >= 2 * len(QUANTIZERS)
    written = json.loads((staged / "results.json").read_text())
    assert len(written["measurements"]) == 2 * len(QUANTIZERS)
    ok = next(r for r in written["measurements"] if r["status"] == "ok")
    assert ok["milliseconds"]["samples"] >= 3 and ok["bytes_per_s"] > 0


@pytest.mark.slow
def test_a_contender_that_keeps_dying_is_not_asked_again(staged):
    cases = [Case("quantize", "quantize_tensorwise", "given", "", (n, 128)) for n in (1, 2, 3, 4)]
    results = with_ceilings(staged)
    Runner(results, "cpu", cases, staged / "log", rounds=3).run()
    mine = [r for r in results.data["measurements"] if r["contender"] == "torchext"]
    assert sorted(r["status"] for r in mine) == ["failed", "failed", "skipped", "skipped"]
    plain = [r for r in results.data["measurements"] if r["contender"] == "plain"]
    assert [r["status"] for r in plain] == ["ok"] * 4


def test_no_time_is_said_of_every_measurement(staged):
    results = with_ceilings(staged)
    Runner(results, "cpu", quantize_cases("quantize_1x128"), staged / "log", budget_s=0.0).run()
    assert [r["status"] for r in results.data["measurements"]] == ["skipped", "skipped"]
    assert all("budget of 0 s" in r["reason"] for r in results.data["measurements"])


@pytest.mark.slow
def test_absent_packages_are_named_with_the_reason(staged):
    (staged / "torchext.py").write_text("raise ImportError('no compiled ops here')")
    results = with_ceilings(staged)
    cases = [Case("linear", "forward", "given", "", (24, 32, 128))]
    Runner(results, "cpu", cases, staged / "log", rounds=3).run()
    known = {(c["suite"], c["name"]): c for c in results.data["contenders"]}
    assert known["linear", "torchext"]["reason"] == "ImportError: no compiled ops here"
    assert statuses(results, "torchext") == {}
    assert statuses(results, "plain") == statuses(results, "fp32") == {"forward": "ok"}
    assert not subject_ok(results)


@pytest.mark.slow
def test_a_worker_that_never_starts_ends_the_run(staged):
    (staged / "benchmarks" / "worker.py").write_text("raise SystemExit(7)")
    results = with_ceilings(staged)
    Runner(results, "cpu", quantize_cases("quantize_1x128"), staged / "log").run()
    assert results.data["failures"] == ["benchmark worker: exit status 7"]
    assert not subject_ok(results)


@pytest.mark.slow
def test_command_line_measures_everything_there_is(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.chdir(Path(command_line.__file__).parents[1])
    arguments = ["--device", "cpu", "--quick", "--shapes", "40x48x128", "--out", str(out)]
    assert command_line.main(arguments) == 0
    data = json.loads((out / "results.json").read_text())
    subject = [r for r in data["measurements"] if r["contender"] == "torchext"]
    assert {r["case"] for r in subject} == {c.name for c in explicit_cases(40, 48, 128)}
    other = {
        (r["contender"], r["op"]): r["status"] for r in data["measurements"] if r["status"] != "ok"
    }
    assert other == {("bf16", "wgrad_accumulate"): "skipped", ("bf16", "along_k"): "skipped"}
    assert data["ceilings"]["copy_bytes_per_s"] > 1e6
    assert data["ceilings"]["fp8_flops_per_s"] == data["ceilings"]["gemm_flops_per_s"] > 1e6
    report = (out / "report.md").read_text()
    assert "## quantize" in report and "## gemm" in report and "## linear" in report
    assert str(out) not in (out / "results.json").read_text()
    assert "results: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "cublas"], "--peers must be some of"),
        (["--shapes", "big"], "--shapes must be MxNxK"),
    ],
)
def test_command_line_refuses_what_it_does_not_know(arguments, message, capsys):
    assert command_line.main(["--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
