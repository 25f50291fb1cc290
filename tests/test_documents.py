"""The snippets of five documents print what the documents show, if a reader runs them in order in
one fresh interpreter. Also checks the glossary."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torchext

ROOT = Path(__file__).resolve().parents[1]
NUMBER = r"\d+\.\d+"
MARK = "==== end of snippet ===="


def snippets(document: str) -> list[tuple[str, str]]:
    """(code, output) of each Python block; the output is the text block that follows it."""
    blocks = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", document, re.DOTALL)
    return [(code, output) for code, output in blocks]


def assert_prints(printed: str, shown: str) -> None:
    """Asserts equality. `...` at the end of a line stands for its rest, on a line of its own for
    any lines. Decimal fractions may differ by 5 %."""
    pattern, expected = "", []
    for line in shown.splitlines():
        if line == "...":
            pattern += r"(?:.*\n)*?"
            continue
        for piece in re.split(rf"({NUMBER})", line.removesuffix("...")):
            if re.fullmatch(NUMBER, piece):
                pattern += f"({NUMBER})"
                expected.append(float(piece))
            else:
                pattern += re.escape(piece)
        pattern += r".*\n" if line.endswith("...") else r"\n"
    match = re.fullmatch(pattern, printed)
    assert match, f"shown:\n{shown}\nprinted:\n{printed}"
    assert [float(number) for number in match.groups()] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    "document",
    ["README.md", "docs/conversion.md", "docs/debugging.md", "docs/inference.md", "docs/layers.md"],
)
@pytest.mark.slow
def test_snippets_print_what_is_shown(document, tmp_path):
    if document in ("README.md", "docs/debugging.md"):
        if not torchext.is_available("sim"):
            pytest.skip(torchext.is_available("sim").reason)
        try:
            torchext.sim.compiler.find_nvcc()
        except torchext.sim.CompileError as error:
            pytest.skip(str(error))
    found = snippets((ROOT / document).read_text())
    assert len(found) >= 2
    (tmp_path / "document.py").write_text(f"print({MARK!r})\n".join(code for code, _ in found))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:__main__", "document.py"],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    outputs = run.stdout.split(MARK + "\n")
    for (_, shown), printed in zip(found, outputs, strict=True):
        assert_prints(printed, shown)


@pytest.mark.parametrize(
    "printed, shown, equal",
    [
        ("a 1.00\nb\n", "a 1.02\nb\n", True),
        ("a 1.00\nb\n", "a 1.20\nb\n", False),
        ("a 1\n", "a 2\n", False),
        ("a\nb\nc\n", "a\n...\nc\n", True),
        ("a\nc\n", "a\n...\nc\n", True),
        ("a\nb\n", "a\n...\nc\n", False),
        ("a b c\n", "a ...\n", True),
        ("b\n", "a ...\n", False),
        ("", "", True),
        ("more\n", "", False),
    ],
)
def test_comparison_can_fail(printed, shown, equal):
    if equal:
        assert_prints(printed, shown)
    else:
        with pytest.raises(AssertionError):
            assert_prints(printed, shown)


DOCUMENTS = ["README.md", "CONTRIBUTING.md", "ptx/sim/README.md"] + [
    str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


# ---- the glossary ----

GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
ROW = re.compile(r"\| (?P<words>[^|]+) \| (?P<meaning>[^|]+\.) \| \[[^]]+\]\((?P<file>[^)]+)\) \|")
ROWS = [match.groupdict() for match in map(ROW.fullmatch, GLOSSARY.splitlines()) if match]


def test_the_readme_links_the_glossary():
    assert "](docs/glossary.md)" in (ROOT / "README.md").read_text()


def test_the_glossary_is_in_order():
    """Every line of a table is a row; each section is sorted; no word has two rows."""
    lines = [line for line in GLOSSARY.splitlines() if line.startswith("|")]
    assert len(lines) == len(ROWS) + 2 * GLOSSARY.count("\n## ")
    for section in GLOSSARY.split("\n## ")[1:]:
        rows = [m["words"].lower() for m in map(ROW.fullmatch, section.splitlines()) if m]
        assert rows and rows == sorted(rows)
    words = [word for row in ROWS for word in row["words"].lower().split(", ")]
    assert len(words) == len(set(words)) > 80


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["words"])
def test_the_file_beside_a_word_uses_it(row):
    text = (ROOT / "docs" / row["file"]).read_text().lower().replace("_", " ")
    assert any(word in text for word in row["words"].lower().replace("_", " ").split(", "))
