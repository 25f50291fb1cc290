"""Every op's sharding rule, in one process: what a rule allows gives shards of the whole result.

Ranks are emulated: each gets its parts of the arguments, and the parts of the results are put
together. tests/distributed/test_tensor_parallel.py runs some of the rules on DTensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed.tensor as distributed
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard

from torchext._catalog import CATALOG
from torchext._catalog.entry import Sample
from torchext._dispatch.declaration import DECLARATIONS
from torchext._dispatch.layout import laid_out

ALIGNED = 256  # rows and columns: two ranks with 128 of each
# Ops that take no shards of any argument.
REPLICATED = {
    "quantize_tensorwise",
    "moe_route",
    "moe_pack_1x128",
    "moe_unpack_1x128",
    "_quantize_kept",
    "_quantize_128x128_kept",
    "_fp8_gemm_nt_kept",
    "_gate_up",
    "_fp8_linear_by_expert",
}


@dataclass
class Mesh:
    ranks: int
    ndim: int = 1

    def size(self, dim: int | None = None) -> int:
        return self.ranks


@dataclass
class Spec:
    """What rules read of torch's DTensorSpec."""

    shape: tuple[int, ...]
    mesh: Mesh
    placements: tuple[Any]

    @property
    def ndim(self) -> int:
        return len(self.shape)


class Call:
    """An op with the arguments of a sample, positional ones first."""

    def __init__(self, name: str, given: Sample) -> None:
        self.name, self.op = name, DECLARATIONS[name].handles[0]
        self.rule: Any = DECLARATIONS[name].sharding
        self.names = [argument.name for argument in self.op._schema.arguments]
        self.positional = len(given.args)
        # The dispatcher omits arguments that have their defaults.
        keyword = {n: v for n, v in given.kwargs.items() if n != "out" and v is not None}
        self.given = dict(zip(self.names, given.args, strict=False)) | keyword
        if "out_dtype" in self.names:  # so that partial sums are precise
            self.given["out_dtype"] = torch.float32

    def arguments(self, given: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        values = list(given.items())
        return [v for _, v in values[: self.positional]], dict(values[self.positional :])

    def run(self, given: dict[str, Any]) -> tuple[Tensor, ...]:
        args, kwargs = self.arguments(given)
        results = self.op(*args, **kwargs)
        return results if isinstance(results, tuple) else (results,)

    def allowed(self, ranks: int, own: dict[str, Any]) -> list[tuple[list[Any], dict[str, Any]]]:
        """The rule's cases, with placements by name, for tensors of these placements."""
        mesh = Mesh(ranks)
        specs = {
            n: Spec(tuple(v.shape), mesh, (own.get(n, Replicate()),))
            if isinstance(v, Tensor)
            else v
            for n, v in self.given.items()
        }
        args, kwargs = self.arguments(specs)
        found = self.rule(distributed, *args, **kwargs)
        return [
            (outputs, {n: p for n, p in zip(self.given, inputs, strict=False) if p is not None})
            for outputs, inputs in found
        ]


def part(tensor: Tensor, placement: Any, rank: int, ranks: int) -> Tensor:
    if isinstance(placement, Shard):
        parts = tensor.chunk(ranks, placement.dim)
        return parts[rank]
    return torch.zeros_like(tensor) if isinstance(placement, Partial) and rank else tensor


def parts_of(call: Call, placements: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    given = {
        n: part(v, placements.get(n), rank, ranks) if isinstance(v, Tensor) else v
        for n, v in call.given.items()
    }
    for scale in [n for n in given if n.endswith("_scale") and n.removesuffix("_scale") in given]:
        data = scale.removesuffix("_scale")
        given[data], given[scale] = laid_out(given[data], given[scale])
    if "bias" in given:
        given["bias"] = given["bias"].contiguous()
    return given


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor


def compare(call: Call, ranks: int, case: tuple[list[Any], dict[str, Any]], whole: Any) -> None:
    outputs, placements = case
    assert len(outputs) == len(whole)
    results = [call.run(parts_of(call, placements, rank, ranks)) for rank in range(ranks)]
    for index, (placement, expected) in enumerate(zip(outputs, whole, strict=True)):
        own = [bits(result[index]) for result in results]
        where = call.name, ranks, placements, index
        if isinstance(placement, Shard):
            assert torch.equal(torch.cat(own, placement.dim), bits(expected)), where
        elif isinstance(placement, Partial):
            total = torch.stack(own).double().sum(0)
            difference = (total - expected).norm() / expected.double().norm().clamp_min(1e-30)
            assert difference < (1e-6 if expected.dtype == torch.float32 else 1e-2), where
        else:
            assert all(torch.equal(result, bits(expected)) for result in own), where


def aligned(name: str) -> Iterator[Sample]:
    sizes = (ALIGNED,) * (3 if DECLARATIONS[name].multiplies else 2)
    return (make(*sizes) for make in CATALOG[name].sized.values())


@pytest.mark.parametrize("name", [n for n in DECLARATIONS if n in CATALOG])
def test_shards_of_whole_groups_have_the_whole_result(name):
    sharded = False
    for given in aligned(name):
        call = Call(name, given)
        whole = call.run(call.given)
        for case in call.allowed(2, {}):
            outputs, placements = case
            if all(p == Replicate() for p in placements.values()):
                assert all(p == Replicate() for p in outputs)
                continue
            sharded = True
            assert case in call.allowed(2, placements)
            compare(call, 2, case, whole)
    assert sharded == (name not in REPLICATED)


@pytest.mark.parametrize("name", [n for n in DECLARATIONS if n in CATALOG])
def test_shards_of_other_sizes_are_refused_or_have_the_whole_result(name):
    """Of the catalog's first sample, whose sizes are ragged, so that shards cut groups."""
    label = next(iter(CATALOG[name].samples))
    call = Call(name, CATALOG[name].sample(label))
    whole = call.run(call.given)
    for ranks, case in itertools.product((2, 3), call.allowed(2, {})):
        shards = {n: p for n, p in case[1].items() if isinstance(p, Shard)}
        if any(call.given[n].shape[p.dim] < ranks for n, p in shards.items()):
            continue  # a rank would have none of it: DTensor replicates such a tensor
        try:
            found = call.allowed(ranks, case[1])
        except ValueError as error:
            assert f"{name}: placements must let each rank" in str(error)
        else:
            assert case in found
            compare(call, ranks, case, whole)


@pytest.mark.parametrize("name", [n for n in DECLARATIONS if n in CATALOG])
def test_other_placements_are_refused(name):
    """Each tensor alone in shards, along each dimension, unless the rule allows it."""
    call = Call(name, next(aligned(name)))
    allowed = [placements for _, placements in call.allowed(2, {})]
    for argument, value in call.given.items():
        if not isinstance(value, Tensor):
            continue
        for dim in range(value.dim()):
            tensors = [n for n, v in call.given.items() if isinstance(v, Tensor)]
            own: dict[str, Any] = dict.fromkeys(tensors, Replicate())
            own[argument] = Shard(dim)
            if own in allowed or name == "fp8_linear":  # DTensor redistributes, as torch's linear
                continue
            reason = "tensors must be replicated, since|placements must let"
            with pytest.raises(ValueError, match=rf"{name}: ({reason}).* \(got .*; redistribute"):
                call.allowed(2, own)


def test_private_ops_have_rules():
    """Those of layers, which DTensor redistributes, and those that refuse shards."""
    private = {n for n in DECLARATIONS if n not in CATALOG}
    layers = {"_linear", "_linear_mixed", "_linear_dgrad", "_linear_wgrad"}
    assert private - layers <= REPLICATED
    for name in private - layers:
        schema = DECLARATIONS[name].handles[0]._schema
        tensor = Spec((256, 256), Mesh(2), (Shard(0),))
        kinds = [argument.type for argument in schema.arguments]
        given = [tensor if k.isSubtypeOf(torch.TensorType.get()) else None for k in kinds]
        rule: Any = DECLARATIONS[name].sharding
        with pytest.raises(ValueError, match=f"{name}: tensors must be replicated, since"):
            rule(distributed, *given)


def test_partial_tensors_are_refused():
    call = Call("rms_norm_backward", next(aligned("rms_norm_backward")))
    with pytest.raises(ValueError, match="rms_norm_backward: placements must let each rank"):
        call.allowed(2, {n: Partial() for n in ("grad", "x")})
    assert math.prod(call.given["x"].shape) == ALIGNED**2
