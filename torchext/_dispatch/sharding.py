"""How DTensor shards the op of torchext.nn.Linear: tensor and sequence parallelism.

Imported with the first DTensor that meets a layer. Every rank quantizes its own shard, by itself:
where a scale spans a sharded dimension (a whole tensor's, a row's along K, a block's that a shard
cuts), it differs from the scale of the unsharded tensor, and with it the rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from . import library  # noqa: F401  (loads the ops)

_ops = torch.ops.torchext
# Placements of the output, and of the inputs; None for what is no tensor.
Sharding = tuple[list[Any], list[Any]]


def _rest(placements: Sequence[Any], *others: object) -> list[Any]:
    return [*placements, *(None for _ in others)]


@register_sharding(_ops._linear.default)
def _(input: Any, weight: Any, bias: Any, *options: object) -> Sequence[Sharding]:
    last = input.ndim - 1

    def bias_as(placement: Any) -> Any:
        return None if bias is None else placement

    def sharding(output: Any, *placements: Any) -> Sharding:
        return [output], _rest(placements, *options)

    return [
        sharding(Replicate(), Replicate(), Replicate(), bias_as(Replicate())),
        # column-wise: each rank has some of the output's features
        sharding(Shard(last), Replicate(), Shard(0), bias_as(Shard(0))),
        # row-wise: each has some of the input's, and the bias is to be added once
        sharding(Partial(), Shard(last), Shard(1), bias_as(Partial())),
        # sequence and data parallel: each has some of the rows
        *(
            sharding(Shard(dim), Shard(dim), Replicate(), bias_as(Replicate()))
            for dim in range(last)
        ),
    ]


@register_sharding(_ops._linear_dgrad.default)
def _(dy: Any, weight: Any, *options: object) -> Sequence[Sharding]:
    last = dy.ndim - 1

    def sharding(output: Any, *placements: Any) -> Sharding:
        return [output], _rest(placements, *options)

    return [
        sharding(Replicate(), Replicate(), Replicate()),
        sharding(Partial(), Shard(last), Shard(0)),
        sharding(Shard(last), Replicate(), Shard(1)),
        *(sharding(Shard(dim), Shard(dim), Replicate()) for dim in range(last)),
    ]


@register_sharding(_ops._linear_wgrad.default)
def _(dy: Any, input: Any, *options: object) -> Sequence[Sharding]:
    last = dy.ndim - 1

    def sharding(output: Any, *placements: Any) -> Sharding:
        return [output], _rest(placements, *options)

    return [
        sharding(Replicate(), Replicate(), Replicate()),
        sharding(Shard(0), Shard(last), Replicate()),
        sharding(Shard(1), Replicate(), Shard(last)),
        *(sharding(Partial(), Shard(dim), Shard(dim)) for dim in range(last)),
    ]
