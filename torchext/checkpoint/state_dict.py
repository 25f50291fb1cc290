"""`quantize_state_dict`: what the conversion on disk gives, for tensors in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from .._patterns import Patterns
from ..ops.quantize import quantize_128x128
from .files import NAME_OF, CheckpointError, Spec
from .formats import SKIPPED, WIDE, unmatched_problems
from .plan import Options
from .rules import is_weight, parts_of, require_readable, why_wide
from .steps import finite


def quantize_state_dict(
    named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    modules_to_not_convert: Iterable[str] = (),
    pow2_scale: bool = False,
    wide_dtype: torch.dtype | None = None,
    experts: str = "keep",
    allow_unmatched: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Quantizes named tensors, one by one, to what `quantize` writes for them, bit for bit.

    For sending weights from a trainer to an engine that serves in FP8: names, dtypes, shapes and
    bits are those of the checkpoint on disk, so the engine loads both by the same code. Pass
    `wide_dtype=torch.bfloat16` with FP32 masters if the engine's wide layers are BF16: every
    tensor is rounded to it first, as saving a BF16 checkpoint and quantizing it would.

    Args:
        named_tensors: a state dict, or pairs of name and tensor, on any device. Weights are
            [N, K], `X.weight`; those of experts may be [E, N, K], `X.experts.gate_up_proj`.
        modules_to_not_convert, pow2_scale, wide_dtype, allow_unmatched: as in `convert`.
        experts: "keep" or "one_by_one", as in `convert`. Tensors that come one by one cannot be
            stacked.

    Yields:
        (`X.weight`, [N, K] e4m3) and (`X.weight_scale_inv`, [ceil(N / 128), ceil(K / 128)]
        float32) for each weight that is quantized, contiguous; other tensors under their names.

    Raises:
        CheckpointError: a weight has NaN or Inf; a pattern matched nothing (at the end).
        TypeError, ValueError: an argument is wrong.
    """
    options = Options(
        "fp8", modules_to_not_convert, pow2_scale, wide_dtype, experts,
        allow_unmatched=allow_unmatched,
    )  # fmt: skip
    if experts == "stacked":
        raise ValueError(
            'quantize_state_dict: experts must be "keep" or "one_by_one" (got "stacked"): tensors '
            "that come one by one cannot be joined; torch.stack them before"
        )
    pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    return _quantize(pairs, options)


@torch.no_grad()
def _quantize(
    pairs: Iterable[tuple[str, Tensor]], options: Options
) -> Iterator[tuple[str, Tensor]]:
    patterns = Patterns(options.modules_to_not_convert, SKIPPED)
    for name, given in pairs:
        spec = Spec(name, NAME_OF.get(given.dtype, str(given.dtype)), tuple(given.shape))
        tensor = given.detach()
        if spec.dtype in WIDE and options.wide_dtype is not None:
            tensor = tensor.to(options.wide_dtype)
        reason = why_wide(spec, patterns)
        if not is_weight(spec):
            yield name, tensor
            continue
        for part in parts_of(name, spec.shape, options.experts):
            wide = tensor
            if part.shape != spec.shape:
                wide = tensor[part.matrices[0], part.start : part.stop]
            if reason is not None:
                yield part.name, wide
                continue
            require_readable(part)
            data, scale = quantize_128x128(wide, pow2_scale=options.pow2_scale)
            yield part.name, data.contiguous()
            yield part.scale_name, finite(scale, name)
    if not options.allow_unmatched:
        problems = unmatched_problems(patterns, "modules_to_not_convert")
        if problems:
            raise CheckpointError(*problems)
