"""Damaged PTX gives an exception or a report, never a crash; support/fuzz_ptx.py damages it."""

import ast
import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("seed", [0, 1000, 2000])
def test_damaged_ptx_never_crashes(seed):
    done = subprocess.run(
        [sys.executable, "-m", "support.fuzz_ptx", str(seed), "400"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-3000:]
    outcomes = ast.literal_eval(done.stdout.splitlines()[-1])
    assert sum(outcomes.values()) == 400
    # Both outcomes must occur: some damage is fatal, and some is harmless.
    assert outcomes["PtxError"] > 40 and outcomes["ran"] + outcomes["findings"] > 40
