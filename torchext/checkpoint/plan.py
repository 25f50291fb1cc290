"""Plans a conversion from the headers alone: what becomes of every tensor, and in which file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .._dispatch.layout import GROUP
from .._patterns import Patterns
from .files import NAME_OF, Checkpoint, CheckpointError, Entry
from .formats import (
    GATE_UP,
    GATE_UP_BLOCKS,
    SKIPPED,
    WIDE,
    Pairing,
    Weight,
    module_of,
    pair,
    quantization_config,
    ties_head,
    unmatched_problems,
)
from .rules import is_of_experts, is_weight, parts_of, require_readable, why_wide
from .stacks import stack_experts
from .steps import Copy, DequantizedRows, Quantize, Relabel, Step, Widen, WideRows, is_lossless

FORMATS = ("fp8", "bf16")
EXPERTS = ("keep", "one_by_one", "stacked")


@dataclasses.dataclass(frozen=True)
class Options:
    """What `convert` was asked for; see there."""

    to: str
    modules_to_not_convert: Iterable[str] = ()
    pow2_scale: bool = False
    wide_dtype: torch.dtype | None = None
    experts: str = "keep"
    gate_up: str | None = None
    weight_block_size: tuple[int, int] | None = None
    requantize: bool = False
    allow_unmatched: bool = False
    max_shard_bytes: int = 5_000_000_000

    def __post_init__(self) -> None:
        patterns = Patterns(
            self.modules_to_not_convert, SKIPPED
        )  # refuses what is no list of patterns
        object.__setattr__(self, "modules_to_not_convert", tuple(patterns.matched))
        for name, allowed in (
            ("to", FORMATS), ("experts", EXPERTS), ("gate_up", (None, "fused", "apart")),
            ("wide_dtype", (None, torch.bfloat16, torch.float16, torch.float32)),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"torchext.checkpoint: {name} must be one of "
                    f"{', '.join(map(repr, allowed))} (got {getattr(self, name)!r}); choose one"
                )
        if self.max_shard_bytes < 1:
            raise ValueError(
                "torchext.checkpoint: max_shard_bytes must be positive (got "
                f"{self.max_shard_bytes}); omit it for 5 GB"
            )

    def to_dict(self) -> dict[str, str]:
        """Every option as text."""
        return {name: str(value) for name, value in dataclasses.asdict(self).items()}


@dataclasses.dataclass
class Plan:
    """Attributes:
    steps: one for each tensor of the source, but for scales; one for each stack of experts.
    quantized, dequantized, relabeled, requantized: names of weights of the source.
    kept: {name of a wide weight that stays wide: the reason}.
    dropped: names of tensors that mean nothing in the result, with activations' static scales.
    stacked: {name of an expert's weight: that of the 3-D tensor which it became a part of}.
    gate_up: "apart" if 3-D tensors of gate and up were written whose scales do not tell.
    pairing: the source's weights and scales.
    patterns: of `modules_to_not_convert`, with what they matched.
    """

    pairing: Pairing
    patterns: Patterns
    steps: list[Step] = dataclasses.field(default_factory=list)
    quantized: list[str] = dataclasses.field(default_factory=list)
    dequantized: list[str] = dataclasses.field(default_factory=list)
    relabeled: list[str] = dataclasses.field(default_factory=list)
    requantized: list[str] = dataclasses.field(default_factory=list)
    kept: dict[str, str] = dataclasses.field(default_factory=dict)
    dropped: list[str] = dataclasses.field(default_factory=list)
    stacked: dict[str, str] = dataclasses.field(default_factory=dict)
    gate_up: str | None = None

    def shards(self, max_bytes: int) -> dict[str, list[Step]]:
        """{file name: its steps}, in the order of the source, with at most `max_bytes` of tensors
        in a file unless one step has more."""
        groups: list[list[Step]] = [[]]
        size = 0
        for step in self.steps:
            nbytes = sum(spec.nbytes for spec in step.outputs)
            if groups[-1] and size + nbytes > max_bytes:
                groups.append([])
                size = 0
            groups[-1].append(step)
            size += nbytes
        if len(groups) == 1:
            return {"model.safetensors": groups[0]}
        return {
            f"model-{number:05}-of-{len(groups):05}.safetensors": group
            for number, group in enumerate(groups, 1)
        }


def make_plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """Plans the conversion of `checkpoint`.

    Raises:
        CheckpointError: something is wrong with the checkpoint or with what was asked of it.
    """
    pairing = pair(checkpoint, options.weight_block_size, options.gate_up)
    problems = list(pairing.problems)
    if not options.allow_unmatched:
        problems += unmatched_problems(pairing.patterns, "quantization_config of config.json")
    for entry in checkpoint.entries.values():
        if entry.dtype not in NAME_OF.values():
            problems.append(
                f"{entry.where} must have a dtype that torch has (got {entry.dtype}); torchext "
                "does not convert packed or other formats"
            )
    method = pairing.scheme.method
    if method not in (None, "fp8", "compressed-tensors", "modelopt") and not pairing.weights:
        problems.append(
            f"{checkpoint.path} must be wide or FP8 (got quant_method {method!r}); start from the "
            "model that it was quantized from"
        )
    if problems:
        raise CheckpointError(*problems)
    if pairing.weights and options.modules_to_not_convert:
        raise CheckpointError(
            f"modules_to_not_convert must be empty for a checkpoint in FP8 (got "
            f"{len(pairing.weights)} FP8 weights in {checkpoint.path}); its FP8 weights stay FP8 "
            "and its wide ones wide"
        )
    plan = Plan(pairing, Patterns(options.modules_to_not_convert, SKIPPED))
    if ties_head(checkpoint.config):
        plan.patterns.match("lm_head")
    scales = {weight.scale.name for weight in pairing.weights.values()}
    for name, entry in checkpoint.entries.items():
        if name in scales:
            continue
        if name in pairing.activation_scales:
            plan.dropped.append(name)
        elif name in pairing.weights:
            _plan_fp8(plan, pairing.weights[name], options)
        else:
            _plan_wide(plan, entry, options)
    if options.to == "fp8" and not options.allow_unmatched:
        problems = unmatched_problems(plan.patterns, "modules_to_not_convert")
        if problems:
            raise CheckpointError(*problems)
    if options.experts == "stacked":
        plan.steps, plan.stacked, plan.gate_up = stack_experts(checkpoint, plan.steps)
    if not (
        plan.quantized or plan.dequantized or plan.relabeled or plan.requantized or plan.stacked
    ):
        raise CheckpointError(
            f"{checkpoint.path} must have weights to convert to {options.to} (got "
            f"{len(plan.steps)} tensors, none of which would change); see `inspect`"
        )
    if options.experts == "one_by_one":
        _require_orientation(checkpoint.entries)
    _require_one_each(plan)
    return plan


def _plan_fp8(plan: Plan, weight: Weight, options: Options) -> None:
    name, entry = weight.entry.name, weight.entry
    parts = parts_of(name, entry.shape, options.experts)
    if options.to == "bf16":
        dtype = options.wide_dtype or torch.bfloat16
        plan.dequantized.append(name)
        plan.steps.append(Widen(DequantizedRows(weight, dtype), parts))
        return
    pow2_already = not options.pow2_scale or weight.scale.dtype in ("F8_E8M0", "U8")
    if is_lossless(weight, parts) and pow2_already:
        plan.relabeled.append(name)
        plan.steps.append(Relabel(weight, parts))
    elif options.requantize:
        plan.requantized.append(name)
        rows = DequantizedRows(weight, torch.float32)
        plan.steps.append(Quantize(rows, parts, options.pow2_scale))
    else:
        block = list(weight.block) if weight.block else f"one {weight.granularity}"
        raise CheckpointError(
            f"{entry.where} must have scales that 128x128 blocks can express to keep its bytes "
            f"(got {entry.dtype} with a scale for {block}{' and pow2_scale' * options.pow2_scale})"
            "; pass requantize=True to round it a second time, or convert the original"
        )
    for part in parts:
        require_readable(part)


def _plan_wide(plan: Plan, entry: Entry, options: Options) -> None:
    wide = entry.dtype in WIDE
    cast = options.wide_dtype if wide else None
    if options.to == "fp8":
        reason = why_wide(entry, plan.patterns) if not plan.pairing.weights else "wide already"
        if reason is None:
            parts = parts_of(entry.name, entry.shape, options.experts)
            for part in parts:
                require_readable(part)
            plan.quantized.append(entry.name)
            plan.steps.append(Quantize(WideRows(entry, cast), parts, options.pow2_scale))
            return
        if is_weight(entry):
            plan.kept[entry.name] = reason
    if options.experts == "one_by_one" and wide and is_of_experts(entry.name, entry.shape):
        parts = parts_of(entry.name, entry.shape, options.experts)
        plan.steps.append(Widen(WideRows(entry, cast), parts))
        return
    plan.steps.append(Copy(entry, NAME_OF[cast] if cast else entry.dtype))


def _require_orientation(entries: Mapping[str, Entry]) -> None:
    """Experts that are split must be [E, 2I, H] and [E, H, I], with gate before up."""
    for name, entry in entries.items():
        if not (name.endswith(GATE_UP) and is_of_experts(name, entry.shape)):
            continue
        matrices, rows, columns = entry.shape
        down = entries.get(name.removesuffix(GATE_UP) + "down_proj")
        expected = (matrices, columns, rows // 2)
        if down is not None and down.shape != expected:
            raise CheckpointError(
                f"{entry.where} must be [E, 2I, H] to be split into experts (got "
                f"{list(entry.shape)} with {down}); it is transposed, so keep it in 3-D"
            )
        if f"{name}_bias" in entries:
            raise CheckpointError(
                f"{entry.where} must have no bias to be split into experts (got {name}_bias); keep "
                "it in 3-D"
            )


def _require_one_each(plan: Plan) -> None:
    seen: dict[str, str] = {}
    for step in plan.steps:
        for spec in step.outputs:
            if spec.name in seen:
                raise CheckpointError(
                    f"{step.sources[0].where} must not become {spec.name} (got {seen[spec.name]}, "
                    "which becomes that, too); the checkpoint holds the weight twice"
                )
            seen[spec.name] = step.sources[0].name


def config_of_result(checkpoint: Checkpoint, plan: Plan, options: Options) -> dict[str, Any]:
    """config.json of the result: quantization_config written, or removed."""
    config = {key: value for key, value in checkpoint.config.items() if key not in _QUANTIZATION}
    for key in ("text_config",):
        if isinstance(config.get(key), dict):
            config[key] = {k: v for k, v in config[key].items() if k not in _QUANTIZATION}
    if options.to == "bf16" or options.wide_dtype is not None:
        dtype = str(options.wide_dtype or torch.bfloat16).removeprefix("torch.")
        for place in (config, config.get("text_config")):
            for key in ("torch_dtype", "dtype"):
                if isinstance(place, dict) and key in place:
                    place[key] = dtype
    if options.to == "fp8":
        before = quantization_config(checkpoint.config) or {}
        kept = dict(before) if plan.pairing.scheme.method == "fp8" else {}
        pow2 = options.pow2_scale or (plan.pairing.scheme.pow2 and not plan.requantized)
        kept.pop("scale_fmt", None)
        kept.pop("ignored_layers", None)
        kept.pop(GATE_UP_BLOCKS, None)
        config["quantization_config"] = kept | {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [GROUP, GROUP],
            "modules_to_not_convert": modules_kept(checkpoint.config, plan),
            **({"scale_fmt": "ue8m0"} if pow2 else {}),
            **({GATE_UP_BLOCKS: plan.gate_up} if plan.gate_up else {}),
        }
    return config


_QUANTIZATION = ("quantization_config", "compression_config")


def modules_kept(config: Mapping[str, Any], plan: Plan) -> list[str]:
    """Every module of the result that a loader could take for a linear layer and that stays wide,
    by its whole name, so that every loader's way of matching agrees."""
    modules = {module_of(plan.stacked.get(name, name)) for name in plan.kept}
    return sorted(modules | {"lm_head"} if ties_head(config) else modules)


def shapes_of(steps: Sequence[Step]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (dtype, shape)} of what steps write."""
    return {spec.name: (spec.dtype, spec.shape) for step in steps for spec in step.outputs}
