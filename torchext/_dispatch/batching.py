"""Batching rules: what torch.vmap and batched gradients compute for an op.

If each row of the result depends on one row of a single batched tensor, the op runs once and treats
the batch as one more leading dimension. Otherwise (two batched operands, tensor-wise scales, sums
over rows) the op runs once for each element of the batch. Scales and FP8 values are the same in
both cases, and elements keep the layout that GEMMs read.

PyTorch has two kinds of batched tensors: those of torch.func, and those of batched gradients
(`is_grads_batched=True`, `vectorize=True` in torch.autograd.functional). The rules serve both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import custom_function_call_vmap_helper
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.utils._pytree import tree_map

from . import library  # noqa: F401  (loads the ops)
from .layout import laid_out, round_up

_ops = torch.ops.torchext
_IMPL = torch.library.Library("torchext", "IMPL")

# Arguments that must be contiguous. An element of a batch may not be, and is then copied.
_DENSE = ("bias", "offsets", "group_ids", "masked_m", "message")

# Calls the op with all of its arguments by position.
Call = Callable[..., Any]
# The dimension along which each argument is batched, or None.
BatchDims = tuple[int | None, ...]
# (call, size of the batch, batched dimensions, *arguments) -> (result, its batched dimensions)
Rule = Callable[..., tuple[Any, Any]]


def register_batching(name: str, overload: str, rule: Rule) -> None:
    """Gives the overload of an op its batching rule, for both kinds of batched tensors."""
    op = getattr(getattr(_ops, name), overload)
    arguments = op._schema.arguments
    names = [argument.name for argument in arguments]
    positional = sum(not argument.kwarg_only for argument in arguments)

    def call(*operands: Any) -> Any:
        dense = (
            operand.contiguous() if name in _DENSE and operand is not None else operand
            for name, operand in zip(names, operands, strict=True)
        )
        operands = tuple(dense)
        options = dict(zip(names[positional:], operands[positional:], strict=True))
        return op(*operands[:positional], **options)

    def apply_rule(info: Any, dims: BatchDims, *operands: Any) -> tuple[Any, Any]:
        return rule(call, info.batch_size, dims, *operands)

    def bind(operands: tuple[Any, ...], options: dict[str, Any]) -> list[Any]:
        given = dict(zip(names, operands, strict=False)) | options
        return [given.get(argument.name, argument.default_value) for argument in arguments]

    def batched(*operands: Any, **options: Any) -> Any:
        # torch.library.register_vmap cannot be used: it takes no keyword-only tensors.
        interpreter: Any = retrieve_current_functorch_interpreter()
        bound = bind(operands, options)
        result = custom_function_call_vmap_helper(interpreter, apply_rule, call, *bound)
        return result if op._schema.returns else None

    def batched_gradient(*operands: Any, **options: Any) -> Any:
        return _apply_to_gradients(rule, call, bind(operands, options))

    suffix = "" if overload == "default" else f".{overload}"
    for kernel, key in ((batched, "FuncTorchBatched"), (batched_gradient, "Batched")):
        _IMPL.impl(f"{name}{suffix}", torch._disable_dynamo(kernel), key)


def _apply_to_gradients(rule: Rule, call: Call, operands: list[Any]) -> Any:
    """Applies a rule to batched tensors of the kind that autograd makes for batched gradients."""
    levels = [_innermost_level(operand) for operand in operands]
    innermost = max(levels)
    # The rule sees the innermost batch as a dimension. Outer batches stay batched.
    dims = tuple(0 if level == innermost else None for level in levels)
    physical = [
        operand if dim is None else torch._remove_batch_dim(operand, innermost, 1, dim)
        for operand, dim in zip(operands, dims, strict=True)
    ]
    size = next(t.shape[0] for t, dim in zip(physical, dims, strict=True) if dim is not None)
    results, _ = rule(call, size, dims, *physical)
    if results == ():
        return None
    return tree_map(lambda t: torch._add_batch_dim(t, 0, innermost), results)


def _innermost_level(t: Any) -> int:
    """The greatest level at which autograd has batched `t`; 0 if at none.

    torch counts levels in a thread-local variable, which is 0 in the threads that run the backward
    of CUDA tensors. So this function tries the levels 1, 2, ... until none is left.
    """
    level = 0
    while _is_batched_gradient(t):
        level += 1
        # For a level that `t` lacks, torch adds a dimension of the size that is given here.
        tried = [torch._remove_batch_dim(t, level, size, 0) for size in (1, 2)]
        if tried[0].shape[0] == tried[1].shape[0]:
            t = tried[0]
    return level


def _is_batched_gradient(t: Any) -> bool:
    return isinstance(t, Tensor) and torch._C._functorch.is_legacy_batchedtensor(t)


# ---- one call for each element ----


def _each(
    call: Call, size: int, dims: BatchDims, *operands: Any, stack: Callable[..., Any]
) -> tuple[Any, Any]:
    if size == 0:
        return _of_none(call, dims, *operands)
    results = []
    for index in range(size):
        element = (
            operand if dim is None else operand.select(dim, index)
            for operand, dim in zip(operands, dims, strict=True)
        )
        results.append(call(*element))
    if isinstance(results[0], Tensor):
        return stack(results), 0
    if results[0] is None:  # the op writes into its argument
        return (), ()
    stacked = tuple(stack(column) for column in zip(*results, strict=True))
    return stacked, tuple(0 for _ in stacked)


def _of_none(call: Call, dims: BatchDims, *operands: Any) -> tuple[Any, Any]:
    """The result for an empty batch. A call with zeros gives the shape of its elements."""
    element = (
        operand
        if dim is None
        else operand.new_zeros([n for d, n in enumerate(operand.shape) if d != dim])
        for operand, dim in zip(operands, dims, strict=True)
    )
    result = call(*element)
    if result is None:
        return (), ()
    empty = tree_map(lambda t: t.new_empty((0, *t.shape)), result)
    return empty, tree_map(lambda t: 0, empty)


def _stack_as_laid_out(elements: list[Tensor]) -> Tensor:
    """Stacks elements into [batch, ...] so that each keeps its strides and 16-byte alignment."""
    first = elements[0]
    extent = 1 + sum((n - 1) * s for n, s in zip(first.shape, first.stride(), strict=True))
    span = round_up(extent if first.numel() else 0, 16 // first.itemsize)
    result = first.new_empty_strided((len(elements), *first.shape), (span, *first.stride()))
    for index, element in enumerate(elements):
        result[index].copy_(element)
    return result


def each(call: Call, size: int, dims: BatchDims, *operands: Any) -> tuple[Any, Any]:
    return _each(call, size, dims, *operands, stack=torch.stack)


def each_quantized(call: Call, size: int, dims: BatchDims, *operands: Any) -> tuple[Any, Any]:
    return _each(call, size, dims, *operands, stack=_stack_as_laid_out)


# ---- one call for the whole batch ----


def quantize_rows(dims_of_element: int) -> Rule:
    """Rule for a quantizer that quantizes each row (1 dimension) or each matrix (2) by itself."""

    def rule(call: Call, size: int, dims: BatchDims, x: Tensor, *options: Any) -> tuple[Any, Any]:
        if x.dim() - 1 < dims_of_element:  # the op refuses the element
            return each_quantized(call, size, dims, x, *options)
        assert dims[0] is not None
        x = x.movedim(dims[0], 0)
        if dims_of_element == 1:
            x = x.contiguous()  # so that its rows fold
        results = call(x, *options)
        return results, tuple(0 for _ in results)

    return rule


def multiply_rows(
    call: Call, size: int, dims: BatchDims, a: Tensor, a_scale: Tensor, *rest: Any
) -> tuple[Any, Any]:
    a_dim, scale_dim, *others = dims
    if (
        a_dim is None
        or scale_dim is None
        or any(dim is not None for dim in others)
        or a.dim() < 2
        or _element_shape(a, a_dim)[:-1] != _element_shape(a_scale, scale_dim)[:-1]
    ):
        return each_product(call, size, dims, a, a_scale, *rest)
    pair = as_products_read(a.movedim(a_dim, 0), a_scale.movedim(scale_dim, 0))
    return call(*pair, *rest), 0


def multiply_wide_rows(call: Call, size: int, dims: BatchDims, *operands: Any) -> tuple[Any, Any]:
    """Rule for a wide x times a quantized weight: x, weight, weight's scale, ..."""
    x, (x_dim, *others) = operands[0], dims
    if x_dim is not None and x.dim() > 1 and all(dim is None for dim in others):
        return call(x.movedim(x_dim, 0), *operands[1:]), 0

    def product(x: Tensor, weight: Tensor, scale: Tensor, *rest: Any) -> Any:
        return call(x, *as_products_read(weight, scale), *rest)

    return each(product, size, dims, *operands)


def _element_shape(x: Tensor, dim: int) -> list[int]:
    return [size for d, size in enumerate(x.shape) if d != dim]


# ---- layouts ----


def as_products_read(data: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A quantized pair with the layout that GEMMs read, copied if batching has changed it."""
    if data.dim() == 0 or scale.dim() == 0:
        return data, scale  # the op refuses them
    return laid_out(data, scale)


def _product_of(loop: Rule) -> Rule:
    """The rule `loop` for a GEMM, whose operands first get the layout that it reads."""

    def rule(call: Call, size: int, dims: BatchDims, *operands: Any) -> tuple[Any, Any]:
        def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *rest: Any) -> Any:
            pairs = *as_products_read(a, a_scale), *as_products_read(b, b_scale)
            return call(*pairs, *rest)

        return loop(product, size, dims, *operands)

    return rule


each_product = _product_of(each)
each_quantized_product = _product_of(each_quantized)
