"""How callgrind's files are read and counts compared; that the table lists every count."""

import json
import subprocess
from types import SimpleNamespace

import pytest

import instruction_counts as tool

PART = """\
# callgrind format
positions: line
events: Ir
summary: 1000

ob=/usr/lib/libpython.so
fl=a.c
fn=caller
1 100
cob=/x/torchext/_C.so
cfn=kernel
calls=1 7
2 560
ob=/x/torchext/_C.so
fn=kernel
7 10
fi=header.h
8 20
fe=a.cpp
cob=/usr/lib/libc.so.6
cfn=memcpy
calls=3 0
9 300
10 30
ob=/usr/lib/libc.so.6
fn=memcpy
0 300
ob=/x/torchext/_C.so
fn=other
11 200
"""


def test_instructions_are_those_of_the_library_without_its_callees():
    lines = PART.splitlines(keepends=True)
    assert tool.instructions(lines, "torchext/_C.so") == 10 + 20 + 30 + 200
    assert tool.instructions(lines, "libc.so.6") == 300
    assert tool.instructions(lines, "libpython.so") == 100


def test_more_than_two_percent_fails_and_less_is_told():
    old = {"same": 1000, "slower": 1000, "faster": 1000, "gone": 5}
    new = {"same": 1019, "slower": 1021, "faster": 970, "new": 5}
    failures, improved = tool.compare(old, new)
    assert failures == [
        "gone: not in the measurement",
        "new: not in the table",
        "slower: 1,000 -> 1,021 (+2.1%)",
    ]
    assert improved == ["faster: 1,000 -> 970 (-3.0%)"]


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of this build, and a measurement that equals it."""
    counts = {"a": 1000, "b": 2000}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"compiler": tool.compiler(), "counts": counts}))
    monkeypatch.setattr(tool, "TABLE", path)
    monkeypatch.setattr(tool.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(tool.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(tool, "measure", lambda: counts)
    return path, counts


def test_the_check_passes_fails_and_says_when_the_table_is_outdated(table, monkeypatch, capsys):
    _, counts = table
    assert tool.main(["--check"]) == 0
    assert "2 within 2%" in capsys.readouterr().out
    monkeypatch.setattr(tool, "measure", lambda: counts | {"a": 900})
    assert tool.main(["--check"]) == 0
    assert "better than the table" in capsys.readouterr().out
    monkeypatch.setattr(tool, "measure", lambda: counts | {"a": 1100})
    assert tool.main(["--check"]) == 1
    captured = capsys.readouterr()
    assert "FAILED: a: 1,000 -> 1,100 (+10.0%)" in captured.err and "--update" in captured.err


def test_a_check_that_cannot_compare_says_why(table, monkeypatch, capsys):
    path, counts = table

    def measure():
        pytest.fail("must not measure")

    monkeypatch.setattr(tool, "measure", measure)
    path.write_text(json.dumps({"compiler": "GCC 1", "counts": counts}))
    assert tool.main(["--check"]) == 0
    assert "SKIPPED: the table is of GCC 1 (this build is of " in capsys.readouterr().out
    monkeypatch.setattr(tool.shutil, "which", lambda name: None)
    assert tool.main(["--check"]) == 0
    assert "SKIPPED: valgrind is not installed" in capsys.readouterr().out
    monkeypatch.setattr(tool.platform, "machine", lambda: "aarch64")
    assert tool.main(["--check"]) == 0
    assert "SKIPPED: the counts are of x86-64" in capsys.readouterr().out


def test_update_writes_the_table(table, monkeypatch):
    path, _ = table
    monkeypatch.setattr(tool, "measure", lambda: {"c": 7})
    assert tool.main(["--update"]) == 0
    assert json.loads(path.read_text()) == {"compiler": tool.compiler(), "counts": {"c": 7}}


def test_the_table_has_every_count_and_every_call_works():
    table = json.loads(tool.TABLE.read_text())
    every = tool.calls()
    assert table["counts"].keys() == every.keys()
    for call in every.values():
        call()


def test_the_measured_process_counts_the_last_call_only(monkeypatch, capsys):
    happened = []
    switch = SimpleNamespace(
        start_counting=lambda: happened.append("start"),
        stop_counting=lambda: happened.append("stop"),
    )
    monkeypatch.setenv(tool.SWITCH, "switch.so")
    monkeypatch.setattr(tool.ctypes, "CDLL", {"switch.so": switch}.__getitem__)
    monkeypatch.setattr(tool, "calls", lambda: {"a": lambda: happened.append("call")})
    tool.run_calls()
    assert json.loads(capsys.readouterr().out) == ["a"]
    assert happened == ["call", "call", "start", "call", "stop"]


def test_a_failed_measurement_is_an_error(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "out", "err")
    monkeypatch.setattr(tool.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(RuntimeError, match="valgrind failed\nouterr"):
        tool.measure()
