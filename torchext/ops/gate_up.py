"""The GEMMs of an MLP's gate and up, with their results side by side, `torchext::_gate_up`.

`gate_up` writes both results to one tensor. Dynamo refuses an `out` that is not contiguous, so a
compiled graph holds the op. Its kernel is in Python: it only calls the op of the dense GEMM twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dispatch.batching import each
from .._dispatch.declaration import declare
from .._dispatch.flops import product_flops
from .._dispatch.sharding_rules import replicated
from .gemm import write_product

_DEF = torch.library.Library("torchext", "FRAGMENT")
_DEF.define(
    "_gate_up(Tensor x, Tensor x_scale, Tensor gate, Tensor gate_scale, Tensor? gate_bias, "
    "Tensor up, Tensor up_scale, Tensor? up_bias, ScalarType out_dtype) -> Tensor"
)


def gate_up(x: Tensor, x_scale: Tensor, *rest: Any) -> Tensor:
    """[M, 2 I]: in each row x @ gate.T + gate_bias, and then x @ up.T + up_bias.

    Args:
        x, x_scale: [M, K], quantized.
        rest: gate, gate_scale, gate_bias, up, up_scale, up_bias, out_dtype: quantized weights
            [I, K] with biases [I] or None, and the dtype of the result.
    """
    *projections, out_dtype = rest
    gate = projections[0]
    wide = x.new_empty((x.shape[0], 2 * gate.shape[0]), dtype=out_dtype)
    for i, part in enumerate(wide.chunk(2, 1)):
        weight, scale, bias = projections[3 * i : 3 * i + 3]
        write_product(x, x_scale, weight, scale, out=part, bias=bias)
    return wide


for _device in ("CPU", "CUDA"):
    _DEF.impl("_gate_up", gate_up, _device)


def _fake(x: Tensor, x_scale: Tensor, gate: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], 2 * gate.shape[0]), dtype=rest[-1])


def _flops(x_shape: Any, x_scale_shape: Any, gate_shape: Any, *_: Any, **options: Any) -> int:
    return 2 * product_flops(x_shape, x_scale_shape, gate_shape)


gate_up_in_graph = declare(
    "_gate_up",
    fake=_fake,
    flops=_flops,
    batching=each,
    sharding=replicated("_gate_up", "compiled MLPs call it with plain tensors"),
).op
