"""`convert`, `quantize` and `dequantize`: checkpoints on disk from one format into another."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .files import Checkpoint, CheckpointError, open_checkpoint
from .folder import Unfinished
from .plan import Options, config_of_result, make_plan

Path_ = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion did; `print` it for a summary.

    Attributes:
        source, target: the paths.
        to: "fp8" or "bf16".
        quantized: names of wide weights that became FP8.
        dequantized: names of FP8 weights that became wide.
        relabeled: names of FP8 weights whose bytes stayed, with scales of 128x128 blocks.
        requantized: names of FP8 weights that were rounded a second time.
        kept: {name of a weight that stayed wide: the reason}.
        dropped: names of static scales of activations, which the result does not use.
        patterns: {pattern of `modules_to_not_convert`: names that it matched}.
        scales: how many scales were read; each one was applied.
        files: how many files of tensors were written, with those finished before an interruption.
        resumed_files: how many of them were finished before.
        bytes_before, bytes_after: of all tensors.
        config: whether config.json was written; it is not if the source has none.
        copied: other files that were copied.
    """

    source: str
    target: str
    to: str
    quantized: tuple[str, ...]
    dequantized: tuple[str, ...]
    relabeled: tuple[str, ...]
    requantized: tuple[str, ...]
    kept: dict[str, str]
    dropped: tuple[str, ...]
    patterns: dict[str, tuple[str, ...]]
    scales: int
    files: int
    resumed_files: int
    bytes_before: int
    bytes_after: int
    config: bool
    copied: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, dicts, strings and numbers."""
        return dataclasses.asdict(self)

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict()` as JSON; `indent` as in json.dumps."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        did = {
            "quantized": self.quantized,
            "dequantized": self.dequantized,
            "kept in FP8, byte for byte": self.relabeled,
            "rounded a second time": self.requantized,
        }
        weights = ", ".join(f"{len(names)} {what}" for what, names in did.items() if names)
        lines = [
            f"{self.target}: {self.files} files, {self.bytes_after:,} bytes of tensors (before: "
            f"{self.bytes_before:,})",
            f"weights: {weights}, {len(self.kept)} stay wide",
        ]
        if self.scales:
            lines.append(f"scales: {self.scales} read, {self.scales} applied")
        if self.resumed_files:
            lines.append(f"went on behind {self.resumed_files} files that were finished")
        if not self.config:
            lines.append(
                "config.json: none, as in the source; loaders need one with quantization_config"
            )
        if self.dropped:
            lines.append(f"dropped: {len(self.dropped)} static scales of activations")
        lines += pattern_lines(self.patterns)
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"wide: {some(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join(lines)


def some(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more


def pattern_lines(patterns: dict[str, tuple[str, ...]]) -> list[str]:
    """A line for each pattern: what it matched."""
    return [
        f"pattern {pattern!r}: {f'{len(names)} matched: {some(names)}' if names else 'no match'}"
        for pattern, names in patterns.items()
    ]


def convert(
    source: Path_,
    target: Path_,
    *,
    to: str,
    modules_to_not_convert: Iterable[str] = (),
    pow2_scale: bool = False,
    wide_dtype: torch.dtype | None = None,
    experts: str = "keep",
    gate_up: str | None = None,
    weight_block_size: tuple[int, int] | None = None,
    requantize: bool = False,
    allow_unmatched: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> Conversion:
    """Converts a checkpoint into a new folder, one tensor after the other.

    The result is fine-grained FP8, as DeepSeek-V3 and Qwen3 have it (`X.weight` e4m3 [N, K] and
    `X.weight_scale_inv` FP32 [ceil(N / 128), ceil(K / 128)], a multiplier), or wide. Weights that
    are quantized have the bits of `torchext.ops.quantize_128x128`. FP8 weights that 128x128
    blocks can express keep their bytes. config.json says which modules stay wide; other files of
    the folder, such as the tokenizer's, are copied.

    Tensors are read from mapped files in bands of rows, so memory does not grow with the model.
    The folder TARGET.partial is renamed to TARGET when it is whole. If a conversion was
    interrupted, the same call goes on behind the files that are finished.

    Args:
        source: a folder with safetensors files, or one safetensors file; wide (BF16, FP16, FP32)
            or FP8 of any format that docs/checkpoints.md lists.
        target: the folder to make; it must not exist.
        to: "fp8" or "bf16".
        modules_to_not_convert: patterns of modules that stay wide; see "What stays wide" in
            docs/checkpoints.md. Embeddings, output heads, routers and weights with fewer than 128
            in or out features always do.
        pow2_scale: round scales up to powers of two (`scale_fmt: ue8m0`).
        wide_dtype: round every floating-point tensor to this dtype, before it is quantized, too.
            None keeps each dtype, and dequantizes to BF16.
        experts: "keep" leaves them as they are. "one_by_one" splits 3-D tensors [E, N, K], gate and
            up apart, as in released checkpoints (`experts.7.gate_proj.weight`). "stacked" joins
            matrices into 3-D tensors, gate above up, as in transformers 5 (`experts.gate_up_proj`
            [E, 2I, H], `experts.down_proj` [E, H, I]); gate and up keep blocks of their own.
        gate_up: "fused" or "apart": whether gate and up of a 3-D FP8 `gate_up_proj` share blocks,
            where its scales' shape does not tell.
        weight_block_size: rows and columns of a block, in place of config.json's.
        requantize: allow FP8 weights whose scales 128x128 blocks cannot express (row-wise, other
            blocks, e5m2) to be rounded a second time.
        allow_unmatched: allow patterns that match nothing.
        max_shard_bytes: the most bytes of tensors in a file.

    Returns:
        What was done with each weight.

    Raises:
        CheckpointError: a file is damaged, an FP8 weight has no scale, a scale no weight, shapes
            do not fit, a pattern matches nothing, a weight to quantize has NaN or Inf, `target`
            exists. It names file and tensor.
        ValueError, TypeError: an argument is wrong.
        ImportError: safetensors is not installed.
    """
    options = Options(
        to, modules_to_not_convert, pow2_scale, wide_dtype, experts, gate_up, weight_block_size,
        requantize, allow_unmatched, max_shard_bytes,
    )  # fmt: skip
    return _convert(open_checkpoint(source), Path(target), options)


def _convert(checkpoint: Checkpoint, target: Path, options: Options) -> Conversion:
    plan = make_plan(checkpoint, options)
    work = Unfinished(target, checkpoint, plan, options)
    resumed = len(work.finished)
    scale_of = {name: weight.scale.name for name, weight in plan.pairing.weights.items()}
    expected = {scale_of[name] for name in work.sources_left() if name in scale_of}
    try:
        applied = work.write_shards() & set(scale_of.values())
        if applied != expected:
            raise AssertionError(f"not applied: {some(sorted(expected ^ applied))}")
        config = config_of_result(checkpoint, plan, options) if checkpoint.config else {}
        copied = work.finish(config)
    except BaseException as error:
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"torchext.checkpoint: {work.how_to_go_on()}")
        raise
    return Conversion(
        source=str(checkpoint.path),
        target=str(target),
        to=options.to,
        quantized=tuple(plan.quantized),
        dequantized=tuple(plan.dequantized),
        relabeled=tuple(plan.relabeled),
        requantized=tuple(plan.requantized),
        kept=plan.kept,
        dropped=tuple(plan.dropped),
        patterns={pattern: tuple(names) for pattern, names in plan.patterns.matched.items()},
        scales=len(scale_of),
        files=len(work.finished),
        resumed_files=resumed,
        bytes_before=sum(entry.nbytes for entry in checkpoint.entries.values()),
        bytes_after=sum(spec.nbytes for step in plan.steps for spec in step.outputs),
        config=bool(config),
        copied=tuple(copied),
    )


def quantize(
    source: Path_,
    target: Path_,
    *,
    modules_to_not_convert: Iterable[str] = (),
    pow2_scale: bool = False,
    wide_dtype: torch.dtype | None = None,
    experts: str = "keep",
    allow_unmatched: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> Conversion:
    """Quantizes a wide checkpoint to fine-grained FP8 without building the model; see `convert`.

    Raises:
        CheckpointError: as `convert`, and if the checkpoint is FP8 already.
    """
    checkpoint = open_checkpoint(source)
    fp8 = [entry for entry in checkpoint.entries.values() if entry.dtype in ("F8_E4M3", "F8_E5M2")]
    if fp8:
        raise CheckpointError(
            f"{fp8[0].where} must be wide to be quantized (got {fp8[0].dtype}); use convert(..., "
            'to="fp8") for checkpoints in FP8'
        )
    options = Options(
        "fp8", modules_to_not_convert, pow2_scale, wide_dtype, experts,
        allow_unmatched=allow_unmatched, max_shard_bytes=max_shard_bytes,
    )  # fmt: skip
    return _convert(checkpoint, Path(target), options)


def dequantize(
    source: Path_,
    target: Path_,
    *,
    wide_dtype: torch.dtype | None = None,
    experts: str = "keep",
    gate_up: str | None = None,
    weight_block_size: tuple[int, int] | None = None,
    allow_unmatched: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> Conversion:
    """Dequantizes an FP8 checkpoint to BF16; see `convert`. Tensors that are wide stay as they are.

    A weight is data * scale, rounded to FP32 and then to BF16 (or `wide_dtype`).
    """
    return convert(
        source, target, to="bf16", wide_dtype=wide_dtype, experts=experts, gate_up=gate_up,
        weight_block_size=weight_block_size, allow_unmatched=allow_unmatched,
        max_shard_bytes=max_shard_bytes,
    )  # fmt: skip
