"""Writes ptx/isa/generated/wgmma_shapes.h: wgmma for every N that a kernel here uses.

    python tools/generate_wgmma.py

For another N, add it to SHAPES and run this. A test compares the file with what this writes.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

HEADER = Path(__file__).parents[1] / "ptx" / "isa" / "generated" / "wgmma_shapes.h"
SHAPES = (16, 32, 64, 128, 192)  # N; PTX allows multiples of 8 up to 256
FORMATS = ("e4m3", "e5m2")


def lines_of(items: list[str], indent: str, per_line: int) -> list[str]:
    """The items with commas between them."""
    rows = [items[i : i + per_line] for i in range(0, len(items), per_line)]
    return [
        indent + ", ".join(row) + ("," if index + 1 < len(rows) else "")
        for index, row in enumerate(rows)
    ]


def wrapper(n: int, a: str, b: str) -> str:
    registers = n // 2
    names = lines_of([f"%{i}" for i in range(registers)], "", 16)
    quoted = [f'    "{row} "' for row in names]
    operands = lines_of([f'"+f"(d[{i}])' for i in range(registers)], "      ", 6)
    operands[0] = "    : " + operands[0].strip()
    return "\n".join([
        f"TORCHEXT_PTX void wgmma_m64nNk32({a}, {b}, float (&d)[{registers}],",
        "                                  uint64_t a, uint64_t b, int scale_d) {",
        "  asm volatile(",
        r'    "{\n"',
        r'    ".reg .pred accumulate;\n"',
        rf'    "setp.ne.b32 accumulate, %{registers + 2}, 0;\n"',
        f'    "wgmma.mma_async.sync.aligned.m64n{n}k32.f32.{a}.{b} {{"',
        *quoted,
        rf'    "}}, %{registers}, %{registers + 1}, accumulate, 1, 1;\n"',
        '    "}"',
        *operands,
        '    : "l"(a), "l"(b), "r"(scale_d));',
        "}",
    ])  # fmt: skip


def text() -> str:
    wrappers = [wrapper(n, a, b) for n, (a, b) in product(SHAPES, product(FORMATS, FORMATS))]
    return "\n".join([
        "// wgmma_m64nNk32(A, B, d, a, b, scale_d): D[64, N] (+)= A[64, 32] * B[N, 32].T.",
        "// The length of d, N / 2 registers, tells N. scale_d = 0 overwrites D, 1 adds to it.",
        "// Order of instructions and layout of D: ../wgmma.h, which includes this file.",
        "// Written by tools/generate_wgmma.py, never by hand.",
        "#pragma once",
        "",
        '#include "../common.h"',
        '#include "../formats.h"',
        "",
        "namespace ptx {",
        "",
        "// clang-format off",
        "\n\n".join(wrappers),
        "// clang-format on",
        "",
        "}  // namespace ptx",
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    HEADER.parent.mkdir(exist_ok=True)
    HEADER.write_text(text())
