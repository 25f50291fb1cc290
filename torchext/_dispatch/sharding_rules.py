"""Sharding rules of quantizers, norms and dense products: what each rank may compute by itself.

A rule refuses placements that would cut a scale's group between ranks, or that would need
communication first: DTensor would otherwise redistribute operands silently. Rules of the other ops:
sharding_rules_gradients.py, sharding_rules_grouped.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from .declaration import Sharding
from .layout import GROUP, ceil_div

# Placements of all outputs, and of the tensor arguments that are not replicated, by their names.
Case = tuple[list[Any], dict[str, Any]]
Rule = Callable[..., list[Sharding]]


def _parts(spec: Any, dim: int) -> int:
    """How many parts of a tensor's dimension are on different ranks."""
    sizes = (spec.mesh.size(i) for i, p in enumerate(spec.placements) if p.is_shard(dim))
    return math.prod(sizes)


def keeps_groups(spec: Any, dim: int, run: int) -> bool:
    """Whether no group of 128 in `run` consecutive elements along a dimension is cut."""
    parts = _parts(spec, dim)
    return parts == 1 or run % (parts * GROUP) == 0


_ALONE = (
    "placements must let each rank compute its part alone, without cutting a scale's group of "
    f"{GROUP}"
)


def _checked(
    name: str, specs: Sequence[Any], allowed: list[Sharding], rule: str = _ALONE
) -> list[Sharding]:
    """`allowed`, if the placements of the tensors `specs` are among them on each mesh dimension.

    specs: of the first arguments; None for those that are no tensors. rule: what the error states.
    """
    tensors = [spec for spec in specs if spec is not None]
    for i in range(tensors[0].mesh.ndim):
        own = [None if spec is None else spec.placements[i] for spec in specs]
        if not any(inputs[: len(own)] == own for _, inputs in allowed):
            shapes = ", ".join(f"{list(spec.shape)} {spec.placements[i]}" for spec in tensors)
            raise ValueError(f"{name}: {rule} (got {shapes}); redistribute, or pass local tensors")
    return allowed


def by_name(
    name: str,
    cases: Callable[[Any, Mapping[str, Any]], Iterable[Case]],
    rule: str = _ALONE,
) -> Rule:
    """The rule of an op, or of its alias, from cases that name its arguments.

    Args:
        name: of the op.
        cases: called with the module torch.distributed.tensor and {name: argument}, without those
            that have their default. Returns what may be sharded, besides the case that nothing is.
        rule: what the error states for other placements.
    """

    def named(placements: Any, *operands: Any, **options: Any) -> list[Sharding]:
        schema = getattr(torch.ops.torchext, name).default._schema
        names = [argument.name for argument in schema.arguments]
        given = dict(zip(names, operands, strict=False)) | options
        specs = {n: v if hasattr(v, "placements") else None for n, v in given.items()}
        whole = placements.Replicate()
        replicated: Case = [whole] * len(schema.returns), {}
        allowed: list[Sharding] = [
            (outputs, [None if spec is None else own.get(n, whole) for n, spec in specs.items()])
            for outputs, own in (replicated, *cases(placements, given))
        ]
        return _checked(name, [*specs.values()], allowed, rule)

    return named


def replicated(name: str, reason: str) -> Rule:
    """The rule of an op that takes no shards. `reason` follows "since" in the error."""
    return by_name(name, lambda *_: (), f"tensors must be replicated, since {reason}")


def quantizer(name: str, kind: str, *, columns: bool = True, sums: bool = False) -> Rule:
    """The rule of an op that quantizes its first argument.

    Args:
        name: of the op.
        kind: "1x128", "1x128_t", "1x128_dual", "128x128", "128x128_dual", "rowwise" or
            "tensorwise": the scales, and whether the outputs are transposed.
        columns: whether x may be sharded along its last dimension; an op that halves it may not.
        sums: whether the op also returns sums over the rows.
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
                if within and not keeps_groups(x, dim, x.shape[dim]):
                    return None
                swapped = 2 * last - 1 - dim if within else dim
                return [shard(dim), shard(dim)] + ([shard(swapped)] if transposes else [])
            if kind in ("rowwise", "tensorwise"):
                return [shard(dim)] * 2 if kind == "rowwise" and dim < last else None
            if plain and dim == last and not keeps_groups(x, dim, x.shape[dim]):
                return None
            if not transposes:
                return [shard(dim)] * 2
            rows = math.prod(x.shape[:-1])
            if dim not in (0, last) or (dim == 0 < last and not keeps_groups(x, dim, rows)):
                return None
            transposed = shard(0 if dim == last else 1)
            return [shard(dim)] * (2 if plain else 0) + [transposed] * 2

        count = {"1x128_dual": 4, "128x128_dual": 3}.get(kind, 2) + sums
        others = [None] * len(rest)
        allowed: list[Sharding] = [([whole] * count, [whole, *others])]
        for dim in range(x.ndim):
            results = outputs(dim)
            if results is not None:
                of_sums = shard(0) if dim == last else placements.Partial()
                allowed.append(([*results, *[of_sums] * sums], [shard(dim), *others]))
        return _checked(name, [x], allowed)

    return rule


def product(placements: Any, *operands: Any, bias: Any = None, **_: Any) -> list[Sharding]:
    """The rule of fp8_gemm_nt: D [..., N] = A [..., K] @ B [N, K].T, scales of any granularity.

    Sharded may be rows of A; rows of B, with the bias; or K, which gives partial sums, to which the
    bias must be partial.
    """
    a, a_scale, b, b_scale, *options = operands
    if options:  # the alias takes it by position
        bias, *options = options
    allowed = _cases(placements, (a, a_scale, b, b_scale), bias, len(options))
    return _checked("fp8_gemm_nt", [a, a_scale, b, b_scale, bias], allowed)


def fused_product(name: str, *, columns: bool) -> Rule:
    """The rule of a product whose result is activated and quantized in groups of a row.

    `columns`: whether rows of B may be sharded; gate and up, which are halves of them, may not.
    """

    def rule(placements: Any, *operands: Any, bias: Any = None, **_: Any) -> list[Sharding]:
        a, b = operands[0], operands[2]
        sharded = placements.Shard(a.ndim - 1)
        keeps = columns and keeps_groups(b, 0, b.shape[0])
        allowed: list[Sharding] = [
            ([out, out], inputs)
            for (out,), inputs in _cases(placements, operands[:4], bias, len(operands) - 4)
            if not out.is_partial() and (keeps or out != sharded)
        ]
        return _checked(name, [*operands[:4], bias], allowed)

    return rule


def _cases(placements: Any, operands: Any, bias: Any, options: int) -> list[Sharding]:
    """The placements that products allow; there are `options` arguments after the bias."""
    a, a_scale, b, b_scale = operands
    shard, partial, whole = placements.Shard, placements.Partial(), placements.Replicate()
    last, (n, k) = a.ndim - 1, b.shape

    def case(out: Any, *inputs: Any) -> Sharding:
        *own, of_bias = inputs
        return [out], [*own, None if bias is None else of_bias, *[None] * options]

    allowed = [case(whole, whole, whole, whole, whole, whole)]
    for dim in range(last):
        each_row = a_scale.ndim == a.ndim and a_scale.shape[dim] == a.shape[dim]
        of_scale = shard(dim) if each_row else whole
        allowed.append(case(shard(dim), shard(dim), of_scale, whole, whole, whole))
    if b_scale.shape[0] == n or keeps_groups(b, 0, n):
        of_scale = shard(0) if b_scale.shape[0] in (n, ceil_div(n, GROUP)) else whole
        allowed.append(case(shard(last), whole, whole, shard(0), of_scale, shard(0)))
    grouped = a_scale.shape[-1] == b_scale.shape[-1] == ceil_div(k, GROUP)
    if not grouped or (keeps_groups(a, last, k) and keeps_groups(b, 1, k)):
        of_a, of_b = (shard(last), shard(1)) if grouped else (whole, whole)
        allowed.append(case(partial, shard(last), of_a, shard(1), of_b, partial))
    return allowed


def norm(name: str, row_values: int) -> Rule:
    """The rule of a norm that quantizes: rows of x may be sharded.

    Of an op that also returns the transpose, dimension 0 of x, in multiples of 128 rows.

    `row_values`: how many values it returns for each row, between what is quantized and h and y.
    """

    def rule(
        placements: Any, x: Any, *rest: Any, residual: Any = None, **options: Any
    ) -> list[Sharding]:
        shard, whole = placements.Shard, placements.Replicate()
        dual = name.endswith("_dual")
        count = (4 if dual else 2) + row_values + 2
        specs = [argument if hasattr(argument, "placements") else None for argument in rest]
        parameters = [None if spec is None else whole for spec in specs]

        def inputs(placement: Any) -> list[Any]:
            return [placement, *parameters, *([] if residual is None else [placement])]

        allowed: list[Sharding] = [([whole] * count, inputs(whole))]
        for dim in range(x.ndim - 1):
            if dual and (dim > 0 or not keeps_groups(x, 0, math.prod(x.shape[:-1]))):
                continue
            outputs = [shard(dim)] * 2 + [shard(1)] * (2 if dual else 0)
            outputs += [shard(dim)] * row_values
            outputs += [whole if residual is None else shard(dim)]
            outputs += [shard(dim) if options.get("return_normed") else whole]
            allowed.append((outputs, inputs(shard(dim))))
        every = [x, *specs, *([] if residual is None else [residual])]
        return _checked(name, every, allowed)

    return rule
