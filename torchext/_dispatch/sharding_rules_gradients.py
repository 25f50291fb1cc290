"""Sharding rules of dequantize and of the gradients of activations and norms.

Where rows are sharded, sums over them (gradients of weights and biases) are partial: DTensor adds
the ranks' FP32 sums, in another order than one process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from .layout import GROUP, ceil_div
from .sharding_rules import Case, Rule, by_name, keeps_groups


def scale_placement(placements: Any, scale: Any, operand: Any, dim: int) -> Any:
    """The placement of an operand's scale, of any granularity, if the operand is sharded along
    `dim`; None if it may not be, because a group would be cut or the scale has folded rows."""
    if math.prod(scale.shape) == 1:
        return placements.Replicate()
    if scale.ndim != operand.ndim:
        return None
    scales, size = scale.shape[dim], operand.shape[dim]
    if scales == 1:
        return placements.Replicate()
    whole_groups = scales == ceil_div(size, GROUP) and keeps_groups(operand, dim, size)
    return placements.Shard(dim) if scales == size or whole_groups else None


def dequantizer(name: str) -> Rule:
    """Any dimension may be sharded that keeps the groups of the scale."""

    def cases(placements: Any, given: Mapping[str, Any]) -> Iterator[Case]:
        data, scale = given["data"], given["scale"]
        for dim in range(data.ndim):
            of_scale = scale_placement(placements, scale, data, dim)
            if of_scale is not None:
                own = placements.Shard(dim)
                yield [own], {"data": own, "scale": of_scale}

    return by_name(name, cases)


def activation_gradient(name: str, operand: str, *, columns: bool) -> Rule:
    """Rows may be sharded, in multiples of 128, since gradients are also returned transposed.

    `operand`: the name of the activation's. `columns`: whether these may be sharded, too; gate and
    up, which are halves of them, may not.
    """

    def cases(placements: Any, given: Mapping[str, Any]) -> Iterator[Case]:
        shard, whole, x = placements.Shard, placements.Replicate(), given[operand]
        last = x.ndim - 1
        sums, activation = given.get("bias_grad"), given.get("activation_dtype") is not None

        def case(dim: int, transposed: Any, of_sums: Any) -> Case:
            of_activation = transposed if activation else whole
            outputs = [shard(dim)] * 2 + [transposed] * 2
            outputs += [of_sums if sums else whole, of_activation, of_activation]
            return outputs, dict.fromkeys(("grad", operand, f"{operand}_scale"), shard(dim))

        if last > 0 and keeps_groups(x, 0, math.prod(x.shape[:-1])):
            yield case(0, shard(1), placements.Partial())
        if columns and keeps_groups(x, last, x.shape[last]):
            yield case(last, shard(0), shard(0))

    return by_name(name, cases)


def norm_gradient(name: str, parameters: int) -> Rule:
    """Rows may be sharded; of an op that also returns the transpose, in multiples of 128.

    `parameters`: how many gradients of parameters it returns.
    """
    dual = name.endswith("_dual")

    def cases(placements: Any, given: Mapping[str, Any]) -> Iterator[Case]:
        shard, x = placements.Shard, given["x"]
        for dim in range(x.ndim - 1):
            if dual and (dim > 0 or not keeps_groups(x, 0, math.prod(x.shape[:-1]))):
                continue
            outputs = [shard(dim)] + [placements.Partial()] * parameters
            outputs += [shard(0), shard(0), shard(1), shard(1)] if dual else []
            rows = ("grad", "x", "mean", "rstd", "residual_grad")
            yield outputs, dict.fromkeys(rows, shard(dim))

    return by_name(name, cases)
