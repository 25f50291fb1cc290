"""Every opcode that the simulator decodes is named in at least one test."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_opcode_has_a_test():
    opcodes = set()
    for source in (ROOT / "ptx" / "sim" / "instructions").glob("*.cpp"):
        opcodes |= set(re.findall(r'\bt\["([a-z0-9]+)"\]', source.read_text()))
    assert len(opcodes) > 80
    tests = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py"))
    tests = tests.replace("\\n", "\n")  # line breaks within the tests' PTX
    mentioned = set(re.findall(r"[a-z][a-z0-9]+", tests))
    assert opcodes - mentioned == set()
