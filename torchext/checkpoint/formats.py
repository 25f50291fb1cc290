"""Tells the FP8 formats apart: which scale belongs to which weight, and to which elements."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .._dispatch.layout import GROUP, ceil_div
from .._patterns import Patterns
from ..ops.quantize import dequantize
from .files import Checkpoint, CheckpointError, Entry, Reader

Block = tuple[int, int]

FP8 = ("F8_E4M3", "F8_E5M2")
WIDE = ("F32", "BF16", "F16")
_SCALES = (*WIDE, "F8_E8M0", "U8")
_MX_BLOCK = (1, 32)
_ACTIVATION_SCALES = ("input_scale", "activation_scale", "input_activation_scale", "qscale_act")
GATE_UP = "gate_up_proj"
# torchext's key in quantization_config: whether gate and up of 3-D experts share blocks.
GATE_UP_BLOCKS = "gate_up_blocks"
SKIPPED = "torchext.checkpoint: modules_to_not_convert"  # of errors


def module_of(name: str) -> str:
    """The module that holds a weight; a 3-D parameter stands for itself."""
    return name.removesuffix(".weight")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What the quantization_config of a checkpoint says.

    Attributes:
        method: "fp8", "compressed-tensors" or another quant_method; None without such a config.
        block: the rows and columns of a block, or None.
        granularities: those that weights may have, of "block", "row" and "tensor".
        patterns: of modules that are not converted.
        pow2: whether scales are said to be powers of two.
        gate_up: "fused" or "apart": whether gate and up of 3-D experts share blocks, where shapes
            do not tell; None if it is not said.
    """

    method: str | None = None
    block: Block | None = None
    granularities: tuple[str, ...] = ("block", "row", "tensor")
    patterns: tuple[str, ...] = ()
    pow2: bool = False
    gate_up: str | None = None


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization_config of a config.json, wherever it is."""
    text = config.get("text_config") or {}
    for place in (config, text):
        for key in ("quantization_config", "compression_config"):
            if place.get(key):
                found: Mapping[str, Any] = place[key]
                return found
    return None


def scheme_of(config: Mapping[str, Any]) -> Scheme:
    """Reads the quantization_config of a config.json."""
    found = quantization_config(config)
    if found is None:
        return Scheme()
    method = found.get("quant_method")
    if method == "compressed-tensors":
        weights = [group.get("weights") or {} for group in found.get("config_groups", {}).values()]
        blocks = {tuple(w["block_structure"]) for w in weights if w.get("block_structure")}
        if len(blocks) > 1:
            raise CheckpointError(
                f"config_groups of config.json must have one block_structure (got {sorted(blocks)})"
                "; pass weight_block_size"
            )
        names = {"block": "block", "channel": "row", "tensor": "tensor"}
        strategies = {names.get(w.get("strategy", ""), w.get("strategy", "")) for w in weights}
        return Scheme(
            method, blocks.pop() if blocks else None, tuple(sorted(strategies)),
            tuple(found.get("ignore") or ()),
        )  # fmt: skip
    block = found.get("weight_block_size")
    granularities = ("block", "tensor") if block else Scheme.granularities
    patterns = found.get("modules_to_not_convert") or found.get("ignored_layers") or ()
    return Scheme(
        method, tuple(block) if block else None, granularities,
        tuple(patterns), found.get("scale_fmt") == "ue8m0", found.get(GATE_UP_BLOCKS),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Weight:
    """An FP8 weight and its scale.

    Attributes:
        entry: [N, K], or [E, N, K] with a matrix for each expert.
        scale: its scale, a multiplier.
        granularity: "block", "row" or "tensor".
        block: rows and columns of a block; None unless the granularity is "block".
        halves: 2 if the gate, the first N / 2 rows, and up, the others, have blocks of their own.
    """

    entry: Entry
    scale: Entry
    granularity: str
    block: Block | None = None
    halves: int = 1

    @property
    def matrices(self) -> int:
        return math.prod(self.entry.shape[:-2])

    @property
    def rows(self) -> int:
        return self.entry.shape[-2]

    @property
    def columns(self) -> int:
        return self.entry.shape[-1]

    def load_scale(self, reader: Reader) -> Tensor:
        """[E, rows of the scale, columns of the scale], float32, on the CPU.

        Raises:
            CheckpointError: a scale is not finite, or not positive.
        """
        stored = reader.read(self.scale)
        if self.scale.dtype == "U8":
            stored = stored.view(torch.float8_e8m0fnu)
        scale = stored.float()
        wrong = ~(scale.isfinite() & (scale > 0))
        if wrong.any():
            raise CheckpointError(
                f"{self.scale.where} must have finite scales above 0 (got {int(wrong.sum())} of "
                f"{scale.numel()} that are not, such as {scale[wrong][0].item()}); the checkpoint "
                "is damaged or was quantized from weights with NaN or Inf"
            )
        if self.granularity == "tensor":
            per_matrix = scale.reshape(-1, 1, 1)
            return per_matrix.expand(self.matrices, 1, 1)
        if self.granularity == "row":
            return scale.reshape(self.matrices, self.rows, 1)
        return scale.reshape(self.matrices, -1, scale.shape[-1])

    def segments(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The rows from `start` to `stop` in runs that lie in one half."""
        half = self.rows // self.halves
        while start < stop:
            end = min(stop, (start // half + 1) * half)
            yield start, end
            start = end

    def scale_of(self, scale: Tensor, matrix: int, start: int, stop: int) -> Tensor:
        """The part of a loaded scale that belongs to rows of one half."""
        if self.granularity == "tensor":
            return scale[matrix]
        if self.granularity == "row":
            return scale[matrix, start:stop]
        assert self.block is not None
        half = start // (self.rows // self.halves)
        first_row = half * (self.rows // self.halves)
        first_scale = half * (scale.shape[1] // self.halves)
        return scale[
            matrix,
            first_scale + (start - first_row) // self.block[0] : first_scale
            + ceil_div(stop - first_row, self.block[0]),
        ]

    def dequantize(
        self, data: Tensor, scale: Tensor, matrix: int, rows: range, dtype: torch.dtype
    ) -> Tensor:
        """Rows of a matrix in `dtype`: data * scale, rounded to FP32 and then to `dtype`.

        `data` is the whole weight, and `scale` what `load_scale` returned.
        """
        data = data.reshape(self.matrices, self.rows, self.columns)[matrix]
        bands = []
        for first, last in self.segments(rows.start, rows.stop):
            # A block that `first` cuts has one row of scales, and needs a call of its own.
            of_half = first % (self.rows // self.halves)
            inside = of_half % self.block[0] if self.block else 0
            head = min(last, first - inside + self.block[0]) if self.block and inside else first
            for a, b in ((first, head), (head, last)):
                if a < b:
                    of_rows = self.scale_of(scale, matrix, a, b)
                    bands.append(_dequantize(data[a:b], of_rows, self.block, dtype))
        return torch.cat(bands) if len(bands) > 1 else bands[0]


def _dequantize(data: Tensor, scale: Tensor, block: Block | None, dtype: torch.dtype) -> Tensor:
    if block is None or block == (GROUP, GROUP):
        return dequantize(data, scale, out_dtype=dtype)
    rows, columns = data.shape
    wide = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (data.float() * wide).to(dtype)


@dataclasses.dataclass(frozen=True)
class Pairing:
    """Every FP8 weight with its scale, and what is wrong.

    Attributes:
        weights: by name of the weight.
        activation_scales: names of static scales of activations of FP8 weights.
        scheme: what the configuration says.
        patterns: those of the configuration, and the modules that they matched.
        problems: one sentence each.
    """

    weights: Mapping[str, Weight]
    activation_scales: frozenset[str]
    scheme: Scheme
    patterns: Patterns
    problems: tuple[str, ...]


def pair(
    checkpoint: Checkpoint, weight_block_size: Block | None = None, gate_up: str | None = None
) -> Pairing:
    """Finds the scale of each FP8 weight of a checkpoint.

    Args:
        checkpoint: its headers.
        weight_block_size: the block to assume in place of the configuration's.
        gate_up: "fused" or "apart": whether the gate and up of 3-D `gate_up_proj`s share blocks,
            where the shapes do not tell.
    """
    scheme = scheme_of(checkpoint.config)
    if weight_block_size is not None:
        scheme = dataclasses.replace(
            scheme, block=weight_block_size, granularities=Scheme.granularities
        )
    entries, problems = checkpoint.entries, []
    weights: dict[str, Weight] = {}
    patterns = Patterns(scheme.patterns, SKIPPED)
    for name, entry in entries.items():
        pattern = None
        if _base_of_scale(name) is None and not name.endswith(_ACTIVATION_SCALES):
            pattern = patterns.match(module_of(name))
        if entry.dtype not in FP8:
            continue
        if pattern is not None:
            problems.append(
                f"{entry.where} must be wide, since {pattern!r} of the configuration matches it "
                f"(got {entry.dtype}); correct modules_to_not_convert or ignore in config.json"
            )
        scale = _scale_of(entry, entries)
        if scale is None:
            problems.append(
                f"{entry.where} must have a scale (got {entry.dtype} and none of "
                f"{', '.join(_candidates(name))}); without it the weight would be wrong by a "
                "factor of hundreds, so get the files that hold the scales"
            )
            continue
        weight = _fit(entry, scale, scheme, gate_up or scheme.gate_up)
        if isinstance(weight, Weight):
            weights[name] = weight
        else:
            problems.append(weight)
    if ties_head(checkpoint.config):
        patterns.match("lm_head")
    used = {weight.scale.name for weight in weights.values()}
    used |= {  # those of weights with problems of their own
        scale.name
        for name, entry in entries.items()
        if entry.dtype in FP8 and name not in weights and (scale := _scale_of(entry, entries))
    }
    for name, entry in entries.items():
        base = _base_of_scale(name)
        if base is not None and name not in used:
            got = next((entries[b] for b in base if b in entries), None)
            problems.append(
                f"{entry.where} must belong to an FP8 weight (got "
                f"{got or 'no ' + ' or '.join(base)}); get the file that holds the weight, or "
                "remove the scale"
            )
    activation_scales = frozenset(
        name
        for name in entries
        if name.endswith(_ACTIVATION_SCALES) and name.rpartition(".")[0] + ".weight" in weights
    )
    return Pairing(weights, activation_scales, scheme, patterns, tuple(problems))


def unmatched_problems(patterns: Patterns, argument: str) -> list[str]:
    """A sentence for each pattern that matched nothing."""
    return [
        f"{argument} must have patterns that match a module (got {pattern!r}, which matches none "
        "of the checkpoint's); correct or remove it, or pass allow_unmatched=True"
        for pattern in patterns.unmatched
    ]


def ties_head(config: Mapping[str, Any]) -> bool:
    """Whether the model has an lm_head that is in no file, since it is the embedding."""
    text = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))


def _candidates(name: str) -> list[str]:
    names = [f"{name}_scale_inv", f"{name}_scale"]
    if name.endswith(".weight"):
        module = module_of(name)
        names += [f"{module}.qscale_weight", f"{module}.scale"]
    return names


def _scale_of(entry: Entry, entries: Mapping[str, Entry]) -> Entry | None:
    return next((entries[name] for name in _candidates(entry.name) if name in entries), None)


def _base_of_scale(name: str) -> tuple[str, ...] | None:
    """The weights that a scale of this name may belong to; None for names of other tensors."""
    if name.endswith("_scale_inv"):
        return (name.removesuffix("_scale_inv"),)
    if name.endswith(".weight_scale"):
        return (name.removesuffix("_scale"),)
    if name.endswith(".qscale_weight"):
        return (name.removesuffix("qscale_weight") + "weight",)
    return None


def is_ambiguous(rows: int, block_rows: int, name: str, shape: tuple[int, ...]) -> bool:
    """Whether the scales of a 3-D gate_up_proj with `rows` rows do not tell if gate and up share
    the block in the middle."""
    if len(shape) != 3 or not name.endswith(GATE_UP) or rows % 2:
        return False
    half = rows // 2
    return half % block_rows != 0 and 2 * ceil_div(half, block_rows) == ceil_div(rows, block_rows)


def _fit(entry: Entry, scale: Entry, scheme: Scheme, gate_up: str | None) -> Weight | str:
    """The weight with the granularity that its scale's shape has, or what is wrong."""
    if len(entry.shape) not in (2, 3):
        return (
            f"{entry.where} must be a matrix, or matrices of experts (got {list(entry.shape)}); "
            "torchext knows no scales for other FP8 tensors"
        )
    if scale.dtype not in _SCALES:
        return (
            f"{scale.where} must have a dtype of scales, {', '.join(_SCALES)} (got {scale.dtype}); "
            "convert it"
        )
    (*lead, rows, columns), shape = entry.shape, scale.shape
    allowed = scheme.granularities
    if "block" in allowed:
        for block in [scheme.block] if scheme.block else [(GROUP, GROUP), _MX_BLOCK]:
            grid = (*lead, ceil_div(rows, block[0]), ceil_div(columns, block[1]))
            apart = (*lead, 2 * ceil_div(rows // 2, block[0]), grid[-1])
            if shape == grid and is_ambiguous(rows, block[0], entry.name, entry.shape):
                if gate_up is None:
                    return (
                        f"{entry.where} must have scales that tell whether gate and up share a "
                        f"block (got {list(shape)}, which fits both for {rows // 2} rows each in "
                        f'blocks of {block[0]}); pass gate_up="apart" or gate_up="fused"'
                    )
                return Weight(entry, scale, "block", block, 2 if gate_up == "apart" else 1)
            if shape == grid:
                return Weight(entry, scale, "block", block)
            if shape == apart and entry.name.endswith(GATE_UP) and lead and rows % 2 == 0:
                return Weight(entry, scale, "block", block, 2)
    if "tensor" in allowed and (
        shape in ((), (1,))
        or (math.prod(shape) == 1 and scheme.block is None)
        or (lead and shape in ((*lead,), (*lead, 1), (*lead, 1, 1)))
    ):
        return Weight(entry, scale, "tensor")
    if "row" in allowed and shape in ((*lead, rows), (*lead, rows, 1)):
        return Weight(entry, scale, "row")
    expected = f"blocks of {list(scheme.block)}" if scheme.block else "blocks, rows or the tensor"
    return (
        f"{scale.where} must have the shape of scales for {expected} of {entry} (got "
        f"{list(shape)}); correct weight_block_size in config.json, or get the files again"
    )
