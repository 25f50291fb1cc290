"""Matches module names by segments and globs, and remembers what each pattern matched."""

from __future__ import annotations

import re
from collections.abc import Iterable

_WILDCARDS = re.compile(r"\Are:|[*?[]|\.weight\Z")
_GLOBS = {"*": "[^.]*", "?": "[^.]"}


class Patterns:
    """Patterns of module names, such as those of a checkpoint's `modules_to_not_convert`.

    A pattern is a run of whole segments of a name, between dots, with globs in each segment:
    `mlp.gate` matches `model.layers.3.mlp.gate` and what is within it, but not
    `model.layers.3.mlp.gate_up_proj`; `layers.*.mlp` matches that of every layer. A pattern that
    begins with `re:` is a regular expression that must match from the beginning of the name, as
    in compressed-tensors.

    Attributes:
        matched: for each pattern the names that it matched so far.
    """

    def __init__(self, patterns: Iterable[str], argument: str) -> None:
        """argument: "NAME: ARGUMENT" of errors. Raises TypeError, or ValueError for a pattern that
        cannot be read."""
        if isinstance(patterns, str) or not isinstance(patterns, Iterable):
            raise TypeError(
                f"{argument} must be patterns of names (got {patterns!r}); pass a list of strings"
            )
        self.matched: dict[str, list[str]] = {pattern: [] for pattern in patterns}
        # Names are tens of thousands, and patterns hundreds, most of them whole names: those are
        # looked up, and only the others are tried one by one.
        self._tried = {p: _compiled(p, argument) for p in self.matched if _WILDCARDS.search(p)}

    def match(self, name: str) -> str | None:
        """A pattern that matches `name`, or None. Every pattern that does is noted."""
        found = self.all_matching(name)
        for pattern in found:
            self.matched[pattern].append(name)
        return found[0] if found else None

    def all_matching(self, name: str) -> list[str]:
        """The patterns that match `name`, in any order."""
        found = [pattern for pattern in _runs(name) if pattern in self.matched]
        return found + [pattern for pattern, test in self._tried.items() if test.match(name)]

    @property
    def unmatched(self) -> list[str]:
        """The patterns that matched no name so far."""
        return [pattern for pattern, names in self.matched.items() if not names]


def _runs(name: str) -> set[str]:
    """Every run of whole segments of a name."""
    segments = name.split(".")
    ends = range(1, len(segments) + 1)
    return {".".join(segments[start:end]) for end in ends for start in range(end)}


def _compiled(pattern: str, argument: str) -> re.Pattern[str]:
    """The regular expression that matches names from their beginning."""
    try:
        if pattern.startswith("re:"):
            return re.compile(pattern[3:])
        segments = map(_segment, pattern.removesuffix(".weight").split("."))
        return re.compile(rf"(?:.*\.)?{'[.]'.join(segments)}(?:\Z|\.)")
    except re.error as error:
        raise ValueError(
            f"{argument} must have globs, or regular expressions after re: (got {pattern!r}: "
            f"{error}); correct it"
        ) from None


def _segment(glob: str) -> str:
    """The regular expression of a segment: `*` and `?` match no dot, `[...]` is a set."""
    expression = ""
    for piece in re.findall(r"\[!?[^]]+\]|.", glob):
        if piece in _GLOBS:
            expression += _GLOBS[piece]
        elif len(piece) > 1:
            expression += piece.replace("[!", "[^", 1)
        else:
            expression += re.escape(piece)
    return expression
