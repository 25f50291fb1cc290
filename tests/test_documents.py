"""The snippets of documents print what the documents show, if a reader runs those of a document in
order. Also checks links and the glossary."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torchext
from support.printed import assert_prints

ROOT = Path(__file__).resolve().parents[1]
MARK = "==== end of snippet ===="


def snippets(document: str) -> list[tuple[str, str]]:
    """(code, output) of each Python block; the output is the text block that follows it."""
    blocks = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", document, re.DOTALL)
    return [(code, output) for code, output in blocks]


# Documents whose snippets run. Each group runs in one interpreter, since `import torch` takes
# longer than most of them; the second needs nvcc and the simulator.
GROUPS = {
    "models": [
        "docs/conversion.md",
        "docs/install.md",
        "docs/inference.md",
        "docs/layers.md",
        "docs/start/training.md",
        "docs/start/inference.md",
        "docs/guides/huggingface.md",
        "docs/guides/peft.md",
        "docs/guides/distributed.md",
        "docs/guides/experts.md",
        "docs/guides/serving.md",
        "docs/guides/rl.md",
        "docs/guides/checkpoint.md",
    ],
    "kernels": [
        "README.md",
        "docs/advice.md",
        "docs/debugging.md",
        "docs/start/ops.md",
        "docs/start/kernel.md",
    ],
}
# Runs each folder's document.py as if in a fresh interpreter, and ends at the first exception.
RUN = """
import os, sys
for folder in sys.argv[1:]:
    os.chdir(folder)
    with open("document.py") as file:
        code = compile(file.read(), os.path.join(folder, "document.py"), "exec")
    sys.modules["__main__"].__dict__.update(__file__=code.co_filename)
    print(f"==== {folder}", file=sys.stderr, flush=True)
    exec(code, {"__name__": "__main__"})
    print("==== end of document", flush=True)
"""


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.slow
def test_snippets_print_what_is_shown(group, tmp_path):
    if group == "kernels":
        if not torchext.is_available("sim"):
            pytest.skip(torchext.is_available("sim").reason)
        try:
            torchext.sim.compiler.find_nvcc()
        except torchext.sim.CompileError as error:
            pytest.skip(str(error))
    found = {name: snippets((ROOT / name).read_text()) for name in GROUPS[group]}
    folders = []
    for name, blocks in found.items():
        assert blocks, name
        folders.append(tmp_path / name.replace("/", "_"))
        folders[-1].mkdir()
        code = f"print({MARK!r})\n".join(code for code, _ in blocks)
        (folders[-1] / "document.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:__main__", "-c", RUN, *map(str, folders)],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    printed_by = run.stdout.split("==== end of document\n")
    for (name, blocks), printed in zip(found.items(), printed_by, strict=False):
        for (_, shown), output in zip(blocks, printed.split(MARK + "\n"), strict=True):
            assert_prints(output, shown, name)


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


def without_code(document: Path) -> str:
    return re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)


@functools.cache
def anchors(document: Path) -> set[str]:
    """The fragments that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", without_code(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for target, fragment in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)[^)]*\)", without_code(path)):
        if "://" in target:
            continue
        file = path.parent / target if target else path
        assert file.exists(), target
        if fragment and file.suffix == ".md":
            assert fragment in anchors(file), f"{target}#{fragment}"


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
