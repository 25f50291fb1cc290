"""Joins experts that a checkpoint has one by one into 3-D tensors, as transformers 5 holds them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from .._dispatch.layout import GROUP
from .files import Checkpoint, CheckpointError, Spec
from .formats import GATE_UP, is_ambiguous
from .steps import Stack, Step

_EXPERT = re.compile(r"(?P<module>(?:.*\.)?experts)\.(?P<number>\d+)\.(?P<name>.+)")
PARTS = ("gate_proj", "up_proj")  # the halves of GATE_UP, from top to bottom


def stack_experts(
    checkpoint: Checkpoint, steps: Sequence[Step]
) -> tuple[list[Step], dict[str, str], str | None]:
    """Puts a Stack in place of the steps of experts' weights.

    Args:
        checkpoint: the source.
        steps: one for each tensor of the source.

    Returns:
        The steps; {name of an expert's weight: that of the stack}; and "apart" if the scales of a
        stack of gate and up do not tell that they have blocks of their own, else None.

    Raises:
        CheckpointError: experts are missing or differ, or have tensors other than weights.
    """
    modules: dict[str, dict[str, dict[int, Step]]] = {}  # module, name of a matrix, number
    result: list[Step | str] = []
    for step in steps:
        name = step.sources[0].name
        match = _EXPERT.fullmatch(name)
        if match is None:
            result.append(step)
            continue
        module, number, last = match["module"], int(match["number"]), match["name"]
        if not last.endswith(".weight") or len(step.sources[0].shape) != 2:
            raise CheckpointError(
                f"{step.sources[0].where} must be a matrix X.weight for experts to be stacked (got "
                f"{list(step.sources[0].shape)}); keep the experts one by one"
            )
        if module not in modules:
            modules[module] = {}
            result.append(module)
        matrices = modules[module].setdefault(last.removesuffix(".weight"), {})
        matrices[number] = step
    if not modules:
        raise CheckpointError(
            f"{checkpoint.path} must have experts one by one to be stacked (got no name such as "
            'X.experts.0.up_proj.weight); pass experts="keep"'
        )
    stacks = {module: _stacks(module, matrices) for module, matrices in modules.items()}
    every = [stack for found in stacks.values() for stack in found]
    ambiguous = [stack for stack in every if _is_ambiguous(stack)]
    if ambiguous and not checkpoint.config:
        raise CheckpointError(
            f"{ambiguous[0].name} must have a config.json beside it, which says that gate and up "
            f"have blocks of their own (got {checkpoint.path} without one); keep the experts one "
            "by one"
        )
    flat: list[Step] = []
    for item in result:
        flat += stacks[item] if isinstance(item, str) else [item]
    names = {entry.name: stack.name for stack in every for entry in stack.sources}
    return flat, names, "apart" if ambiguous else None


def _stacks(module: str, matrices: dict[str, dict[int, Step]]) -> list[Stack]:
    rows: dict[str, tuple[str, ...]] = {name: (name,) for name in matrices}
    if set(PARTS) <= rows.keys():
        rows = {GATE_UP: PARTS, **{n: r for n, r in rows.items() if n not in PARTS}}
    count = max(number for found in matrices.values() for number in found) + 1
    stacks = []
    for name, parts in rows.items():
        for part in parts:
            missing = [e for e in range(count) if e not in matrices[part]]
            if missing:
                raise CheckpointError(
                    f"{module} must have {part}.weight of {count} experts to be stacked (got none "
                    f"of expert {missing[0]}{' and others' * (len(missing) > 1)}); get the files "
                    "that hold them"
                )
        experts = [[matrices[part][e] for part in parts] for e in range(count)]
        _require_alike(experts)
        stacks.append(Stack(f"{module}.{name}", experts))
    return stacks


def _require_alike(experts: Iterable[Sequence[Step]]) -> None:
    """Raises CheckpointError if matrices differ in what they become."""
    first: Sequence[Step] = ()
    for steps in experts:
        first = first or steps
        for step, like in zip(steps, first, strict=True):
            if _kinds(step.outputs) != _kinds(like.outputs):
                raise CheckpointError(
                    f"{step.sources[0].where} must become what {like.sources[0].name} becomes to "
                    f"be stacked with it (got {_text(step)} and {_text(like)}); quantize all "
                    "experts or none, or keep them one by one"
                )
    above, *below = first
    for step in below:  # gate above up
        if _kinds(step.outputs) != _kinds(above.outputs):
            raise CheckpointError(
                f"{step.sources[0].where} must become what {above.sources[0].name} becomes to be "
                f"stacked with it (got {_text(step)} and {_text(above)}); keep them one by one"
            )


def _kinds(specs: Iterable[Spec]) -> list[tuple[str, tuple[int, ...]]]:
    return [(spec.dtype, spec.shape) for spec in specs]


def _text(step: Step) -> str:
    return " and ".join(f"{spec.dtype} {list(spec.shape)}" for spec in step.outputs)


def _is_ambiguous(stack: Stack) -> bool:
    data, *scale = stack.outputs
    return bool(scale) and is_ambiguous(data.shape[1], GROUP, data.name, data.shape)
