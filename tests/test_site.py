"""The site of the documents: its links, its reference, and its notebooks, which are executed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import torchext
from support.printed import assert_prints

pytest.importorskip("mkdocs")

import docs_site
import draw_overview
import notebooks

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def test_the_reference_has_public_modules_only():
    assert {"torchext", "torchext.nn", "torchext.ops", "torchext.sim"} <= {*docs_site.API}
    assert "torchext.integrations.peft" in docs_site.API
    assert not [name for name in docs_site.API if "._" in name]
    for name in docs_site.API:
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), name


@pytest.mark.parametrize(
    "text, path, page, expected",
    [
        ("[a](docs/gemm.md#groups)", "README.md", "index.md", "[a](gemm.md#groups)"),
        ("[a](../csrc/ops.cpp)", "docs/gemm.md", "gemm.md", "[a](repository/csrc/ops.cpp.md)"),
        ("[a](../../numerics.md)", "docs/x/y/z.md", "x/y/z.md", "[a](../../numerics.md)"),
        ("[a](../README.md)", "docs/gemm.md", "gemm.md", "[a](index.md)"),
        ("![a](images/b.svg)", "docs/gemm.md", "gemm.md", "![a](images/b.svg)"),
        ("[a](#groups)", "docs/gemm.md", "gemm.md", "[a](#groups)"),
        ("[a](https://b.org/c.md)", "docs/gemm.md", "gemm.md", "[a](https://b.org/c.md)"),
        ("[a](../notebooks/b.ipynb)", "docs/start/c.md", "start/c.md", "[a](../notebooks/b.md)"),
        ("[a](../torchext/nn/__init__.py)", "docs/c.md", "c.md", "[a](api/torchext.nn.md)"),
        ("```\n[a](b.md)\n```", "README.md", "index.md", "```\n[a](b.md)\n```"),
        ("list:\n- a\n- b", "docs/c.md", "c.md", "list:\n\n- a\n- b"),
        ("- a\n\n  more", "docs/c.md", "c.md", "- a\n\n    more"),
    ],
)
def test_links_lead_to_pages_of_the_site(text, path, page, expected):
    assert docs_site.for_site(text, path, page) == expected + "\n"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.slow
def test_notebooks_print_what_they_show(path, tmp_path):
    if "sim" in path.read_text() and not torchext.is_available("sim"):
        pytest.skip(torchext.is_available("sim").reason)
    copy = tmp_path / path.name
    copy.write_text(path.read_text())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, ROOT / "tools" / "notebooks.py", "--write", copy],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    shown, printed = (notebooks.code_cells(json.loads(p.read_text())) for p in (path, copy))
    for number, (mine, new) in enumerate(zip(shown, printed, strict=True), 1):
        where = f"{path.name}, cell {number}"
        assert_prints(notebooks.text(new["outputs"]), notebooks.text(mine["outputs"]), where)


def test_a_notebook_shows_prints_values_and_figures():
    pytest.importorskip("matplotlib").use("Agg")
    importlib.import_module("matplotlib.pyplot").figure()  # open already, so of no cell
    sources = ["a = 1", "print(a)\na + 1", "import matplotlib.pyplot as p\np.plot([1]);"]
    cells = [{"cell_type": "code", "source": [source]} for source in sources]
    outputs = notebooks.execute({"cells": [*cells, {"cell_type": "markdown", "source": []}]})
    assert [notebooks.text(shown) for shown in outputs] == ["", "1\n2\n", "<picture>\n"]
    page = docs_site.notebook_text({"cells": [cells[1] | {"outputs": outputs[1]}]})
    assert page == "```python\nprint(a)\na + 1\n```\n\n```text\n1\n```\n\n```text\n2\n```\n"


def test_the_readme_has_the_picture_of_its_data():
    losses = json.loads(draw_overview.LOSSES.read_text())
    assert draw_overview.IMAGE.read_text() == draw_overview.picture(losses)
    assert "](docs/images/overview.svg)" in (ROOT / "README.md").read_text()
