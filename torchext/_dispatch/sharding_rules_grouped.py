"""Sharding rules of grouped products and of the rows of experts.

Offsets and slots number the rows of all tokens. So tokens cannot be sharded where they are read:
each rank would need numbers of its own, which torchext.moe.Dispatcher makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .sharding_rules import Case, Rule, by_name, keeps_groups
from .sharding_rules_gradients import scale_placement


def grouped_product(name: str) -> Rule:
    """The rule of m_grouped_fp8_gemm_nt_contiguous and _masked: out = a @ b[g].T.

    Sharded may be N, with the bias; K, which gives partial sums, to which the bias must be partial;
    with a group id for each row, the rows; with counts, the groups.
    """

    def cases(placements: Any, given: Mapping[str, Any]) -> Iterator[Case]:
        shard, whole = placements.Shard, placements.Replicate()
        a, a_scale, b, b_scale = (given[n] for n in ("a", "a_scale", "b", "b_scale"))
        last = a.ndim - 1
        of_scale = scale_placement(placements, b_scale, b, 1)
        if of_scale is not None:
            yield [shard(last)], {"b": shard(1), "b_scale": of_scale, "bias": shard(1)}
        of_a = scale_placement(placements, a_scale, a, last)
        of_b = scale_placement(placements, b_scale, b, 2)
        if of_a is not None and of_b is not None:
            partial = placements.Partial()
            own = {"a": shard(last), "a_scale": of_a, "b": shard(2), "b_scale": of_b}
            yield [partial], {**own, "bias": partial}
        if given.get("group_ids") is not None:
            of_a = scale_placement(placements, a_scale, a, 0)
            yield [shard(0)], {"a": shard(0), "a_scale": of_a, "group_ids": shard(0)}
        if given.get("masked_m") is not None:
            own = dict.fromkeys(("a", "b", "masked_m", "bias"), shard(0))
            scales = {"a_scale": a_scale, "b_scale": b_scale}
            of_scales = {n: shard(0) if s.ndim == 3 else whole for n, s in scales.items()}
            yield [shard(0)], {**own, **of_scales}

    return by_name(name, cases)


def product_along_groups(name: str) -> Rule:
    """The rule of k_grouped_fp8_gemm_nt, out [G, M, N]: rows of a or of b may be sharded."""

    def cases(placements: Any, given: Mapping[str, Any]) -> Iterator[Case]:
        for dim, operand in ((1, "a"), (2, "b")):
            own = dict.fromkeys((operand, f"{operand}_scale"), placements.Shard(0))
            yield [placements.Shard(dim)], own

    return by_name(name, cases)


def permutation(name: str, *, quantizes: bool = False) -> Rule:
    """Columns of the tokens may be sharded; if they are quantized, in multiples of 128."""

    def cases(placements: Any, given: Mapping[str, Any]) -> Iterator[Case]:
        x, columns = given["x"], placements.Shard(1)
        if not quantizes or keeps_groups(x, 1, x.shape[1]):
            yield [columns] * (1 + quantizes), {"x": columns}

    return by_name(name, cases)


def combination(name: str) -> Rule:
    """Columns may be sharded; or tokens, with their slots, if each rank has the rows of all."""

    def cases(placements: Any, given: Mapping[str, Any]) -> Iterator[Case]:
        tokens, columns = placements.Shard(0), placements.Shard(1)
        yield [columns], {"y": columns, "residual": columns}
        yield [tokens], dict.fromkeys(("slots", "weights", "residual"), tokens)

    return by_name(name, cases)
