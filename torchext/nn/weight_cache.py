"""Keeps a layer's FP8 weight until the weight changes, and notices every way in which it can.

Between optimiser steps (gradient accumulation, evaluation) a weight is quantised once. PyTorch
offers no single sign that a parameter has changed, so several are compared, each cheap.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..recipe import Recipe
from .linear_function import Operand


def is_cacheable(weight: Tensor) -> bool:
    """Whether changes of `weight` can be noticed.

    Not of a computed weight (parametrised, or swapped in by torch.func.functional_call), a subclass
    that keeps its values elsewhere, or an inference tensor, which has no version. Nor may a cached
    weight be baked into a CUDA graph that is being captured: replays must see the parameter.
    """
    return (
        type(weight) is torch.nn.Parameter
        and not weight.is_inference()
        and not _is_captured(weight)
    )


def _is_captured(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


class CachedWeight:
    """A quantised weight, and the state of the parameter that it was made from.

    Copies and pickles of it are None: a copied module quantises its own weight.
    """

    optimizer_steps = 0  # of every optimiser in this process

    def __init__(self, weight: Tensor, recipe: Recipe, quantized: Operand) -> None:
        self.quantized = quantized
        self._weight = weakref.ref(weight)
        # The weak reference keeps the storage's identity, not its memory, from being used again.
        self._storage = StorageWeakRef(weight.untyped_storage())
        self._state = _state(weight, recipe)

    def is_current(self, weight: Tensor, recipe: Recipe) -> bool:
        """Whether `weight`, quantised by `recipe`, would give what is cached."""
        return (
            self._weight() is weight
            and self._storage.cdata == weight.untyped_storage()._cdata
            and self._state == _state(weight, recipe)
            and not _is_captured(weight)
        )

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _state(weight: Tensor, recipe: Recipe) -> tuple[Any, ...]:
    # The stream, because another one would not wait for the quantisation to finish.
    stream = torch._C._cuda_getCurrentRawStream(weight.get_device()) if weight.is_cuda else None
    return (
        weight._version,
        weight.data_ptr(),
        weight.dtype,
        weight.shape,
        weight.stride(),
        recipe,
        stream,
        CachedWeight.optimizer_steps,
    )


def _count_optimizer_step(*_: Any) -> None:
    # A compiled step bumps versions, and would be compiled anew for every value of this counter.
    if not torch.compiler.is_compiling():
        CachedWeight.optimizer_steps += 1


# Two kinds of change leave no trace on the parameter itself: an optimiser that writes through
# `p.data`, and FSDP2, which refills unsharded parameters and restores their version counters.
register_optimizer_step_post_hook(_count_optimizer_step)
