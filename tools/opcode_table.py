"""Makes the opcode tables of ptx/sim/README.md from the tables of the simulator.

python tools/opcode_table.py            prints the tables
python tools/opcode_table.py --write    writes the tables into the README
"""

import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from torchext import _sim

README = Path(__file__).resolve().parents[1] / "ptx" / "sim" / "README.md"
BEGIN = "<!-- begin: python tools/opcode_table.py --write -->\n"
END = "<!-- end -->\n"


def table() -> str:
    """Markdown: the opcodes by file, then the meanings of their classes."""
    lines = [
        "| file | opcodes | class | unit | least target |",
        "| :-- | :-- | :-- | :-- | :-- |",
    ]

    def facts(row: dict[str, Any]) -> tuple[str, str, str, str]:
        return row["file"], ", ".join(row["classes"]), ", ".join(row["units"]), row["target"]

    for (file, classes, units, target), rows in groupby(sorted(_sim.opcodes(), key=facts), facts):
        opcodes = ", ".join(sorted(row["opcode"] for row in rows))
        lines.append(f"| `{file}` | {opcodes} | {classes} | {units} | {target or 'any'} |")
    lines += ["", "| unit | class | instructions |", "| :-- | :-- | :-- |"]
    for row in _sim.op_classes():
        lines.append(f"| {row['unit']} | {row['class']} | {row['text']} |")
    return "\n".join(lines) + "\n"


def with_table(readme: str) -> str:
    """The README's text with the table between its markers."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END, 1)[1]


def main() -> None:
    if sys.argv[1:] == ["--write"]:
        README.write_text(with_table(README.read_text()))
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
