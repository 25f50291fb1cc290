"""Sharding rules of quantizers and products: what each rank may compute of DTensors by itself.

A rule refuses placements that would cut a scale's group between ranks, or that would need
communication first: DTensor would otherwise redistribute operands silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .declaration import Sharding
from .layout import GROUP, ceil_div


def _parts(spec: Any, dim: int) -> int:
    """How many parts of a tensor's dimension are on different ranks."""
    sizes = (spec.mesh.size(i) for i, p in enumerate(spec.placements) if p.is_shard(dim))
    return math.prod(sizes)


def _keeps_groups(spec: Any, dim: int, run: int) -> bool:
    """Whether no group of 128 in `run` consecutive elements along a dimension is cut."""
    parts = _parts(spec, dim)
    return parts == 1 or run % (parts * GROUP) == 0


def _checked(name: str, specs: Sequence[Any], allowed: list[Sharding]) -> list[Sharding]:
    """`allowed`, if the placements of the tensors `specs` are among them on each mesh dimension."""
    tensors = [spec for spec in specs if spec is not None]
    for i in range(tensors[0].mesh.ndim):
        own = [None if spec is None else spec.placements[i] for spec in specs]
        if not any(inputs[: len(own)] == own for _, inputs in allowed):
            shapes = ", ".join(f"{list(spec.shape)} {spec.placements[i]}" for spec in tensors)
            raise ValueError(
                f"{name}: placements must let each rank compute its part alone, without cutting a "
                f"scale's group of {GROUP} (got {shapes}); redistribute, or pass local tensors"
            )
    return allowed


def quantizer(name: str, kind: str, *, columns: bool = True) -> Callable[..., list[Sharding]]:
    """The rule of an op that quantizes its first argument.

    Args:
        name: of the op.
        kind: "1x128", "1x128_t", "1x128_dual", "128x128", "128x128_dual", "rowwise" or
            "tensorwise": the scales, and whether the outputs are transposed.
        columns: whether x may be sharded along its last dimension; an op that halves it may not.
    """

    def rule(placements: Any, x: Any, *rest: Any, **_: Any) -> list[Sharding]:
        shard, whole = placements.Shard, placements.Replicate()
        last = x.ndim - 1
        transposes, plain = kind.endswith(("_t", "_dual")), not kind.endswith("_t")

        def outputs(dim: int) -> list[Any] | None:
            """The placements of the outputs if x is sharded along `dim`; None if it may not be."""
            if dim == last and not columns:
                return None
            if kind.startswith("128x128"):
                within = dim >= last - 1  # a matrix, not along a stack of them
                if within and not _keeps_groups(x, dim, x.shape[dim]):
                    return None
                swapped = 2 * last - 1 - dim if within else dim
                return [shard(dim), shard(dim)] + ([shard(swapped)] if transposes else [])
            if kind in ("rowwise", "tensorwise"):
                return [shard(dim)] * 2 if kind == "rowwise" and dim < last else None
            if plain and dim == last and not _keeps_groups(x, dim, x.shape[dim]):
                return None
            if not transposes:
                return [shard(dim)] * 2
            rows = math.prod(x.shape[:-1])
            if dim not in (0, last) or (dim == 0 < last and not _keeps_groups(x, dim, rows)):
                return None
            transposed = shard(0 if dim == last else 1)
            return [shard(dim)] * (2 if plain else 0) + [transposed] * 2

        count = {"1x128_dual": 4, "128x128_dual": 3}.get(kind, 2)
        others = [None] * len(rest)
        allowed: list[Sharding] = [([whole] * count, [whole, *others])]
        for dim in range(x.ndim):
            results = outputs(dim)
            if results is not None:
                allowed.append((results, [shard(dim), *others]))
        return _checked(name, [x], allowed)

    return rule


def product(
    placements: Any,
    a: Any,
    a_scale: Any,
    b: Any,
    b_scale: Any,
    *options: Any,
    bias: Any = None,
    **_: Any,
) -> list[Sharding]:
    """The rule of fp8_gemm_nt: D [..., N] = A [..., K] @ B [N, K].T, scales of any granularity.

    Sharded may be rows of A; rows of B, with the bias; or K, which gives partial sums, to which the
    bias must be partial.
    """
    shard, partial, whole = placements.Shard, placements.Partial(), placements.Replicate()
    last, (n, k) = a.ndim - 1, b.shape
    if options:  # the alias takes it by position
        bias, *options = options  # type: ignore[assignment]
    others = [None] * len(options)

    def case(out: Any, *inputs: Any) -> Sharding:
        *operands, of_bias = inputs
        return [out], [*operands, None if bias is None else of_bias, *others]

    def follows(scale: Any, dim: int, size: int, placement: Any) -> Any:
        """The scale's placement where its data is sharded along a dimension of `size`."""
        return placement if scale.shape[dim] in (size, ceil_div(size, GROUP)) else whole

    allowed = [case(whole, whole, whole, whole, whole, whole)]
    for dim in range(last):
        of_scale = shard(dim) if a_scale.ndim == a.ndim else whole
        if a_scale.ndim == a.ndim and a_scale.shape[dim] != a.shape[dim]:
            of_scale = whole
        allowed.append(case(shard(dim), shard(dim), of_scale, whole, whole, whole))
    if b_scale.shape[0] == n or _keeps_groups(b, 0, n):
        of_scale = follows(b_scale, 0, n, shard(0))
        allowed.append(case(shard(last), whole, whole, shard(0), of_scale, shard(0)))
    grouped = a_scale.shape[-1] == b_scale.shape[-1] == ceil_div(k, GROUP)
    if not grouped or (_keeps_groups(a, last, k) and _keeps_groups(b, 1, k)):
        of_a, of_b = (shard(last), shard(1)) if grouped else (whole, whole)
        allowed.append(case(partial, shard(last), of_a, shard(1), of_b, partial))
    return _checked("fp8_gemm_nt", [a, a_scale, b, b_scale, bias], allowed)
