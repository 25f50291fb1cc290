"""Finds norms in a model by what they compute, and makes them quantize for FP8 layers, in place.

A candidate is a module with one or two parameters, [K] each, and nothing else. It is called in
float64 with random parameters and inputs of several magnitudes. If the results are those of an
RMSNorm or a LayerNorm, with the weight or 1 + weight, then the module computes it: its class does
not matter. Only norms as wide as the input of a blockwise FP8 layer are candidates.

The module gets a subclass of its class with the same name. Its forward is that of
torchext.nn.RMSNorm or LayerNorm or, where that cannot run, the forward of its class.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._probing import results_of
from .nn.converted import Rerouted, is_fp8
from .nn.norm import LayerNorm, ReadersByMode, RMSNorm, fused_norm, rms_eps
from .ops.norm_function import Kind, Norm
from .ops.shared_input import Form


class NormRoles(NamedTuple):
    """Names what a module computes as a norm.

    Attributes:
        kind, unit_offset: as in torchext.ops.norm_function.Norm.
        weight, bias: names of its parameters.
        eps: the name of the attribute that is eps, or its value.
        keeps_dtype: the result has the dtype of x even if the weight's is wider.
    """

    kind: Kind
    unit_offset: bool
    weight: str
    bias: str | None
    eps: str | float
    keeps_dtype: bool


def recognize_norm(module: nn.Module, widths: Container[int] | None = None) -> NormRoles | None:
    """The roles of the module's parameters if it computes a norm over its last dimension.

    widths: which K count; None for all.
    """
    if "forward" in vars(module) or type(module).forward is nn.Module.forward:
        return None
    parameters = {n: p for n, p in module._parameters.items() if p is not None}
    if module._modules or module._buffers or not 1 <= len(parameters) <= 2:
        return None
    if any(is_lazy(p) or type(p) is not nn.Parameter or p.dim() != 1 for p in parameters.values()):
        return None
    sizes = {parameter.shape[0] for parameter in parameters.values()}
    if len(sizes) > 1 or (widths is not None and sizes.pop() not in widths):
        return None
    if type(module).forward is nn.RMSNorm.forward:
        return NormRoles("rms_norm", False, "weight", None, "eps", True)
    if type(module).forward is nn.LayerNorm.forward:
        bias = "bias" if "bias" in parameters else None
        return NormRoles("layer_norm", False, "weight", bias, "eps", True)
    return _Probe(module, list(parameters)).roles()


class _Probe:
    """A copy of a module with random parameters, and its results in float64."""

    # A clamp shows only where values are large, and eps where they are small.
    _SCALES = (1, 30, 1e-3, 1e-6)

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        size = module._parameters[names[0]].shape[0]  # type: ignore[union-attr]

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

        self.module = copy.copy(module)
        self.module._parameters = {name: nn.Parameter(random(size)) for name in names}
        self.inputs = [scale * random(2, 3, size) for scale in self._SCALES]

    def roles(self) -> NormRoles | None:
        results = results_of(self.module, [(x,) for x in self.inputs], "norm")
        if results is None:
            return None
        for weight, bias in self._orders():
            kinds: list[Kind] = ["layer_norm"] if bias else ["rms_norm", "layer_norm"]
            for kind, unit_offset in itertools.product(kinds, (False, True)):
                norm = Norm(kind, 0.0, unit_offset)
                for name, eps in self._candidates(norm, weight, bias, results[-1]):
                    if self._agrees(norm._replace(eps=eps), weight, bias, results):
                        return NormRoles(
                            kind, unit_offset, weight, bias, name or eps, self._keeps_dtype()
                        )
        return None

    def _orders(self) -> Iterator[tuple[str, str | None]]:
        """The names of weight and bias, in the possible orders."""
        names = list(self.module._parameters)
        if len(names) == 1:
            yield names[0], None
        else:
            yield from itertools.permutations(names)  # type: ignore[misc]

    def _expected(self, norm: Norm, weight: str, bias: str | None, x: Tensor) -> Tensor:
        if norm.kind == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
        factors = self._parameter(weight) + (1 if norm.unit_offset else 0)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * factors
        return y if bias is None else y + self._parameter(bias)

    def _agrees(self, norm: Norm, weight: str, bias: str | None, results: list[Tensor]) -> bool:
        for x, y in zip(self.inputs, results, strict=True):
            expected = self._expected(norm, weight, bias, x)
            # The module may compute in FP32.
            if not (y.to(expected) - expected).abs().max() <= 1e-5 * expected.abs().max():
                return False
        return True

    def _candidates(
        self, norm: Norm, weight: str, bias: str | None, y: Tensor
    ) -> Iterator[tuple[str | None, float]]:
        """The attributes that may be eps, and then the value that y, the result for the smallest
        input, tells."""
        for name, value in vars(self.module).items():
            if type(value) is float and 0 <= value < 1:
                yield name, value
        x = self.inputs[-1]
        without = self._expected(norm, weight, bias, x)
        shift = 0 if bias is None else self._parameter(bias)
        ratio = (without - shift) / (y.to(without) - shift)  # sqrt((v + eps) / v)
        if norm.kind == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
        eps = ((ratio.square() - 1) * x.square().mean(-1, keepdim=True)).median().item()
        if 0 <= eps < 1:
            yield None, float(f"{eps:.5g}")

    def _parameter(self, name: str) -> Tensor:
        parameter = self.module._parameters[name]
        assert parameter is not None
        return parameter.detach()

    def _keeps_dtype(self) -> bool:
        self.module._parameters = {
            name: nn.Parameter(self._parameter(name).float()) for name in self.module._parameters
        }
        x = self.inputs[0].bfloat16()
        try:
            with torch.no_grad():
                y = type(self.module).forward(self.module, x)
        except RuntimeError:  # it refuses operands of two dtypes
            return False
        return bool(y.dtype == x.dtype)


class FusedNorm(Rerouted):
    """Base of the subclasses that norms get.

    Attributes:
        fused_roles: what the module computes.
        fused_readers: what FP8 layers ask of its results.
    """

    fused_roles: NormRoles
    fused_readers: ReadersByMode
    added = ("fused_roles", "fused_readers")

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            y = self._fused(args[0])
            if y is not None:
                return y
        return super().run(*args, **kwargs)

    def _fused(self, x: Tensor) -> Tensor | None:
        kind, unit_offset, weight_name, bias_name, eps, keeps_dtype = self.fused_roles
        weight = self._parameters.get(weight_name)
        if weight is None or (
            not keeps_dtype and torch.promote_types(weight.dtype, x.dtype) != x.dtype
        ):
            return None
        bias = None if bias_name is None else self._parameters.get(bias_name)
        if bias_name is not None and bias is None:
            return None
        value = rms_eps(getattr(self, eps)) if isinstance(eps, str) else eps
        return fused_norm(Norm(kind, value, unit_offset), weight, bias, self.fused_readers, x)


def fuse_norms(model: nn.Module) -> dict[str, str]:
    """Makes the norms of `model` run fused that are as wide as the input of a blockwise FP8 layer.

    Returns {fully qualified name: the norm's kind}.
    """
    guesses: dict[int, Form] = {}
    for layer in model.modules():
        if is_fp8(layer):
            recipe: Any = layer.recipe
            weight: Any = layer.weight
            width = weight.shape[1 if isinstance(layer, nn.Linear) else 0]
            if recipe.granularity == "blockwise" and recipe.fprop == "fp8":
                transposed = recipe.wgrad == "fp8"
                form = Form(recipe.input_dtype, recipe.pow2_scale, transposed)
                guesses.setdefault(width, form)
    fused = {}
    for fqn, module in model.named_modules():
        if isinstance(module, (FusedNorm, RMSNorm, LayerNorm)):
            continue
        roles = recognize_norm(module, guesses)
        if roles is None:
            continue
        weight = module._parameters[roles.weight]
        assert weight is not None
        fuse_(module, roles, guesses[weight.shape[0]])
        fused[fqn] = _NAMES[roles.kind]
    return fused


_NAMES: dict[Kind, str] = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm"}


def fuse_(module: Any, roles: NormRoles, guess: Form) -> None:
    """Makes a module that recognize_norm recognized run fused; `module.revert_()` undoes it."""
    plain: Any = type(module)
    module.__class__ = FusedNorm.class_for(plain)
    module.fused_roles = roles
    module.fused_readers = ReadersByMode(guess)


def unfuse_norms(model: nn.Module) -> None:
    """Undoes `fuse_norms`."""
    for module in model.modules():
        if isinstance(module, FusedNorm):
            module.revert_()
