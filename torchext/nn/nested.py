"""Converts jagged nested tensors to the rows that a layer multiplies, and back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor

Rewrap = Callable[[Tensor], Tensor]


def rows_of_nested(input: Tensor) -> tuple[Tensor, Rewrap] | None:
    """A jagged tensor's concatenated rows, and a function that makes a jagged tensor of their
    outputs; None for any other tensor.

    Rows in gaps between elements (where `lengths` is given) are left out: they may hold any values,
    which would affect scales and the weight's gradient. Their outputs are zero.
    """
    if not input.is_nested:
        return None
    if not isinstance(input, NestedTensor):
        raise TypeError(
            "torchext.nn.Linear: input must be a nested tensor of layout torch.jagged (got "
            f"{input.layout}); make it with torch.nested.nested_tensor(..., layout=torch.jagged)"
        )
    ragged = input._ragged_idx
    if ragged == input.dim() - 1:
        raise RuntimeError(
            "torchext.nn.Linear: input must have a last dimension of in_features (got a ragged "
            "one); transpose the nested tensor"
        )
    values, offsets, lengths = input.values(), input.offsets(), input.lengths()
    rows, index, dim = values, None, ragged - 1
    if lengths is not None:
        index = _rows_of_elements(offsets, lengths)
        rows = values.index_select(dim, index)

    def rewrap(y: Tensor) -> Tensor:
        if index is not None:
            shape = (*values.shape[:-1], y.shape[-1])
            y = y.new_zeros(shape).index_copy(dim, index, y)
        return torch.nested.nested_tensor_from_jagged(
            y,
            offsets,
            lengths,
            jagged_dim=ragged,
            min_seqlen=input._maybe_min_seqlen,
            max_seqlen=input._maybe_max_seqlen,
        )

    return rows, rewrap


def _rows_of_elements(offsets: Tensor, lengths: Tensor) -> Tensor:
    before = lengths.cumsum(0) - lengths  # for each element, the rows of all earlier elements
    shift = torch.repeat_interleave(offsets[: len(lengths)] - before, lengths)
    return torch.arange(len(shift), device=shift.device) + shift
