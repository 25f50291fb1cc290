"""Compares what a program prints with what a document shows."""

from __future__ import annotations

import re

import pytest

NUMBER = r"\d+\.\d+"


def assert_prints(printed: str, shown: str, where: str = "") -> None:
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
    assert match, f"{where} shows:\n{shown}\nprinted:\n{printed}"
    assert [float(number) for number in match.groups()] == pytest.approx(expected, rel=0.05)
