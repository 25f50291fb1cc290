"""The GPU check, rehearsed on a CPU with a small repository and a fake wheel."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import torchext
from tests.hardware.gpu_check import __main__ as gpu_check
from tests.hardware.gpu_check import op_calls, pytest_stage, sanitizer, staging
from tests.hardware.gpu_check.__main__ import main
from tests.hardware.gpu_check.pytest_stage import TestRun as Run  # else pytest collects it
from tests.hardware.gpu_check.pytest_stage import files_to_test, run_tests

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.alone  # tests of time limits

CONFTEST = """
def pytest_addoption(parser):
    parser.addoption("--device", default="cpu")
"""
TESTS = """
import os, time, pytest, torchext
def test_first(): assert torchext.__version__ == "0.0.fake"
def test_wrong(): assert 1 == 2, "one is not two"
def test_crash(): os.abort()
def test_between(): pass
def test_hang(): time.sleep(600)
@pytest.mark.parametrize("text", ["a b", "c::d"])
def test_last(text): pass
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
@pytest.fixture
def broken(): yield; raise ValueError("cannot clean up")
def test_teardown(broken): pass
"""


@pytest.fixture
def repository(staged: Path) -> Path:
    """A checkout whose source package must never be imported; its wheel is in dist/."""
    wheel = staged / "dist" / "torchext-0.0-py3-none-any.whl"
    wheel.parent.mkdir()
    info = "torchext-0.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        source = (
            (staged / "torchext.py").read_text().replace("time.sleep(3600)", "raise ValueError")
        )
        archive.writestr("torchext/__init__.py", source)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: torchext\nVersion: 0.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    (staged / "torchext.py").unlink()
    (staged / "torchext").mkdir()
    (staged / "torchext" / "__init__.py").write_text("raise ImportError('the source package')")
    (staged / "tests" / "conftest.py").write_text(CONFTEST)
    (staged / "benchmarks" / "results").mkdir()
    (staged / ".git").mkdir()
    return staged


def wheel_of(repository: Path) -> Path:
    return next((repository / "dist").glob("*.whl"))


def test_staging_leaves_the_source_package_out(repository, tmp_path_factory):
    target = tmp_path_factory.mktemp("target")
    staging.stage(repository, [wheel_of(repository)], target, target / "log", 60)
    assert (
        target / "torchext" / "__init__.py"
    ).read_text() != "raise ImportError('the source package')"
    assert (target / "benchmarks" / "worker.py").is_file()
    assert (target / "tests" / "conftest.py").is_file()
    for absent in (".git", "dist", "benchmarks/results"):
        assert not (target / absent).exists()
    code = "import torchext; print(torchext.__version__, torchext.__file__)"
    said = subprocess.run(
        (sys.executable, "-c", code), cwd=target, env=staging.environment(target),
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert said == f"0.0.fake {target}/torchext/__init__.py\n"


def test_staging_says_what_is_wrong_with_a_wheel(repository, tmp_path):
    target = tmp_path / "target"
    with pytest.raises(staging.StagingError, match=r"must be a file \(got .*none\.whl\)"):
        staging.stage(repository, [Path("none.whl")], target, tmp_path / "log", 60)
    bad = tmp_path / "torchext-1-py3-none-any.whl"
    bad.write_text("no zip")
    with pytest.raises(staging.StagingError, match="pip install: exit status"):
        staging.stage(repository, [bad], target, tmp_path / "log", 60)


@pytest.mark.slow
def test_every_test_has_its_turn_whatever_the_others_do(repository, tmp_path_factory):
    target = tmp_path_factory.mktemp("target")
    (repository / "tests" / "test_all.py").write_text(TESTS)
    (repository / "tests" / "test_unimportable.py").write_text("import no_such_module")
    (repository / "tests" / "benchmarks").mkdir()
    (repository / "tests" / "benchmarks" / "test_self.py").write_text("def test_self(): assert 0")
    staging.stage(repository, [wheel_of(repository)], target, target / "log", 60)
    written: list[dict] = []
    run = Run(target, "cpu", time.monotonic() + 200, target / "tests.log", test_limit_s=5.0)
    summary = run_tests(run, jobs=2, write=written.append)
    outcomes = {bad["test"].rpartition("::")[2]: bad for bad in summary["failures"]}
    assert {name: bad["outcome"] for name, bad in outcomes.items()} == {
        "test_wrong": "failed",
        "test_crash": "crashed",
        "test_hang": "hung",
        "test_teardown": "error",
        "tests/test_unimportable.py": "error",
    }
    assert "one is not two" in outcomes["test_wrong"]["message"]
    assert outcomes["test_crash"]["message"] == "died of SIGABRT"
    assert "no_such_module" in outcomes["tests/test_unimportable.py"]["message"]
    assert summary["counts"]["passed"] == 4 and summary["counts"]["skipped"] == 1
    assert summary["skip_reasons"] == {"Skipped: not here": 1}
    assert written[-1]["counts"] == summary["counts"] and len(written) == 2
    assert "in test_hang\n" in (target / "tests.log").read_text()  # the stack was printed


DEAD_CONTEXT = """
import torch
broken = False
def synchronize():
    if broken: raise RuntimeError("an illegal instruction")
torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize
def test_first(): pass
def test_passes_and_breaks_the_context(): global broken; broken = True
def test_next(): synchronize()
def test_fails_and_breaks_the_context(): global broken; broken = True; assert 0, "its own failure"
def test_last(): synchronize()
"""


@pytest.mark.slow
def test_a_dead_context_is_the_failure_of_the_test_that_broke_it(repository, tmp_path_factory):
    target = tmp_path_factory.mktemp("target")
    (repository / "tests" / "test_context.py").write_text(DEAD_CONTEXT)
    staging.stage(repository, [wheel_of(repository)], target, target / "log", 60)
    run = Run(target, "cpu", time.monotonic() + 200, target / "tests.log", test_limit_s=60.0)
    summary = run_tests(run, jobs=1, write=lambda values: None)
    messages = {bad["test"].rpartition("::")[2]: bad["message"] for bad in summary["failures"]}
    assert messages.keys() == {
        "test_passes_and_breaks_the_context", "test_fails_and_breaks_the_context"
    }  # fmt: skip
    assert "illegal instruction" in messages["test_passes_and_breaks_the_context"]
    assert "its own failure" in messages["test_fails_and_breaks_the_context"]
    assert summary["counts"] == {"passed": 3, "failed": 2}


def test_files_without_gpu_tests_need_no_process_on_a_gpu():
    """tests/conftest.py skips every test that does not take the fixture `device`."""
    on_gpu, everywhere = (set(files_to_test(REPOSITORY, device)) for device in ("cuda", "cpu"))
    assert Path("tests/gemm/test_fp8_gemm.py") in on_gpu
    assert Path("tests/test_documents.py") in everywhere - on_gpu
    assert not {file.parts[1] for file in everywhere} & {"sim", "packaging", "hardware"}
    others = [
        path
        for path in (REPOSITORY / "tests").glob("*/conftest.py")
        if path.parent.name not in pytest_stage.LEFT_OUT
    ]
    # A fixture of theirs that takes `device` would need it in files that do not name it.
    assert others and not any("device" in path.read_text() for path in others)


@pytest.mark.slow
def test_tests_that_find_no_time_are_said_not_to_have_run(repository, tmp_path_factory):
    target = tmp_path_factory.mktemp("target")
    (repository / "tests" / "test_slow.py").write_text(
        "import time\ndef test_a(): time.sleep(600)\ndef test_b(): pass\n"
    )
    staging.stage(repository, [wheel_of(repository)], target, target / "log", 60)
    run = Run(target, "cpu", time.monotonic() + 12, target / "tests.log", test_limit_s=60.0)
    summary = run_tests(run, jobs=1, write=lambda values: None)
    counts = summary["counts"]
    assert not summary["failures"] and len(summary["not_run"]) == counts["not run"]
    assert counts in ({"not run": 2}, {"not run": 1})  # 1: collection took 12 s, so the file counts


@pytest.mark.slow
def test_a_whole_rehearsal_leaves_one_folder_with_all_findings(
    repository, tmp_path_factory, capsys
):
    out = tmp_path_factory.mktemp("out")
    (repository / "tests" / "test_some.py").write_text(
        "import torchext\ndef test_good(): pass\ndef test_bad(): assert 0\n"
    )
    code = main(
        ["--wheel", str(wheel_of(repository)), "--repository", str(repository), "--device", "cpu",
         "--out", str(out), "--shapes", "8x16x128", "--suite", "quantize", "gemm", "linear",
         "--budget", "600", "--commit", "abc"]
    )  # fmt: skip
    assert code == 1
    data = json.loads((out / "results.json").read_text())
    stages = {stage["name"]: stage for stage in data["stages"]}
    order = list(stages)
    assert order[:2] == ["install", "environment"]
    assert order[4:] == ["soak", "comparison", "benchmarks", "report"]
    assert set(order[2:4]) == {"tests", "sanitizer"}
    status = {name: stage["status"] for name, stage in stages.items()}
    assert status["install"] == status["environment"] == status["report"] == "passed"
    assert status["tests"] == status["benchmarks"] == "failed"
    # The fake package has neither references nor the ops that the soak calls.
    assert status["sanitizer"] == status["soak"] == status["comparison"] == "failed"
    assert "==== soak ====" in (out / "sanitizer.log").read_text()
    assert data["environment"]["torchext"] == "0.0.fake"
    assert data["environment"]["commit"] == "abc"
    assert data["tests"]["counts"] == {"passed": 1, "failed": 1}
    tools = {run["tool"]: run["status"] for run in data["sanitizer"]}
    assert tools == {"none": "failed"} | dict.fromkeys(sanitizer.TOOLS, "skipped")
    found = {(r["op"], r["contender"]): r["status"] for r in data["measurements"]}
    assert found["fprop", "torchext"] == found["forward_backward", "torchext"] == "ok"
    assert found["quantize_tensorwise", "torchext"] == "failed"
    files = {path.name for path in out.iterdir()}
    assert {"results.json", "report.md", "tests.log", "sanitizer.log", "benchmarks.log"} <= files
    assert len(files) <= 8  # docs/benchmarks.md promises no more
    for path in (out / "results.json", *out.glob("*.log")):
        assert str(repository) not in path.read_text(), path
    printed = capsys.readouterr().out
    assert "tests: {" in printed and "failed: benchmarks" in printed
    assert f"{out}" in printed


@pytest.mark.slow
def test_without_a_gpu_it_ends_soon_and_says_so(repository, tmp_path_factory, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = tmp_path_factory.mktemp("out")
    arguments = ["--wheel", str(wheel_of(repository)), "--repository", str(repository)]
    assert main([*arguments, "--out", str(out)]) == 2
    assert "torch.cuda.is_available() is False" in capsys.readouterr().out
    data = json.loads((out / "results.json").read_text())
    assert [s["status"] for s in data["stages"]] == ["passed", "failed", "passed"]
    assert (out / "report.md").is_file()


def test_a_broken_wheel_is_the_only_stage_that_runs(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "from-the-environment"))
    assert main(["--wheel", "none.whl", "--repository", str(repository), "--device", "cpu"]) == 2
    data = json.loads((tmp_path / "from-the-environment" / "results.json").read_text())
    assert [s["name"] for s in data["stages"]] == ["install", "report"]


def test_the_soak_stage_tells_faults_from_none(tmp_path):
    """Soaks the repository itself, on the CPU kernels."""
    options = gpu_check.parse(["--wheel", "w", "--out", str(tmp_path / "out"), "--device", "cpu"])
    options.budget = 20.0
    check = gpu_check.Check(options, tmp_path)
    for name in ("benchmarks", "tests", "torchext"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    check.deadline += 200
    with check.stage("soak"):
        gpu_check.soak(check)
    assert check.passed("soak"), check.results.data["stages"]
    assert check.results.data["soak"]["summary"].endswith(" 0 faults")
    check.device = "sim9"  # an unknown device
    with check.stage("soak"):
        gpu_check.soak(check)
    assert check.results.data["stages"][-1]["status"] == "failed"


def test_the_comparison_fits_the_gpu_and_tells_differences(tmp_path, monkeypatch):
    options = gpu_check.parse(["--wheel", "w", "--out", str(tmp_path / "out"), "--device", "cpu"])
    check = gpu_check.Check(options, tmp_path)
    check.results.data["environment"] = {}
    assert list(gpu_check.comparisons(check)) == ["bits"]
    check.results.data["environment"] = {"gpu": {"compute_capability": "9.0"}}
    assert list(gpu_check.comparisons(check)) == ["bits", "tensor cores", "instructions"]
    commands = {
        name: ((sys.executable, "-c", f"print('{name}: 1 case'); raise SystemExit({code})"), 30.0)
        for name, code in (("alike", 0), ("other", 1))
    }
    monkeypatch.setattr(gpu_check, "comparisons", lambda check: commands)
    with check.stage("comparison"):
        gpu_check.comparison(check)
    assert check.results.data["stages"][-1]["status"] == "failed"
    alike, other = check.results.data["comparison"]
    assert alike == {"name": "alike", "summary": "alike: 1 case", "reason": ""}
    assert other["summary"] == "other: 1 case" and other["reason"]
    log = check.log("sanitizer").read_text()
    assert "==== comparison with the simulator: alike ====\nalike: 1 case\n" in log
    del commands["other"]
    with check.stage("comparison"):
        gpu_check.comparison(check)
    assert check.passed("comparison")


def test_op_calls_cover_every_op_and_notice_a_wrong_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["op_calls", "--device", "cpu"])
    assert op_calls.main() == 0
    assert capsys.readouterr().out.count("\nok ") == len(op_calls.every_call())
    with monkeypatch.context() as without:
        without.delitem(op_calls.CATALOG, "dequantize")
        assert op_calls.main() == 1
    assert "no call of dequantize" in capsys.readouterr().out
    names = ("quantize_rowwise", "fp8_gemm_nt", "fp8_gemm_nt_gelu_quantize")
    for name in names:
        right = getattr(torchext.ops, name)
        monkeypatch.setattr(torchext.ops, name, lambda *a, f=right, **k: larger(f(*a, **k)))
    assert op_calls.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[1] for line in lines if line.startswith("WRONG")} == set(names)


def larger(outputs):
    """The outputs, with the first 6 % too large."""
    first, *others = outputs if isinstance(outputs, tuple) else (outputs,)
    first = first.float().mul(1.06).to(first.dtype)
    return (first, *others) if others else first


FAKE_TOOL = """#!{python}
import os, sys, time
skip = sys.argv[sys.argv.index("--skip") + 1:]
tool = sys.argv[2]
for name in ("one", "two 2", "three", "four"):
    if name in skip:
        continue
    print("calling", name, flush=True)
    if (name, tool) == ("two 2", "racecheck"):
        time.sleep(600)
    if (name, tool) in (("two 2", "memcheck"), ("three", "memcheck")):
        print("  what():  CUDA error: an illegal instruction", flush=True)
        print("========= ERROR SUMMARY: 3 errors", flush=True)
        os._exit(86)
    print("ok", name, flush=True)
print("end of calls")
print("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")
sys.exit(86 if tool == "initcheck" and "--no-results" not in sys.argv else 0)
"""
BROKE = "broke the process: CUDA error: an illegal instruction; "


@pytest.mark.parametrize(
    ("tool", "verdict", "summary"),
    [
        (
            "memcheck",
            ("failed", 2, ["two 2", "three"]),
            f"'two 2' {BROKE}'three' {BROKE}ERROR SUMMARY: 3 errors; RACE",
        ),
        ("synccheck", ("passed", 4, []), "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0"),
        ("initcheck", ("passed", 4, []), "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0"),
        (
            "racecheck",
            ("failed", 3, ["two 2"]),
            "'two 2' did not end; RACECHECK SUMMARY: 0 hazards",
        ),
    ],
)
def test_sanitizer_goes_on_after_calls_that_hang_or_crash(
    tool, verdict, summary, tmp_path, monkeypatch
):
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(FAKE_TOOL.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    run = sanitizer.OpCalls(tmp_path, "cuda", time.monotonic() + 15, tmp_path / "sanitizer.log")
    answer = sanitizer.run_tool(run, tool)
    assert (answer["status"], answer["calls"], answer["broke"]) == verdict
    assert answer["summary"].startswith(summary)
    skipped = sanitizer.run_tool(run, "memcheck", skip=["two 2", "three"])
    assert (skipped["status"], skipped["calls"], skipped["broke"]) == ("passed", 2, [])


def test_a_call_that_breaks_the_context_or_hangs_ends_op_calls(tmp_path):
    """In a process of its own, with a fault in place of an op."""

    def run(fault: str, *options: str) -> subprocess.CompletedProcess[str]:
        code = (
            "import sys, time, torch\n"
            "from tests.hardware.gpu_check import op_calls\n"
            "from torchext import ops\n"
            "def broken(*args, **kwargs): raise RuntimeError('an illegal instruction')\n"
            f"{fault}\n"
            f"sys.argv = ['op_calls', '--device', 'cpu', *{options}]\n"
            "sys.exit(op_calls.main())\n"
        )
        command = (sys.executable, "-c", code)
        return subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=100
        )

    hung = run("ops.quantize_1x128 = lambda x, **k: time.sleep(60)", "--call-limit", "1")
    assert hung.returncode == 1 and "Timeout (0:00:01)!" in hung.stderr
    assert hung.stdout.splitlines()[-1] == "calling quantize_1x128 ragged"
    fault = (
        "torch.cuda.synchronize = broken\n"
        "op_calls.finish = lambda device, finish=op_calls.finish: finish('cuda')"
    )
    died = run(fault)
    assert died.returncode == op_calls.BROKEN_CONTEXT
    assert died.stdout.splitlines()[-1] == "BROKEN CONTEXT: an illegal instruction"
    unchecked = run("op_calls.check = broken", "--no-results")
    assert unchecked.returncode == 0 and unchecked.stdout.endswith("end of calls\n")
