"""While a graph is traced, FP8 layers take what a norm quantized, as shared_input.py does eagerly.

Every op of a graph goes through its tracing mode, which calls the rules of this file for the norms
and for quantize_1x128. A layer that quantizes the very value that a norm's op returned, and that
nothing has written to since, gets what the op returned beside it, and adds no op to the graph.
Writes to a value that a graph makes are new values to AOTAutograd; other tracers count versions.

Layers that train quantize by other ops, because a graph keeps the transpose in a form of its own
(csrc/linear/kept.h), and so quantize again.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from . import norm, quantize  # noqa: F401  (declare the ops)


class _Offer(NamedTuple):
    """What a norm's op returned beside the normed values, which had this version."""

    mode: weakref.ref[Any]
    version: int
    scheme: tuple[torch.dtype, bool]
    data: Tensor
    scale: Tensor


_offers: Any = WeakTensorKeyDictionary()  # by the normed values


def _scheme(kwargs: dict[str, Any]) -> tuple[torch.dtype, bool]:
    return kwargs.get("dtype") or torch.float8_e4m3fn, kwargs.get("pow2_scale", False)


def _norm(mode: Any, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    outputs = mode.__torch_dispatch__(func, types, args, kwargs)
    if kwargs.get("return_normed", False) and isinstance(outputs, tuple):
        data, scale, *_, normed = outputs
        _offers[normed] = _Offer(weakref.ref(mode), normed._version, _scheme(kwargs), data, scale)
    return outputs


def _quantize(mode: Any, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    x = args[0]
    offer = _offers.get(x)
    if (
        offer is not None
        and offer.mode() is mode
        and offer.version == x._version
        and offer.scheme == _scheme(kwargs)
    ):
        return offer.data, offer.scale
    return mode.__torch_dispatch__(func, types, args, kwargs)


for _kind in ("rms_norm", "layer_norm"):
    for _name in (f"{_kind}_quantize_1x128", f"{_kind}_quantize_1x128_dual"):
        torch.library.register_torch_dispatch(f"torchext::{_name}", ProxyTorchDispatchMode, _norm)
torch.library.register_torch_dispatch("torchext::quantize_1x128", ProxyTorchDispatchMode, _quantize)
