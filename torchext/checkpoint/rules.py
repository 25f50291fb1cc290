"""Decides which wide tensors are quantized, and into which tensors each one goes."""

from __future__ import annotations

import dataclasses
import math

from .._conversion_rules import HEAD_NAMES, ROUTER_NAMES
from .._dispatch.layout import GROUP, ceil_div
from .._patterns import Patterns
from .files import CheckpointError, Spec
from .formats import GATE_UP, WIDE, is_ambiguous, module_of

NOT_A_WEIGHT = "no weight of a linear layer or of experts"

_EMBEDDING_NAMES = {"wte", "wpe", "shared"}


def is_of_experts(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a 3-D parameter [E, N, K] of experts."""
    return len(shape) == 3 and "experts" in name.split(".")[-2:-1]


def is_weight(spec: Spec) -> bool:
    """Whether a tensor could be a wide weight of a linear layer or of experts."""
    is_matrix = spec.name.endswith(".weight") and len(spec.shape) == 2
    return spec.dtype in WIDE and (is_matrix or is_of_experts(spec.name, spec.shape))


def why_wide(spec: Spec, patterns: Patterns) -> str | None:
    """The reason why a wide tensor is not quantized; None if it is. Notes what patterns match.

    Rules see only the name, the dtype and the shape, so that a stream of tensors gives the same
    result as a checkpoint. They are those of `convert_to_fp8_training`, as far as names tell.
    """
    module = module_of(spec.name)
    pattern = patterns.match(module)
    if not is_weight(spec):
        return NOT_A_WEIGHT
    if pattern is not None:
        return f"{pattern!r} of modules_to_not_convert matches it"
    *path, name = module.split(".")
    if any("embed" in segment for segment in path) or "embed" in name or name in _EMBEDDING_NAMES:
        return "embedding"
    if name in HEAD_NAMES and not any(segment.isdigit() for segment in path):
        return "output head: its error goes straight into the loss"
    rows, columns = spec.shape[-2:]
    if "router" in path or (name in ROUTER_NAMES and rows < columns):
        return "router: its error changes which expert a token goes to"
    if min(rows, columns) < GROUP:
        return f"fewer than {GROUP} in or out features: smaller than one scale group"
    return None


@dataclasses.dataclass(frozen=True)
class Part:
    """One weight of the result: rows of some matrices of a weight.

    Attributes:
        name: of the weight; its scale is `scale_name`.
        shape: [N, K] or [E, N, K].
        matrices: which matrices it takes.
        start, stop: which rows of each.
    """

    name: str
    shape: tuple[int, ...]
    matrices: range
    start: int
    stop: int

    @property
    def scale_name(self) -> str:
        return f"{self.name}_scale_inv"

    @property
    def scale_shape(self) -> tuple[int, ...]:
        *lead, rows, columns = self.shape
        return (*lead, ceil_div(rows, GROUP), ceil_div(columns, GROUP))


def parts_of(name: str, shape: tuple[int, ...], experts: str) -> list[Part]:
    """The weights that a weight becomes: itself, or one for each expert, gate and up apart."""
    *lead, rows, columns = shape
    matrices = math.prod(lead)
    if experts == "keep" or not is_of_experts(name, shape):
        return [Part(name, shape, range(matrices), 0, rows)]
    module, _, last = name.rpartition(".")
    names = {last: (0, rows)}
    if last == GATE_UP:
        half = rows // 2
        names = {"gate_proj": (0, half), "up_proj": (half, rows)}
    return [
        Part(f"{module}.{e}.{n}.weight", (b - a, columns), range(e, e + 1), a, b)
        for e in range(matrices)
        for n, (a, b) in names.items()
    ]


def require_readable(part: Part) -> None:
    """Raises CheckpointError if no reader could tell which rows the scales of `part` belong to."""
    if is_ambiguous(part.shape[-2], GROUP, part.name, part.shape):
        raise CheckpointError(
            f"{part.name} must have gate and up of another number of rows to be written with both "
            f"in one tensor (got {part.shape[-2] // 2} rows each, for which the scales' shape does "
            'not tell whether they share a block); pass experts="one_by_one"'
        )
