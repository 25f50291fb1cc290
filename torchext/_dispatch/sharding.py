"""Registers the ops' sharding rules with DTensor: tensor and sequence parallelism.

Imported when the first DTensor is passed to a layer or to an op with a rule (dtensor.py), and by
torchext.distributed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed.tensor as distributed
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from .declaration import DECLARATIONS


def _cached_by_every_option(op: Any) -> None:
    """Makes DTensor's cache of decisions distinguish all arguments that are no tensors.

    register_sharding makes it distinguish integers alone. Then a call with another dtype, or with
    another number of outputs, would get the shapes and dtypes of an earlier call.
    """
    arguments = op._schema.arguments
    options = [not isinstance(_without_optional(a.type), torch.TensorType) for a in arguments]
    positions = [i for i, a in enumerate(arguments) if options[i] and not a.kwarg_only]
    names = [a.name for a, is_option in zip(arguments, options, strict=True) if is_option]
    propagator = distributed.DTensor._op_dispatcher.sharding_propagator
    info = RuntimeSchemaInfo(min(positions, default=100), names or None, needs_pytree=True)
    propagator.register_op_strategy(op, propagator.op_strategy_funcs[op], info)


def _without_optional(kind: Any) -> Any:
    return kind.getElementType() if isinstance(kind, torch.OptionalType) else kind


for _declaration in DECLARATIONS.values():
    for _op in filter(None, _declaration.handles[:2]):  # the op, and its alias if it has one
        register_sharding(_op)(functools.partial(_declaration.sharding, distributed))
        _cached_by_every_option(_op)
