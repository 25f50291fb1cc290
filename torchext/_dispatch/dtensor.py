"""Recognizes DTensors without importing torch.distributed.tensor, which takes most of a second."""

from __future__ import annotations

import sys
from typing import Any


def is_distributed(tensor: Any) -> bool:
    """Whether it is a DTensor. Registers the ops' sharding rules when it sees the first one."""
    module = sys.modules.get("torch.distributed.tensor")  # a program that has a DTensor imported it
    if module is None or not isinstance(tensor, module.DTensor):
        return False
    from . import sharding  # noqa: F401  (registers the rules, once)

    return True
