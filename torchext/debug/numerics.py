"""`torchext.debug.numerics`: what FP8 does to the operands and results of each GEMM of each layer.

Hooks on the FP8 layers see input and output in forward, and the output's gradient in backward. For
an observed forward they quantize and multiply once more, with the ops that the layer uses, and
compare with FP32 products. Without the context, and in forwards that are not observed, no op runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.converted import is_fp8
from ..nn.experts import ExpertsInFP8, trains_in_fp8
from ..ops import dequantize
from ..ops.linear_function import (
    Operand,
    gemm_of_operands,
    quantize_activation,
    quantize_weight,
    wide_dgrad,
    wide_wgrad,
)
from ..recipe import Recipe
from .experts_numerics import ObservedExperts, observable, parameters_of_experts
from .numerics_report import NumericsReport, OperandNumerics


@contextmanager
def numerics(model: torch.nn.Module, every: int = 1) -> Iterator[NumericsReport]:
    """Within this context, observes the GEMMs of the FP8 layers of `model`:

        with torchext.debug.numerics(model, every=100) as report:
            train(model)
        print(report)

    For each layer and GEMM, and each of its operands, the report has the largest magnitude, the
    range of scales, the shares of elements that underflow and saturate, and the SQNR of the result
    against the FP32 product. It also names layer, GEMM and operand of the first NaN or infinity. It
    can be read at any time.

    An observed forward takes several times as long, and keeps the layer's input, as a
    torch.nn.Linear does, until backward. Forwards that are not observed run the same ops as without
    the context, but for fused MLPs: their layers run one after another throughout the context,
    since a fused one has no result of its own to look at (docs/layers.md has the difference). A
    forward that activation checkpointing repeats does not count.

    Layers that run in compiled code, under a transform of torch.func, or with tensor subclasses,
    and experts whose tokens come from other ranks, are not observed; `report.unobserved` lists
    them. Each 3-D parameter of experts counts as a layer with the parameter's name. The rows of
    each expert are quantized apart from those of others. For wgrad this differs from the layer,
    where a scale group may hold rows of several experts.

    Args:
        model: any module. The context applies to the FP8 layers that it has on entry.
        every: observe the first forward of each layer, and then every `every`-th.

    Raises:
        TypeError: model is not a torch.nn.Module, or every is not an integer.
        ValueError: every is less than 1.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"torchext.debug.numerics: model must be a torch.nn.Module (got {type(model).__name__})"
            "; pass the model whose FP8 layers are to be observed"
        )
    if not isinstance(every, int) or isinstance(every, bool):
        raise TypeError(
            f"torchext.debug.numerics: every must be an integer (got {every!r}); pass 1 to observe "
            "every forward"
        )
    if every < 1:
        raise ValueError(
            f"torchext.debug.numerics: every must be at least 1 (got {every}); pass 1 to observe "
            "every forward"
        )
    layers = {name: module for name, module in model.named_modules() if is_fp8(module)}
    experts = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ExpertsInFP8) and trains_in_fp8(module)
    }
    parts = [part for name, layer in experts.items() for part in parameters_of_experts(name, layer)]
    report = NumericsReport([*layers, *parts], every)
    handles = [
        layer.register_forward_hook(_Observer(name, report), with_kwargs=True)
        for name, layer in layers.items()
    ]
    handles += [
        layer.register_forward_hook(_ExpertsObserver(name, report), with_kwargs=True)
        for name, layer in experts.items()
    ]
    try:
        yield report
    finally:
        for handle in handles:
            handle.remove()


class _Observer:
    """The forward hook of one layer."""

    def __init__(self, name: str, report: NumericsReport) -> None:
        self.name = name
        self.report = report
        self.forwards = 0
        self.observed = False  # whether the last forward is an observed one

    def __call__(self, layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return
        # Within backward, checkpointing runs a forward again, with the gradients that it may have
        # lacked the first time.
        repeated = torch._C._current_graph_task_id() != -1
        if not repeated:
            self.forwards += 1
            self.observed = (self.forwards - 1) % self.report.every == 0
        if self.observed:
            self.observe(layer, args, kwargs, output, repeated=repeated)

    def observe(self, layer: Any, args: Any, kwargs: Any, output: Any, *, repeated: bool) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        weight, bias = layer.weight, getattr(layer, "bias", None)
        tensors = [t for t in (x, weight, bias, output) if t is not None]
        if not all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_nested for t in tensors):
            return
        needs_dx, needs_dw = x.requires_grad, weight.requires_grad
        if not isinstance(layer, torch.nn.Linear):
            weight = weight.t()
        with _undisturbed(x):
            sample = self.sample(self.name, layer.recipe, x.detach(), weight.detach())
            if not repeated:
                sample.fprop(None if bias is None else bias.detach(), output.detach())
        if output.requires_grad and (needs_dx or needs_dw):
            output.register_hook(lambda dy: sample.backward(dy, needs_dx, needs_dw))

    def sample(
        self, name: str, recipe: Recipe, x: Tensor, weight: Tensor, *, counts: bool = True
    ) -> _Sample:
        return _Sample(_Place(name, self.report, self.forwards, counts), recipe, x, weight)


class _ExpertsObserver(_Observer):
    """The forward hook of experts in 3-D parameters: each expert is observed as an MLP."""

    def observe(self, layer: Any, args: Any, kwargs: Any, output: Any, *, repeated: bool) -> None:
        given = observable(layer, args, kwargs)
        if given is None:
            return
        x, needs_dx = given[0], given[0].requires_grad
        with _undisturbed(x):
            mlps = ObservedExperts(self.name, layer, given, self.sample)
            if not repeated:
                mlps.fprop()
        if output.requires_grad:
            shape = x.shape
            output.register_hook(lambda dy: mlps.backward(dy.reshape(shape), needs_dx))


@contextmanager
def _undisturbed(x: Tensor) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield


class _Place(NamedTuple):
    """Where a sample belongs.

    Attributes:
        name: the layer's name.
        report: the report that gets the figures.
        number: the number of the layer's forward, from 1.
        counts: false if the report counts another part of the sample already.
    """

    name: str
    report: NumericsReport
    number: int
    counts: bool


class _Sample:
    """One observed forward of a layer, or of a part of it, and its backward."""

    def __init__(self, place: _Place, recipe: Recipe, x: Tensor, weight: Tensor) -> None:
        self.name, self.report, self.number, self.counts = place
        self.recipe = recipe
        self.x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        self.weight = weight

    def fprop(self, bias: Tensor | None, y: Tensor | None) -> None:
        """Adds the figures of fprop.

        Args:
            bias: [N]; None for none.
            y: the layer's result [..., N]; None to compute it.
        """
        a = self._operand("fprop", "input", self.x)
        b = self._operand("fprop", "weight", self.weight)
        if y is None:
            assert a is not None and b is not None
            y = gemm_of_operands(a, b, self.x.dtype)
        if bias is not None:
            self._look("fprop", "bias", bias)
        wide = F.linear(self.x.float(), self.weight.float(), None if bias is None else bias.float())
        self._result("fprop", y.reshape(wide.shape), wide)

    def backward(self, dy: Tensor, needs_dx: bool, needs_dw: bool) -> None:
        if type(dy) is not Tensor:  # batched gradients
            return
        with _undisturbed(dy):
            dy = dy.detach().reshape(self.x.shape[0], dy.shape[-1])
            if needs_dx:
                a = self._operand("dgrad", "grad", dy)
                b = self._operand("dgrad", "weight", self.weight.t())
                if a is None or b is None:
                    dx = wide_dgrad(dy, self.weight, self.x.dtype)
                else:
                    dx = gemm_of_operands(a, b, self.x.dtype)
                self._result("dgrad", dx, dy.float() @ self.weight.float())
            if needs_dw:
                a = self._operand("wgrad", "grad", dy.t().contiguous())
                b = self._operand("wgrad", "input", self.x.t().contiguous())
                if a is None or b is None:
                    dw = wide_wgrad(dy, self.x, self.weight.dtype)
                else:
                    dw = gemm_of_operands(a, b, self.weight.dtype)
                self._result("wgrad", dw, dy.float().t() @ self.x.float())

    def _operand(self, gemm: str, role: str, values: Tensor) -> Operand | None:
        """Adds an operand as its GEMM reads it, [rows, what the GEMM sums over], to the report.

        Returns it quantized, or None if the GEMM is wide.
        """
        fp8 = getattr(self.recipe, gemm) == "fp8"
        entry = self.report.gemm(self.name, gemm, fp8)
        operand = entry.operands.setdefault(role, OperandNumerics())
        quantized = None
        if fp8:
            quantized = self._quantized(role, values)
            _add_quantized(operand, values, quantized)
        operand.add(values.numel(), *self._look(gemm, role, values))
        return quantized

    def _quantized(self, role: str, values: Tensor) -> Operand:
        if role == "weight":
            return quantize_weight(values, self.recipe, transposed=False)
        dtype = getattr(self.recipe, f"{role}_dtype")
        return quantize_activation(values, dtype, self.recipe, plain=True, transposed=False)

    def _look(self, gemm: str, operand: str, values: Tensor) -> tuple[float, float]:
        """(largest finite magnitude, number of values that are not finite)."""
        if not values.numel():
            return 0.0, 0.0
        magnitudes = values.abs()
        finite = magnitudes.isfinite()
        amax = magnitudes.where(finite, 0).amax().double()
        figures = torch.stack([amax, (~finite).sum().double(), values.isnan().sum().double()])
        largest, nonfinite, nans = figures.tolist()
        if nonfinite:
            self.report.note_nonfinite(self.name, gemm, operand, nans > 0, self.number)
        return largest, nonfinite

    def _result(self, gemm: str, result: Tensor, wide: Tensor) -> None:
        fp8 = getattr(self.recipe, gemm) == "fp8"
        signal = wide.square().sum(dtype=torch.float64)
        noise = (wide - result).square().sum(dtype=torch.float64)
        self.report.gemm(self.name, gemm, fp8).add(
            *torch.stack([signal, noise]).tolist(), counts=self.counts
        )
        _, nonfinite = self._look(gemm, "output", result)
        if not nonfinite:
            self.report.note_finite(self.name, gemm)


def _add_quantized(operand: OperandNumerics, values: Tensor, quantized: Operand) -> None:
    data, scale = quantized.data, quantized.scale
    assert data is not None and scale is not None
    if not values.numel():
        return
    dequantized = dequantize(data, scale, out_dtype=torch.float32)
    wide = values.float()
    underflow = (dequantized == 0) & (wide != 0)
    # Rounding of the scale may leave the largest element a little above the format's maximum.
    at_limit = data.float().abs() == torch.finfo(data.dtype).max
    saturated = at_limit & (wide.abs() > dequantized.abs() * (1 + 2**-20))
    finite = scale.isfinite()
    smallest = scale.where(finite, math.inf).amin()
    figures = [smallest, scale.where(finite, 0).amax(), underflow.sum(), saturated.sum()]
    low, high, under, over = torch.stack([figure.double() for figure in figures]).tolist()
    operand.add_quantized(values.numel(), (low, high), under, over)
