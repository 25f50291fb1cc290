"""Kernels by the names that people call them: the symbol, or a plain C++ name that is unique."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torchext import _sim


def signature(symbol: str) -> str:
    """Such as "void scale<128>(float*)" of "_Z5scaleILi128EEvPf"; other names unchanged."""
    text: str = _sim.demangle(symbol)
    return text


def _spellings(symbol: str) -> set[str]:
    """What a kernel may be called: with parameters, template arguments, namespaces, or without."""
    full: str = _sim.short_name(symbol)
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
            f"{where}: there are {len(found)} kernels {name!r}; expected one of "
            + ", ".join(f"{signature(symbol)!r}" for symbol in found)
        )
    raise ValueError(
        f"{where}: there is no kernel {name!r}; the module has "
        f"{', '.join(signature(symbol) for symbol in symbols) or 'none'}"
    )
