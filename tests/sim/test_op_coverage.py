"""Every opcode that the simulator decodes is executed by a unit test.

These unit tests run once more in a process of their own, which looks at every report. So the answer
depends neither on which tests the outer run selects nor on how it distributes them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchext import _sim

FOLDER = Path(__file__).resolve().parent
FILES = [
    *sorted(path for path in FOLDER.glob("test_op_*.py") if path != Path(__file__).resolve()),
    *(FOLDER / f"test_{name}.py" for name in ("calls", "module", "register_pool", "validity")),
]

# Prints the executed opcodes as the last line; its arguments are the test files.
RUN = """
import json, sys
import pytest
from torchext.sim import module

executed = set()
report_from = module.report_from

def recorded(raw):
    executed.update(opcode.split(".")[0] for opcode, count in raw["instructions"].items() if count)
    return report_from(raw)

module.report_from = recorded
status = pytest.main(["-q", "-p", "no:xdist", *sys.argv[1:]])
print()
print(json.dumps(sorted(executed)))
sys.exit(status)
"""


@pytest.mark.slow
def test_every_opcode_is_executed() -> None:
    decoded = {row["opcode"] for row in _sim.opcodes()}
    assert len(decoded) > 100
    run = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, FILES)],
        cwd=FOLDER.parents[1],
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    executed = set(json.loads(run.stdout.splitlines()[-1]))
    assert decoded - executed == set()
