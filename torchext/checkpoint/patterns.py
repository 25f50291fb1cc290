"""Matches module names by segments and globs, and remembers what each pattern matched."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

_WILDCARDS = re.compile(r"\Are:|[*?[]|\.weight\Z")


class Patterns:
    """Patterns of module names, such as those of `modules_to_not_convert`.

    A pattern is a run of whole segments of a name, between dots, with globs in each segment:
    `mlp.gate` matches `model.layers.3.mlp.gate` and what is within it, but not
    `model.layers.3.mlp.gate_up_proj`; `layers.*.mlp` matches that of every layer. A pattern that
    begins with `re:` is a regular expression that must match from the beginning of the name, as
    in compressed-tensors.

    Attributes:
        matched: for each pattern the names that it matched so far.
    """

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        if isinstance(patterns, str):
            raise TypeError(
                "torchext.checkpoint: modules_to_not_convert must be patterns (got a str); pass a "
                f"list, [{patterns!r}]"
            )
        self.matched: dict[str, list[str]] = {pattern: [] for pattern in patterns}
        # Configurations list hundreds of whole names; these are looked up, not tried one by one.
        self._tried = [pattern for pattern in self.matched if _WILDCARDS.search(pattern)]
        for pattern in self._tried:
            _matches(pattern, "")  # an invalid regular expression raises here

    def match(self, name: str) -> str | None:
        """A pattern that matches `name`, or None. Every pattern that does is noted."""
        found = [pattern for pattern in _runs(name) if pattern in self.matched]
        found += [pattern for pattern in self._tried if _matches(pattern, name)]
        for pattern in found:
            self.matched[pattern].append(name)
        return found[0] if found else None

    @property
    def unmatched(self) -> list[str]:
        """The patterns that matched no name so far."""
        return [pattern for pattern, names in self.matched.items() if not names]


def _runs(name: str) -> set[str]:
    """Every run of whole segments of a name."""
    segments = name.split(".")
    ends = range(1, len(segments) + 1)
    return {".".join(segments[start:end]) for end in ends for start in range(end)}


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error as error:
            raise ValueError(
                f"torchext.checkpoint: {pattern!r} must be a regular expression after re: (got "
                f"{error}); correct it"
            ) from None
    globs = pattern.removesuffix(".weight").split(".")
    segments = name.split(".")
    return any(
        all(map(fnmatch.fnmatchcase, segments[start:], globs))
        for start in range(len(segments) - len(globs) + 1)
    )
