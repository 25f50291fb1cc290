"""Runs the notebooks of docs/notebooks without Jupyter, and writes their outputs into them.

    python tools/notebooks.py docs/notebooks/train.ipynb     runs it, prints what its cells print
    python tools/notebooks.py --write docs/notebooks/*.ipynb

Cells run in order in this interpreter, as in a fresh kernel: what a cell prints is its output, and
so are the value of its last expression and the figures that it leaves open. tests/test_site.py
compares the outputs with those in the files.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def execute(notebook: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The outputs of each code cell, as a notebook has them. An exception ends the run."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    _open_figures()  # closes those that this process had already
    return [
        _run("".join(cell["source"]), f"<cell {number}>", namespace)
        for number, cell in enumerate(code_cells(notebook), 1)
    ]


def _run(source: str, name: str, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    silent = source.rstrip().endswith(";")
    value, printed = None, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
    if value is not None and not silent:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    return outputs + [_picture(figure) for figure in _open_figures()]


def _open_figures() -> list[Any]:
    if "matplotlib.pyplot" not in sys.modules:
        return []
    import matplotlib.pyplot as plt

    figures = [plt.figure(number) for number in plt.get_fignums()]
    plt.close("all")
    return figures


def _picture(figure: Any) -> dict[str, Any]:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80, metadata={"Software": None})
    data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": ["<Figure>"]}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def text(outputs: list[dict[str, Any]]) -> str:
    """The text that a cell shows; each picture is the line `<picture>`."""
    pieces = []
    for output in outputs:
        if output["output_type"] == "stream":
            pieces.append("".join(output["text"]))
        elif "image/png" in output["data"]:
            pieces.append("<picture>\n")
        else:
            pieces.append("".join(output["data"]["text/plain"]) + "\n")
    return "".join(pieces)


def write(path: Path, outputs: list[list[dict[str, Any]]]) -> None:
    notebook = json.loads(path.read_text())
    for number, (cell, new) in enumerate(zip(code_cells(notebook), outputs, strict=True), 1):
        cell |= {"outputs": new, "execution_count": number}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="writes the outputs into the file")
    parser.add_argument("notebooks", nargs="+", type=Path)
    options = parser.parse_args()
    for path in options.notebooks:
        outputs = execute(json.loads(path.read_text()))
        if options.write:
            write(path, outputs)
        for shown in outputs:
            print(text(shown))


if __name__ == "__main__":
    main()
