"""Draws docs/images/overview.svg, the README's picture, from docs/images/overview_losses.json and
from the race report that the README shows.

    python tools/draw_overview.py            draws
    python tools/draw_overview.py --train    first trains, as docs/notebooks/train.ipynb does

The picture follows the reader's light or dark theme.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from html import escape
from pathlib import Path
from typing import Any

from notebooks import code_cells

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "train.ipynb"
LOSSES = ROOT / "docs" / "images" / "overview_losses.json"
IMAGE = ROOT / "docs" / "images" / "overview.svg"
WIDTH, HEIGHT, CARD, GAP = 1080, 300, 344, 12
SMOOTHED = 5

STYLE = """
  svg { color-scheme: light dark; }
  .card { fill: #ffffff; stroke: #d0d7de; }
  text { font: 13px system-ui, sans-serif; fill: #1f2328; }
  .title { font-size: 17px; font-weight: 600; }
  .faint { fill: #656d76; font-size: 12px; }
  .code { font: 11.5px ui-monospace, monospace; }
  .error { fill: #c62828; }
  .axis { stroke: #afb8c1; fill: none; }
  .fp32 { stroke: #0072b2; fill: #0072b2; }
  .bf16 { stroke: #009e73; fill: #009e73; }
  .fp8 { stroke: #d55e00; fill: #d55e00; }
  polyline { fill: none !important; stroke-width: 2; }
  text.fp32, text.bf16, text.fp8, rect.bf16, rect.fp8 { stroke: none; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #161b22; stroke: #30363d; }
    text { fill: #e6edf3; }
    .faint { fill: #9198a1; }
    .error { fill: #ff7b72; }
    .axis { stroke: #484f58; }
    .fp32 { stroke: #56b4e9; fill: #56b4e9; }
    .bf16 { stroke: #2fc49b; fill: #2fc49b; }
    .fp8 { stroke: #ff9f43; fill: #ff9f43; }
  }
"""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    shown = escape(words.replace(" ", "\u00a0") if "code" in kind else words)
    return f'<text x="{x:g}" y="{y:g}"{attribute}>{shown}</text>'


def training(losses: dict[str, list[float]]) -> list[str]:
    """The training losses, in nats per byte, by step; each is the mean of the last SMOOTHED."""
    left, right, top, bottom = 40.0, 326.0, 70.0, 226.0
    runs = {
        name: [
            sum(run[max(0, i - SMOOTHED + 1) : i + 1]) / min(i + 1, SMOOTHED)
            for i in range(len(run))
        ]
        for name, run in losses.items()
    }
    values = [value for run in runs.values() for value in run]
    low, high = min(values), max(values)

    def point(step: int, value: float) -> str:
        x = left + (right - left) * step / (len(values) / len(runs) - 1)
        y = bottom - (bottom - top) * (value - low) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = [
        text(16, 30, "Train: the same loss in FP8", "title"),
        text(16, 52, "training loss, nats per byte", "faint"),
        f'<polyline class="axis" points="{left},{top} {left},{bottom} {right},{bottom}"/>',
    ]
    dashes = {"FP32": "", "FP8": ' stroke-dasharray="7 5"'}
    for row, (name, run) in enumerate(runs.items()):
        points = " ".join(point(step, value) for step, value in enumerate(run))
        parts.append(f'<polyline class="{name.lower()}" points="{points}"{dashes[name]}/>')
        parts.append(text(180, 96 + 20 * row, f"{name}  {run[-1]:.2f} at the end", name.lower()))
    steps = len(next(iter(losses.values())))
    parts += [
        text(left, bottom + 18, f"{steps} steps of a small transformer", "faint"),
        text(16, 276, "torchext.convert_to_fp8_training(model)", "code"),
    ]
    return parts


def serving() -> list[str]:
    """Bytes of a parameter: those of the formats, without scales (1 / 4096 of it)."""
    parts = [text(16, 30, "Serve: half of the bytes", "title")]
    for row, (name, label, size) in enumerate((("bf16", "BF16", 2), ("fp8", "FP8", 1))):
        top = 76 + 70 * row
        parts.append(
            text(16, top - 8, f"{label}: {size} byte{'s' * (size > 1)} for each parameter")
        )
        parts.append(
            f'<rect class="{name}" x="16" y="{top}" width="{156 * size}" height="30" rx="4"/>'
        )
    parts += [
        text(16, 206, "in memory and on disk, on GPUs and CPUs;", "faint"),
        text(16, 224, "a scale of 4 bytes for each 128 x 128 block", "faint"),
        text(16, 276, "torchext.quantize_for_inference(model)", "code"),
    ]
    return parts


def report() -> list[str]:
    """The lines of the report in the README, cut to the width of the card."""
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"```text\n(kernel 'reverse'.*?)```", readme, re.DOTALL)
    assert block, "the README shows no report of the kernel 'reverse'"
    parts = [text(16, 30, "Check: races, without a GPU", "title")]
    lines = [line for line in block[1].splitlines() if line.strip() and line != "..."]
    top = 62
    for line in lines:
        kind = "code error" if line.startswith("error") else "code"
        for piece in wrapped(line.removesuffix("..."), 45):
            parts.append(text(16, top, piece, kind))
            top += 18
    parts.append(text(16, 276, "torchext.sim", "code"))
    return parts


def wrapped(line: str, width: int) -> list[str]:
    """A line in pieces of at most `width` characters, cut at spaces; later ones are indented."""
    pieces = []
    while len(line) > width:
        cut = line.rindex(" ", 0, width)
        pieces.append(line[:cut])
        line = "       " + line[cut + 1 :]
    return [*pieces, line]


def picture(losses: dict[str, Any]) -> str:
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>What torchext does: it trains, it serves, it checks kernels</title>",
        f"<style>{STYLE}</style>",
    ]
    for column, parts in enumerate((training(losses["losses"]), serving(), report())):
        lines += [
            f'<g transform="translate({column * (CARD + GAP) + GAP}, 6)">',
            f'<rect class="card" width="{CARD}" height="{HEIGHT - 12}" rx="10"/>',
            *parts,
            "</g>",
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def train() -> dict[str, Any]:
    """The training losses of the notebook `train`, by step."""
    import torch

    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in code_cells(json.loads(NOTEBOOK.read_text())):
        exec("".join(cell["source"]), namespace)
        if "losses" in namespace:
            break
    return {
        "command": "python tools/draw_overview.py --train",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "losses": {name: [round(v, 4) for v in run] for name, run in namespace["losses"].items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--train", action="store_true", help="trains for the first panel's losses")
    if parser.parse_args().train:
        LOSSES.write_text(json.dumps(train(), indent=1) + "\n")
    IMAGE.write_text(picture(json.loads(LOSSES.read_text())))


if __name__ == "__main__":
    main()
