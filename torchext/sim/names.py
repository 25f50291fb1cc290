"""Kernels by the names that people call them: the symbol, or a plain C++ name that is unique."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torchext import _sim


def signature(symbol: str) -> str:
    """The C++ signature of a symbol: "void scale<128>(float*)" of "_Z5scaleILi128EEvPf".

    A name that is no C++ symbol is returned unchanged.
    """
    return _sim.demangle(symbol)


def _spellings(symbol: str) -> set[str]:
    """The names that stand for a kernel: the symbol, the C++ signature, and the C++ name with or
    without parameters, template arguments and namespaces."""
    full = _sim.short_name(symbol)
    bare = full
    while (shorter := re.sub(r"<[^<>]*>|\[[^\[\]]*\]", "", bare)) != bare:
        bare = shorter
    return {symbol, signature(symbol), full, bare, bare.rpartition("::")[2]}


def find(name: str, symbols: Sequence[str], where: str) -> str:
    """The symbol that `name` stands for; raises ValueError if there is none, or more than one."""
    if name in symbols:
        return name
    found = [symbol for symbol in symbols if name in _spellings(symbol)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{where}: name must be that of one kernel (got {name!r}, which {len(found)} share); "
            "use " + ", ".join(f"{signature(symbol)!r}" for symbol in found)
        )
    raise ValueError(
        f"{where}: name must be a kernel of the module (got {name!r}); the module has "
        f"{', '.join(signature(symbol) for symbol in symbols) or 'none'}"
    )
