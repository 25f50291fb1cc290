"""Registers the ops' sharding rules with DTensor: tensor and sequence parallelism.

Imported when the first DTensor is passed to a layer, because importing torch.distributed.tensor
takes most of a second.
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
