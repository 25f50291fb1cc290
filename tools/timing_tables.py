"""Writes the tables of docs/timing.md from csrc/runtime/timing.inc, as compiled into torchext._sim.

python tools/timing_tables.py            writes the tables
python tools/timing_tables.py --check    fails if the document's tables are not up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

from torchext import _sim

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "timing.md"
BEGIN = "<!-- tools/timing_tables.py writes these tables -->\n"
END = "<!-- end of the tables -->\n"


def tables() -> str:
    lines = [
        "| GPU | SMs | memory, GB/s | L2, MB | MHz: FP8 `wgmma`; other tensor cores; none "
        "| sources |",
        "| :-- | --: | --: | --: | :-- | :-- |",
    ]
    for g in _sim.timing_gpus():
        clocks = f"{g['fp8_mhz']:.0f}; {g['tensor_mhz']:.0f}; {g['other_mhz']:.0f}"
        lines.append(
            f"| `{g['name']}` | {g['sms']} | {g['gigabytes_per_second']:.0f} | "
            f"{g['l2_megabytes']:.0f} | {clocks} | {g['source']} |"
        )
    lines += [
        "",
        "| constant | value | unit | grade | source |",
        "| :-- | --: | :-- | :-- | :-- |",
    ]
    for name, value, unit, fitted, grade, source in _sim.timing_constants():
        may = ", may be fitted" if fitted else ""
        lines.append(f"| `{name}` | {value:g} | {unit} | {grade}{may} | {source} |")
    return "\n".join(lines) + "\n"


def document() -> str:
    """The document with its tables as they should be."""
    before, rest = DOCUMENT.read_text().split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + "\n" + tables() + "\n" + END + after


def main(arguments: list[str]) -> int:
    if "--check" in arguments:
        if document() != DOCUMENT.read_text():
            print(f"{DOCUMENT.name} is not up to date: run python tools/timing_tables.py")
            return 1
        return 0
    DOCUMENT.write_text(document())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
