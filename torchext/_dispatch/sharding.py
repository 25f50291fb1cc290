"""Registers the ops' sharding rules with DTensor: tensor and sequence parallelism.

Imported with the first DTensor that meets a layer, because torch.distributed.tensor takes most of a
second to import.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed.tensor as distributed
from torch.distributed.tensor.experimental import register_sharding

from .declaration import DECLARATIONS

for _name, _declaration in DECLARATIONS.items():
    if _declaration.sharding is not None:
        _op = getattr(torch.ops.torchext, _name).default
        register_sharding(_op)(functools.partial(_declaration.sharding, distributed))
