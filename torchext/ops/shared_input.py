"""FP8 layers that read one tensor, such as q, k and v, quantize it once and save it once.

`quantized_once` returns what the thread's last FP8 layer made if that layer read the same tensor
with the same contents and quantized it alike. Contents are compared by PyTorch's version counter,
which misses writes through `.data`, numpy or another process. So an input is shared only if it has
a grad_fn: the model computed it in this forward, and a buffer that the user fills in place never
has one. The slot holds no reference to the input, and is emptied when the input dies.

torch.compile does not come here: it removes repeated quantizations by itself.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..recipe import Recipe

if TYPE_CHECKING:
    from .linear_function import Operand


class _Slot(threading.local):
    """The last quantized input of a thread.

    Attributes:
        entry: (weak reference to the input, its state, the operand), or None.
    """

    entry: tuple[weakref.ref[Tensor], tuple[Any, ...], Operand] | None = None


_slot = _Slot()


def quantized_once(
    x: Tensor, recipe: Recipe, *, transposed: bool, quantize: Callable[[], Operand]
) -> Operand:
    """x quantized by `recipe`, with `data`, and with `data_t` if `transposed`.

    Calls `quantize` if the last layer of this thread did not make it.
    """
    if x.grad_fn is None or type(x) is not Tensor or torch._C._len_torch_function_stack():
        return quantize()
    state = _state(x, recipe)
    entry = _slot.entry
    if entry is not None:
        reference, its_state, operand = entry
        enough = operand.data_t is not None or not transposed
        if enough and its_state == state and reference() is x:
            return operand
        _slot.entry = entry = None  # before its successor is allocated
    operand = quantize()
    slot = vars(_slot)  # of this thread; another may free x

    def drop(reference: weakref.ref[Tensor]) -> None:
        held = slot.get("entry")
        if held is not None and held[0] is reference:
            slot["entry"] = None

    _slot.entry = (weakref.ref(x, drop), state, operand)
    return operand


def _state(x: Tensor, recipe: Recipe) -> tuple[Any, ...]:
    """What must be equal for two quantizations of the object x to be equal."""
    place: Any = None
    if x.is_cuda:  # another stream would not wait, and a captured graph must quantize by itself
        place = (
            torch._C._cuda_getCurrentRawStream(x.get_device()),
            torch.cuda.is_current_stream_capturing(),
        )
    modes: tuple[weakref.ref[Any], ...] = ()  # a mode may change results, or replay ops
    if torch._C._len_torch_dispatch_stack():
        modes = tuple(map(weakref.ref, _get_current_dispatch_mode_stack()))
    return (
        id(x),
        x._version,
        x.data_ptr(),
        recipe.granularity,
        recipe.input_dtype,
        recipe.pow2_scale,
        place,
        modes,
    )
