"""`inspect`: what a checkpoint is, from its headers and configuration alone."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from typing import Any

from .conversion import pattern_lines, some
from .files import open_checkpoint
from .formats import FP8, GATE_UP, Pairing, pair, unmatched_problems
from .rules import is_of_experts, is_weight


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a checkpoint is; `print` it for a summary.

    Attributes:
        path: the folder or file.
        format: such as "fine-grained FP8"; "wide" without FP8 weights.
        quant_method: of config.json, or None.
        files: names of the files of tensors.
        tensors: how many there are.
        bytes: of all tensors.
        bytes_by_dtype: {dtype, as safetensors spells it: bytes}.
        fp8_weights: how many weights are FP8.
        wide_weights: names of weights of linear layers (or embeddings) that are not FP8.
        granularities: {"block", "row" or "tensor": how many FP8 weights have such scales}.
        block_sizes: [rows, columns] of the blocks that are there.
        scale_dtypes: {dtype of scales: how many scales}.
        experts: "one by one", "3-D" or None, with whether gate and up are fused.
        activation_scales: how many static scales of activations there are.
        patterns: {pattern of modules that are not converted: names that it matched}.
        problems: one sentence each; empty for a sound checkpoint.
    """

    path: str
    format: str
    quant_method: str | None
    files: tuple[str, ...]
    tensors: int
    bytes: int
    bytes_by_dtype: dict[str, int]
    fp8_weights: int
    wide_weights: tuple[str, ...]
    granularities: dict[str, int]
    block_sizes: tuple[tuple[int, int], ...]
    scale_dtypes: dict[str, int]
    experts: str | None
    activation_scales: int
    patterns: dict[str, tuple[str, ...]]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, dicts, strings and numbers."""
        return dataclasses.asdict(self)

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict()` as JSON; `indent` as in json.dumps."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        dtypes = ", ".join(f"{dtype} {size:,}" for dtype, size in self.bytes_by_dtype.items())
        lines = [
            f"{self.path}: {self.format}",
            f"tensors: {self.tensors:,} in {len(self.files)} files",
            f"bytes: {self.bytes:,} ({dtypes})",
            f"weights: {self.fp8_weights:,} in FP8, {len(self.wide_weights):,} wide"
            + (f": {some(self.wide_weights)}" if self.wide_weights else ""),
        ]
        if self.fp8_weights:
            scales = ", ".join(f"{count:,} {dtype}" for dtype, count in self.scale_dtypes.items())
            kinds = ", ".join(f"{count:,} by {kind}" for kind, count in self.granularities.items())
            blocks = ", ".join(f"{rows}x{columns}" for rows, columns in self.block_sizes)
            lines.append(f"scales: {scales}; {kinds}{f', blocks of {blocks}' * bool(blocks)}")
        if self.experts:
            lines.append(f"experts: {self.experts}")
        if self.activation_scales:
            lines.append(f"static scales of activations: {self.activation_scales:,}")
        lines += pattern_lines(self.patterns)
        return "\n".join(lines + [f"problem: {problem}" for problem in self.problems])


def inspect(
    path: str | os.PathLike[str],
    *,
    weight_block_size: tuple[int, int] | None = None,
    gate_up: str | None = None,
) -> Inspection:
    """Says what a checkpoint is. Reads headers and config.json, and no tensor.

    Args:
        path: a folder with safetensors files, or one file.
        weight_block_size, gate_up: as in `convert`.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, or the index disagrees with the
            files. Other problems are in the result.
    """
    checkpoint = open_checkpoint(path)
    pairing = pair(checkpoint, weight_block_size, gate_up)
    by_dtype: collections.Counter[str] = collections.Counter()
    for entry in checkpoint.entries.values():
        by_dtype[entry.dtype] += entry.nbytes
    weights = pairing.weights.values()
    scales = {weight.scale.name for weight in weights}
    return Inspection(
        path=str(checkpoint.path),
        format=_format(pairing),
        quant_method=pairing.scheme.method,
        files=tuple(file.name for file in checkpoint.files),
        tensors=len(checkpoint.entries),
        bytes=sum(by_dtype.values()),
        bytes_by_dtype=dict(by_dtype.most_common()),
        fp8_weights=sum(entry.dtype in FP8 for entry in checkpoint.entries.values()),
        wide_weights=tuple(
            name
            for name, entry in checkpoint.entries.items()
            if is_weight(entry) and name not in scales
        ),
        granularities=dict(collections.Counter(weight.granularity for weight in weights)),
        block_sizes=tuple(sorted({weight.block for weight in weights if weight.block})),
        scale_dtypes=dict(collections.Counter(weight.scale.dtype for weight in weights)),
        experts=_experts(checkpoint.entries, pairing),
        activation_scales=len(pairing.activation_scales),
        patterns={pattern: tuple(names) for pattern, names in pairing.patterns.matched.items()},
        problems=(
            *pairing.problems,
            *unmatched_problems(pairing.patterns, "quantization_config of config.json"),
        ),
    )


def _format(pairing: Pairing) -> str:
    weights = list(pairing.weights.values())
    if not weights:
        return "wide"
    kinds = {weight.granularity for weight in weights}
    compressed = pairing.scheme.method == "compressed-tensors"
    if "block" in kinds:
        return "compressed-tensors FP8_BLOCK" if compressed else "fine-grained FP8"
    names = {"row": "row-wise FP8", "tensor": "per-tensor FP8"}
    text = " and ".join(sorted(names[kind] for kind in kinds))
    return f"compressed-tensors, {text}" if compressed else text


def _experts(entries: Any, pairing: Pairing) -> str | None:
    names = [name for name in entries if "experts" in name.split(".")]
    if not names:
        return None
    three_d = [name for name in names if is_of_experts(name, entries[name].shape)]
    fused = any(GATE_UP in name.split(".") for name in names)
    text = f"{'3-D' if three_d else 'one by one'}, gate and up "
    text += "in one tensor" if fused else "apart"
    if any(weight.halves == 2 for weight in pairing.weights.values()):
        text += ", with blocks of their own"
    return text
