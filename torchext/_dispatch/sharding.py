"""Registers the ops' sharding rules with DTensor: tensor and sequence parallelism.

Imported when the first DTensor is passed to a layer or to an op with a rule (dtensor.py).
"""

from __future__ import annotations

import functools

import torch.distributed.tensor as distributed
from torch.distributed.tensor.experimental import register_sharding

from .declaration import DECLARATIONS

for _declaration in DECLARATIONS.values():
    if _declaration.sharding is not None:
        for _op in filter(None, _declaration.handles[:2]):  # the op, and its alias if it has one
            register_sharding(_op)(functools.partial(_declaration.sharding, distributed))
