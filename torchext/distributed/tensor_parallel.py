"""Parallel styles for parallelize_module whose sequence-parallel communication is in FP8."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from .._dispatch.layout import GROUP
from ..nn.linear import Linear, output_dtype
from ..nn.mlp import can_fuse_recipe
from ..ops.linear_function import (
    LinearFunction,
    Operand,
    _product,
    foldable,
    kept_for_dgrad,
    quantize_activation,
    quantize_gradient,
    quantize_weight,
    read_for_dgrad,
)
from ..recipe import Recipe
from .activation import (
    GatheredInput,
    Rows,
    as_plain,
    as_transposed,
    check_rows,
    gather_input,
    gathered,
    scattered_sum,
)

Cut = Literal["refuse", "requantize"]


class _Fp8Parallel(ParallelStyle):
    """Base of the styles of linear layers."""

    _dim: int  # of the weight, along which it is sharded

    def __init__(self, layout: Placement | None, cut: Cut) -> None:
        super().__init__()
        name = f"torchext.distributed.{type(self).__name__}"
        if cut not in ("refuse", "requantize"):
            raise ValueError(
                f"{name}: cut must be 'refuse' or 'requantize' (got {cut!r}); omit it for 'refuse'"
            )
        self._layout = layout or Replicate()
        if type(self._layout) not in (Replicate, Shard):
            raise ValueError(
                f"{name}: layouts must be Replicate() or Shard(dim) (got {layout}); redistribute "
                "the tensor outside of the layer"
            )
        self._name, self._cut = name, cut

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self._check(module, device_mesh)
        assert isinstance(module, Linear)
        for name, parameter in [*module._parameters.items()]:
            if parameter is None:
                continue
            shards = [Shard(self._dim) if name == "weight" else self._bias_placement()]
            new = nn.Parameter(
                distribute_tensor(parameter.detach(), device_mesh, shards), parameter.requires_grad
            )
            module.register_parameter(name, new)
        module._parallel_style = self  # type: ignore[assignment]
        module.forward = functools.partial(self._forward, module, device_mesh)  # type: ignore[method-assign]
        return module

    def _check(self, module: nn.Module, mesh: DeviceMesh) -> None:
        if type(module) is not Linear:
            raise TypeError(
                f"{self._name}: the module must be a torchext.nn.Linear (got "
                f"{type(module).__name__}); convert the model before parallelize_module"
            )
        if not can_fuse_recipe(module.recipe):
            raise ValueError(
                f"{self._name}: the layer's recipe must be blockwise, with all GEMMs in FP8 (got "
                f"{module.recipe}); use torch's styles for other recipes"
            )
        size, ranks = module.weight.shape[self._dim], mesh.size()
        features = ("out_features", "in_features")[self._dim]
        if size % ranks:
            raise ValueError(
                f"{self._name}: {features} must be a multiple of the {ranks} ranks (got {size})"
            )
        if size % (ranks * GROUP) and self._cut == "refuse":
            raise ValueError(
                f"{self._name}: {features} must be a multiple of {ranks} ranks times {GROUP} (got "
                f"{size}, so that a shard of {size // ranks} cuts a 128x128 block); pass "
                'cut="requantize" to give each rank scales of its own part'
            )

    def _bias_placement(self) -> Placement:
        raise NotImplementedError

    def _forward(self, layer: Linear, mesh: DeviceMesh, x: Tensor) -> Tensor:
        raise NotImplementedError


class Fp8ColwiseParallel(_Fp8Parallel):
    """Each rank has some output features of a torchext.nn.Linear: weight and bias are Shard(0).

    An input that is sharded along its rows (sequence parallelism) is gathered in FP8: a byte for
    each element and 4 for each 1x128 group, instead of BF16's 2 for each element. Backward gathers
    it again, quantized along its rows for wgrad, and sums and scatters its gradient in the
    gradient's dtype. The layer's output is a plain tensor with this rank's features.

    The output and the gradients of parameters have the bits of the unsharded layer. The gradient of
    the input is the sum of the ranks' rounded parts.
    """

    _dim = 0

    def __init__(self, *, input_layouts: Placement | None = None, cut: Cut = "refuse") -> None:
        """
        Args:
            input_layouts: Replicate() (the default), or Shard(dim) of the rows: a rank must have
                multiples of 128 rows. An input from PrepareFp8Input is taken as it is.
            cut: what to do if a shard of the weight is no multiple of 128 rows: "refuse" it, or
                "requantize", by which each rank computes scales of its own rows, so that results
                differ from those of the unsharded layer by the rounding of FP8.

        Raises:
            ValueError: another layout or `cut`; from parallelize_module: the shard cuts a block, or
                the recipe is not blockwise with all GEMMs in FP8.
            TypeError: from parallelize_module: the module is no torchext.nn.Linear.
        """
        super().__init__(input_layouts, cut)

    def _bias_placement(self) -> Placement:
        return Shard(0)

    def _forward(self, layer: Linear, mesh: DeviceMesh, x: Tensor) -> Tensor:
        weight, bias = _local(layer.weight), _local(layer.bias)
        if isinstance(self._layout, Shard) and not isinstance(x, GatheredInput):
            x = gather_input(self._name, x, layer.recipe, self._layout.dim, mesh)
        if isinstance(x, GatheredInput):
            return _Column.apply(x, weight, bias, layer.recipe, output_dtype(x))  # type: ignore[no-any-return]
        x = _SummedGradient.apply(x, mesh)
        return LinearFunction.apply(x, weight, bias, layer.recipe, output_dtype(x), None)  # type: ignore[no-any-return]


class Fp8RowwiseParallel(_Fp8Parallel):
    """Each rank has some input features of a torchext.nn.Linear: the weight is Shard(1).

    The layer's input is this rank's features, as Fp8ColwiseParallel returns them. The ranks' parts
    of the output are summed in its dtype. If the output is sharded along its rows (sequence
    parallelism), its gradient is gathered in FP8, half of BF16's bytes, quantized both ways.

    The gradients of parameters and of the input have the bits of the unsharded layer. The output is
    the sum of the ranks' rounded parts.
    """

    _dim = 1

    def __init__(self, *, output_layouts: Placement | None = None, cut: Cut = "refuse") -> None:
        """
        Args:
            output_layouts: Replicate() (the default), or Shard(dim) of the rows: a rank must get
                multiples of 128 rows.
            cut: as for Fp8ColwiseParallel, for columns of the weight.

        Raises:
            ValueError, TypeError: as Fp8ColwiseParallel.
        """
        super().__init__(output_layouts, cut)

    def _bias_placement(self) -> Placement:
        return Replicate()

    def _forward(self, layer: Linear, mesh: DeviceMesh, x: Tensor) -> Tensor:
        weight, bias = _local(layer.weight), _local(layer.bias)
        recipe, dtype = layer.recipe, output_dtype(x)
        if isinstance(self._layout, Shard):
            dim = self._layout.dim % x.dim()
            y = _Row.apply(x, weight, recipe, dtype, dim, mesh, self._name)
            if bias is not None:  # each rank adds it to its rows
                bias = _SummedGradient.apply(bias, mesh)
        else:
            y = _Sum.apply(LinearFunction.apply(x, weight, None, recipe, dtype, None), mesh)
        return y if bias is None else y + bias.to(dtype)  # type: ignore[no-any-return]


class PrepareFp8Input(ParallelStyle):
    """Gathers a module's first input once, in FP8, for all Fp8ColwiseParallel layers in it.

    For an attention whose q, k and v read one input: they get a tensor that only such layers can
    read. Its shape and dtype are those of the whole input.
    """

    def __init__(self, *, input_layouts: Placement, recipe: Recipe | None = None) -> None:
        """
        Args:
            input_layouts: Shard(dim) of the rows, multiples of 128 on each rank.
            recipe: of the layers; Recipe.deepseek_v3() if None.

        Raises:
            ValueError: another layout, or a recipe that is not blockwise with all GEMMs in FP8.
        """
        super().__init__()
        self._recipe = recipe or Recipe()
        if not isinstance(input_layouts, Shard) or not can_fuse_recipe(self._recipe):
            raise ValueError(
                "torchext.distributed.PrepareFp8Input: input_layouts must be Shard(dim) and recipe "
                f"blockwise, with all GEMMs in FP8 (got {input_layouts}, {self._recipe}); use "
                "torch's PrepareModuleInput otherwise"
            )
        self._dim = input_layouts.dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def prepare(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *rest = inputs
            name = "torchext.distributed.PrepareFp8Input"
            return gather_input(name, x, self._recipe, self._dim, device_mesh), *rest

        module.register_forward_pre_hook(prepare)
        return module


def _local(parameter: Any) -> Any:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _for_dgrad(ctx: Any, weight: Operand, needed: bool) -> tuple[Tensor | None, Tensor | None]:
    """What to save of the quantized weight: its transpose, or what backward transposes if FSDP2
    gathered it in FP8 (and frees it after forward)."""
    ctx.transposes = weight.data_t is None
    return kept_for_dgrad(weight) if needed else (None, None)


class _Column(torch.autograd.Function):
    """apply(x, weight, bias, recipe, out_dtype): a GatheredInput times this rank's features."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, recipe, out_dtype = inputs
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        q_w = quantize_weight(weight, recipe, transposed=needs_dx)
        ctx.save_for_backward(*_for_dgrad(ctx, q_w, needs_dx))
        ctx.rows = x.rows if needs_dw else None
        ctx.recipe = recipe
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return _product(*x.pair, q_w.data, q_w.scale, bias, out_dtype=out_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        dx = dw = None
        q_dy, db = quantize_gradient(
            foldable(grads[0]),
            ctx.recipe,
            plain=needs_dx,
            transposed=needs_dw,
            bias_dtype=bias_dtype if needs_db else None,
        )
        if needs_dx:
            w_t = read_for_dgrad(ctx.saved_tensors, transposes=ctx.transposes)
            dx = _product(q_dy.data, q_dy.scale, *w_t, out_dtype=x_dtype)
            dx = dx.view(*grads[0].shape[:-1], -1)
        if needs_dw:
            x_t = ctx.rows.gather_transposed()
            dw = _product(q_dy.data_t, q_dy.scale_t, *x_t, out_dtype=weight_dtype)
        return dx, dw, db, None, None


class _Row(torch.autograd.Function):
    """apply(x, weight, recipe, out_dtype, dim, mesh, op): this rank's rows of the sum of all ranks'
    products."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, recipe, out_dtype, dim, mesh, op = inputs
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        q_x = quantize_activation(
            foldable(x), recipe.input_dtype, recipe, plain=True, transposed=needs_dw
        )
        q_w = quantize_weight(weight, recipe, transposed=needs_dx)
        y = _product(q_x.data, q_x.scale, q_w.data, q_w.scale, None, out_dtype=out_dtype)
        own = scattered_sum(y.view(*x.shape[:-1], -1), dim, mesh)
        check_rows(op, own, dim)
        ctx.save_for_backward(*_for_dgrad(ctx, q_w, needs_dx), q_x.data_t, q_x.scale_t)
        ctx.recipe, ctx.dim, ctx.mesh = recipe, dim, mesh
        ctx.dtypes = x.dtype, weight.dtype
        return own

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        x_dtype, weight_dtype = ctx.dtypes
        *w_t, x_t, x_t_scale = ctx.saved_tensors
        recipe, dx, dw = ctx.recipe, None, None
        rows = Rows.of(grads[0], recipe.grad_dtype, recipe, ctx.dim, ctx.mesh)
        parts = rows.plain_parts() if needs_dx else []
        parts += rows.transposed_parts() if needs_dw else []
        sent = gathered(parts, ctx.mesh) if parts else []
        if needs_dx:
            w_t = read_for_dgrad(w_t, transposes=ctx.transposes)
            dx = _product(*as_plain(*sent[:2]), *w_t, out_dtype=x_dtype)
        if needs_dw:
            dw = _product(*as_transposed(*sent[-2:]), x_t, x_t_scale, out_dtype=weight_dtype)
        return dx, dw, None, None, None, None, None


class _Sum(torch.autograd.Function):
    """apply(x, mesh): the sum over all ranks, of which each rank's gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=mesh.get_group())
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _SummedGradient(torch.autograd.Function):
    """apply(x, mesh): x, whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.mesh.get_group())
        return total, None
