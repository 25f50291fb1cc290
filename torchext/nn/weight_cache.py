"""Keeps a layer's FP8 weight while the parameter provably has not changed.

PyTorch cannot tell whether a parameter's bytes were written: collectives, `.data`, numpy and other
processes leave no trace. So on a CPU every forward compares a hash of all bytes
(csrc/runtime/content_hash.cpp). On CUDA reading a hash back would stall the stream, so every
forward quantizes the weight. Within `fixed_weights` the user vouches that parameters do not change,
and an FP8 weight is reused on any device without a look at the parameter's bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

from .._dispatch.c_api import c_function
from ..ops.linear_function import Operand, quantize_weight
from ..recipe import Recipe

_content_hash = c_function("torchext_content_hash")  # releases the interpreter lock

_lock = threading.Lock()  # guards _fixed and WeightCache.fixed
_fixed: set[WeightCache] = set()  # the caches that a `fixed_weights` context holds


class _Kept(NamedTuple):
    operand: Operand
    state: tuple[Any, ...]  # the parameter's state when it was quantized
    weight: Tensor | None  # kept alive if `state` has its id(), which must not be reused


class WeightCache:
    """The FP8 weights of one layer. Copies and pickles of it are empty.

    Attributes:
        fixed: the number of `fixed_weights` contexts that hold the layer.
    """

    def __init__(self) -> None:
        self.fixed = 0
        self._kept: dict[Any, _Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()

    def clear(self) -> None:
        self._kept.clear()

    def tensors(self) -> list[Tensor]:
        """Every tensor that is kept: FP8 values and scales."""
        return [part for kept in self._kept.values() for part in kept.operand if part is not None]

    def operand(
        self, weight: Tensor, recipe: Recipe, *, transposed: bool, role: str = ""
    ) -> Operand | None:
        """`weight` quantized by `recipe`, with the operand for dgrad if `transposed`.

        None if it may not be kept. Then the caller quantizes the weight, by an op that tracers and
        transforms see. `role` tells the weights of a layer apart that has several.
        """
        # A computed weight (parametrized, or given by torch.func.functional_call) is a new tensor
        # in each forward, and a subclass may keep its values elsewhere.
        if type(weight) is not torch.nn.Parameter:
            return None
        if not self.fixed and not weight.is_cpu:  # for speed, before anything else on a GPU
            if self._kept:
                self.clear()
            return None
        if _is_traced():
            return None
        if self.fixed:
            if _is_captured(weight):
                return None
            place: Any = (role, recipe, _stream(weight))
            state, held = _recorded_state(weight), weight
        else:
            content = _content(weight)
            if content is None:
                self.clear()
                return None
            place, held = role, None
            state = (recipe, *content)
        kept = self._kept.get(place)
        if kept is not None:
            if kept.state == state and (kept.operand.data_t is not None or not transposed):
                return kept.operand
            kept = None
            self._kept.pop(place, None)  # before its successor is allocated
        # `state` was read first, so the next forward notices a write that happens during this.
        with torch.inference_mode(False), torch.no_grad():  # so that backward may save it
            operand = quantize_weight(weight, recipe, transposed=transposed)
            if not _has_modes() or _is_unaltered(operand, weight, recipe):
                self._kept[place] = _Kept(operand, state, held)
        return operand


def _has_modes() -> bool:
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())


def _is_traced() -> bool:
    """Whether a tracer or transform is active, which must see each op on the parameter."""
    if torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active():
        return True
    # The modes of fake tensors, proxies and functionalization have a _mode_key. make_fx may trace
    # above autograd.
    return _has_modes() and (
        any(
            getattr(mode, "_mode_key", None) is not None
            for mode in _get_current_dispatch_mode_stack()
        )
        or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
    )


def _is_unaltered(operand: Operand, weight: Tensor, recipe: Recipe) -> bool:
    """Whether `operand` has the bits that it has without the user's active modes.

    A mode that only counts ops may leave its operand in the cache. The operand that a mode has
    changed must not outlive that mode.
    """
    if not all(part is None or type(part) is Tensor for part in operand):
        return False
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        plain = quantize_weight(weight, recipe, transposed=operand.data_t is not None)
        return all(
            _same_bits(part, its_own)
            for part, its_own in zip(operand, plain, strict=True)
            if part is not None and its_own is not None
        )


def _same_bits(x: Tensor, y: Tensor) -> bool:
    bits = torch.uint8 if x.itemsize == 1 else torch.int32
    return x.dtype == y.dtype and torch.equal(x.view(bits), y.view(bits))


def _content(weight: Tensor) -> tuple[Any, ...] | None:
    """Everything that determines the values of `weight`, with its bytes as a hash.

    weight: on the CPU. None without memory to hash, or if hashing costs too much.
    """
    shape, strides = weight.shape, weight.stride()
    extent = weight.nbytes
    if not weight.is_contiguous():
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        extent = (last + 1) * weight.itemsize
        if extent > 2 * weight.nbytes:  # a few columns of a wide matrix
            return None
    address = weight.data_ptr()
    if address == 0 or extent <= 0:
        return None
    return _content_hash(address, extent), weight.dtype, shape, strides, weight.is_neg()


def _recorded_state(weight: Tensor) -> tuple[Any, ...]:
    """Changes with each write and each assignment that PyTorch records."""
    return (
        id(weight),
        None if weight.is_inference() else weight._version,
        weight.data_ptr(),
        weight.dtype,
        weight.shape,
        weight.stride(),
        weight.is_neg(),
    )


def _stream(weight: Tensor) -> int | None:
    # A key of the cache: another stream would not wait until the weight is quantized.
    return torch._C._cuda_getCurrentRawStream(weight.get_device()) if weight.is_cuda else None


def _is_captured(weight: Tensor) -> bool:
    # A replay of the graph must read the parameter's values at that time.
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


@contextmanager
def fixed_weights(model: torch.nn.Module) -> Iterator[None]:
    """Within this context each FP8 layer of `model` quantizes its weight once and reuses it.

    For the micro-batches of gradient accumulation and for inference, where many forwards use the
    same weights:

        with torchext.fixed_weights(model):
            for batch in micro_batches:
                loss(model(batch)).backward()
        optimizer.step()

    On CUDA this saves the quantization that every forward otherwise does. On a CPU it saves the
    read of the weight that the hash in every forward otherwise needs. Until the context ends, it
    costs one byte for each element of the weight, or two if the layer's input needs a gradient. A
    weight is kept for each recipe and CUDA stream that it is used with. Contexts nest, and apply to
    all threads.

    Layers still notice changes that PyTorch records: by a torch.optim.Optimizer, another in-place
    operation, assignment, `load_state_dict` or `to`. They do not notice changes that PyTorch does
    not record: through `.data`, numpy, a collective or another process. Make such changes outside
    of the context, or call the layer's `refresh_weight()` after them. Under torch.compile, in CUDA
    graphs and for computed weights (parametrizations) the context changes nothing: every forward
    quantizes the weight.

    Args:
        model: any module. The context applies to the torchext.nn.Linear layers that it has on
            entry.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            "torchext.fixed_weights: model must be a torch.nn.Module (got "
            f"{type(model).__name__}); pass the model whose layers must keep their FP8 weights"
        )
    caches = [
        cache
        for module in model.modules()
        if isinstance(cache := module.__dict__.get("_weight_cache"), WeightCache)
    ]
    _hold(caches, 1)
    try:
        yield
    finally:
        _hold(caches, -1)


def _hold(caches: list[WeightCache], change: int) -> None:
    with _lock:
        for cache in caches:
            before, cache.fixed = cache.fixed, cache.fixed + change
            if before == 0 or cache.fixed == 0:
                cache.clear()
            (_fixed.add if cache.fixed else _fixed.discard)(cache)


def _after_optimizer_step(*_: Any) -> None:
    # For steps that do not increase version counters: fused steps, steps that write through
    # `.data`, and steps on FSDP2's shards. A compiled step increases them, and must get no guard on
    # the caches.
    if not torch.compiler.is_compiling():
        with _lock:
            for cache in _fixed:
                cache.clear()


register_optimizer_step_post_hook(_after_optimizer_step)
