"""FP8 layers that read one tensor, such as q, k and v, quantize it once and save it once.

`quantized_once` returns what the thread's last FP8 layer made if that layer read the same tensor
with the same contents and quantized it alike. A norm that computes a tensor may quantize it in the
same kernel and `offer` it: then no layer that reads it quantizes. Layers tell the norm what they
need through `Readers`.

Contents are compared by PyTorch's version counter, which misses writes through `.data`, numpy or
another process. So an input is shared only if the model computed it in this forward: if it has a
grad_fn, which a buffer that the user fills in place never has, or, also without gradients, if it
was offered. In inference mode tensors have no version, and nothing is offered or shared. The slot
holds no reference to the input, and is emptied when the input dies.

torch.compile does not come here: it removes repeated quantizations by itself. The rules of
shared_in_graph.py let a traced layer take what a norm quantized.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..recipe import Recipe

if TYPE_CHECKING:
    from .linear_function import Operand


class Form(NamedTuple):
    """How the layers that read a tensor need it quantized, with 1x128 scales.

    Attributes:
        dtype, pow2_scale: as for the quantizers.
        transposed: for wgrad, too, which reads `data_t`.
    """

    dtype: torch.dtype
    pow2_scale: bool
    transposed: bool


class Readers:
    """What the layers that read a norm's results ask for in one grad mode.

    It starts with a guess. If no FP8 layer reads the results, then the norm makes no transpose any
    more: after one forward if none ever did, and after two otherwise, because activation
    checkpointing repeats a norm whose readers it need not repeat.
    """

    def __init__(self, guess: Form) -> None:
        self._form = guess
        self._asked: Form | None = None  # in the last forward
        self._unread = 0  # forwards without a reader

    def wanted(self) -> Form | None:
        """What the next readers will probably need; None if nothing may be offered to them.

        Called once in every forward.
        """
        if torch._C._len_torch_dispatch_stack():
            # Selective checkpointing replays ops in order, so the choice of ops must not change.
            modes = _get_current_dispatch_mode_stack()
            replays = any(type(mode).__module__ == "torch.utils.checkpoint" for mode in modes)
            return None if replays else self._form
        if self._asked is not None:
            self._form, self._asked, self._unread = self._asked, None, 0
        else:
            self._unread += 1
            if self._unread == 2:
                self._form = self._form._replace(transposed=False)
        return self._form

    def ask(self, form: Form) -> None:
        """Called by each reader. The dtype and the scales are those of the first."""
        if self._asked is None:
            self._asked = form
        elif form.transposed:
            self._asked = self._asked._replace(transposed=True)


class _Entry(NamedTuple):
    """A tensor that layers read: what it was, its quantization (`operand`) by `scheme`, and the
    readers of the norm that computed it, if one did."""

    reference: weakref.ref[Tensor]
    state: tuple[Any, ...]
    scheme: tuple[Any, ...]
    operand: Operand
    readers: Readers | None


class _Slot(threading.local):
    """The last tensor that FP8 layers of a thread read, or that was offered to them."""

    entry: _Entry | None = None


_slot = _Slot()


def quantized_once(
    x: Tensor, recipe: Recipe, *, transposed: bool, quantize: Callable[[], Operand]
) -> Operand:
    """x quantized by `recipe`, with `data`, and with `data_t` if `transposed`.

    Calls `quantize` if x was not offered so and the last layer of this thread did not make it.
    """
    if type(x) is not Tensor or torch._C._len_torch_function_stack():
        return quantize()
    entry = _slot.entry
    if entry is not None and entry.reference() is not x:
        entry = None
    if entry is None and x.grad_fn is None:
        return quantize()
    state = _state(x)
    scheme = recipe.granularity, recipe.input_dtype, recipe.pow2_scale
    readers = None
    if entry is not None and entry.state == state:
        operand, readers = entry.operand, entry.readers
        if readers is not None and recipe.granularity == "blockwise":
            readers.ask(Form(recipe.input_dtype, recipe.pow2_scale, transposed))
        if entry.scheme == scheme and (operand.data_t is not None or not transposed):
            return operand
        del operand
    _slot.entry = entry = None  # before its successor is allocated
    operand = quantize()
    if readers is not None or x.grad_fn is not None:
        _put(x, state, scheme, operand, readers)
    return operand


def offer(x: Tensor, readers: Readers, form: Form, operand: Operand) -> None:
    """Offers x, which the caller has just computed, to the layers of this thread.

    Args:
        x: a tensor that nobody else has seen.
        readers: learns what the layers need that read x.
        form: how `operand` was quantized.
        operand: x quantized.
    """
    if type(x) is Tensor and not x.is_inference():
        _put(x, _state(x), ("blockwise", form.dtype, form.pow2_scale), operand, readers)


def _put(
    x: Tensor,
    state: tuple[Any, ...],
    scheme: tuple[Any, ...],
    operand: Operand,
    readers: Readers | None,
) -> None:
    slot = vars(_slot)  # of this thread; another may free x

    def drop(reference: weakref.ref[Tensor]) -> None:
        held = slot.get("entry")
        if held is not None and held.reference is reference:
            slot["entry"] = None

    _slot.entry = _Entry(weakref.ref(x, drop), state, scheme, operand, readers)


def _state(x: Tensor) -> tuple[Any, ...]:
    """What must be equal for the contents of the object x, and what ops do with them, to be."""
    place: Any = None
    if x.is_cuda:  # another stream would not wait, and a captured graph must quantize by itself
        place = (
            torch._C._cuda_getCurrentRawStream(x.get_device()),
            torch.cuda.is_current_stream_capturing(),
        )
    modes: tuple[weakref.ref[Any], ...] = ()  # a mode may change results, or replay ops
    if torch._C._len_torch_dispatch_stack():
        modes = tuple(map(weakref.ref, _get_current_dispatch_mode_stack()))
    return id(x), x._version, x.data_ptr(), place, modes
