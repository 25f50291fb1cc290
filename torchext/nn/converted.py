"""FP8 layers that a conversion makes of other classes than torch.nn.Linear.

A subclass of torch.nn.Linear that inherits its forward becomes a class of both: an instance of
torchext.nn.Linear and of the subclass. A layer that holds its weight as [in, out], as the Conv1D of
transformers' GPT-2 does, becomes a class of TransposedLinear and its own. Both classes are made at
the first conversion. Their instances can be copied and pickled, and `revert_` gives them their own
class back.
"""

from __future__ import annotations

import copyreg
import functools
import types
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.fx import Proxy

from ..ops.linear_function import LinearFunction, Operand, apply_eagerly, linear
from ..ops.linear_operands import bias_fits, fit, layer_error, misfit
from ..ops.linear_ranges import open_range
from ..recipe import Recipe
from .composition import composed, is_composed, is_composed_in_graph, traced_call
from .linear import Linear, _needs_graph, output_dtype
from .weight_cache import WeightCache

_ADDED = ("recipe", "_weight_cache")  # the attributes of a layer that a conversion adds


class Converted(torch.nn.Module):
    """What the made classes have in common."""

    plain_class: ClassVar[type[torch.nn.Module]]
    made_of: ClassVar[type]  # the base class besides plain_class
    added: ClassVar[tuple[str, ...]] = _ADDED  # the attributes that `revert_` removes

    def revert_(self) -> Any:
        """Gives the module its own class back, in place, and returns it."""
        for name in self.added:
            self.__dict__.pop(name, None)
        self.__class__ = self.plain_class  # type: ignore[assignment]
        return self

    @classmethod
    def class_for(cls, plain: type) -> type:
        base: Any = cls
        return made_class(base, plain)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle finds classes by their names, which a class made at run time does not have.
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced  # the plain class has a way of its own
        _, arguments, *rest = reduced
        return _new_instance, (self.made_of, self.plain_class, *arguments[1:]), *rest


class Rerouted(Converted):
    """Base of the made classes whose forward calls `run`, which may call the forward of the class.

    They keep the name of the class: wrapping policies go by it.

    Attributes:
        method: the name of the method that calls `run`.
    """

    method: ClassVar[str] = "forward"

    @classmethod
    def class_for(cls, plain: type) -> type:
        base: Any = cls
        made = made_class(base, plain, prefix="")
        if cls.method not in vars(made):

            @functools.wraps(getattr(plain, cls.method))
            def method(self: Any, *args: Any, **kwargs: Any) -> Any:
                return cls.run(self, *args, **kwargs)

            setattr(made, cls.method, method)  # tracers read its signature
        return made

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class _Subclass(Converted, Linear):
    """A layer of a subclass of torch.nn.Linear, in FP8."""


class TransposedLinear(Converted):
    """y = x @ weight + bias in FP8, for a layer whose weight is [in_features, out_features].

    Gradients, dtypes, the recipe and the FP8 weight that is kept are as in torchext.nn.Linear. On a
    CPU it keeps two bytes for each element of the weight, also for inference.
    """

    recipe: Recipe
    _weight_cache: WeightCache

    def forward(self, x: Tensor) -> Tensor:
        """Returns x @ weight + bias, [..., out_features], in x's dtype or autocast's.

        Args:
            x: [..., in_features], FP32, BF16 or FP16, of any strides, on the device of the
                parameters.

        Raises:
            RuntimeError: a shape or device does not fit.
            TypeError: x or a parameter has another dtype.
        """
        if type(x) is Proxy and type(self).forward is TransposedLinear.forward:
            call = traced_call(self, x)
            if call is not None:
                return call
        parameter: Tensor = self.weight  # type: ignore[assignment]
        bias: Tensor | None = getattr(self, "bias", None)  # type: ignore[assignment]
        weight = parameter.t()
        compiling = torch.compiler.is_compiling()
        if (
            type(x) is not Tensor
            or type(parameter) is not torch.nn.Parameter
            or (is_composed_in_graph() if compiling else is_composed())
        ):
            y = composed(self, x, weight, bias)  # type: ignore[arg-type]
            if y is not None:
                return y
        if not fit(x, weight, bias) or (compiling and not bias_fits(weight, bias)):
            raise misfit(x, weight, bias)
        opened = None
        if not compiling and profiler._is_profiler_enabled:
            opened = open_range("forward", self.recipe)
        try:
            quantized = None if compiling else self._quantized_weight(parameter, x)
            out_dtype = output_dtype(x)
            if _needs_graph(x, weight, bias):
                inputs = (x, weight, bias, self.recipe, out_dtype, quantized)
                return LinearFunction.apply(*inputs) if compiling else apply_eagerly(*inputs)
            return linear(
                x,
                weight,
                bias,
                recipe=self.recipe,
                out_dtype=out_dtype,
                quantized_weight=quantized,
            )[0]
        except RuntimeError as error:
            raise layer_error(error, x, weight, bias) from None
        finally:
            if opened is not None:
                opened.__exit__(None, None, None)

    def refresh_weight(self) -> None:
        """Drops the FP8 weight, as torchext.nn.Linear.refresh_weight does."""
        self._weight_cache.clear()

    def _quantized_weight(self, parameter: Tensor, x: Tensor) -> Operand | None:
        recipe = self.recipe
        transposed = recipe.dgrad == "fp8" and (
            x.requires_grad if torch.is_grad_enabled() else self.training
        )
        if not transposed and recipe.fprop != "fp8":
            return None
        return self.kept_operand(parameter)

    def kept_operand(self, parameter: Tensor) -> Operand | None:
        """The FP8 transpose of the parameter, which fprop multiplies; None if it is not kept."""
        kept = self._weight_cache.operand(parameter, self.recipe, transposed=True)
        if kept is None:
            return None
        return Operand(kept.data_t, kept.scale_t, kept.data, kept.scale)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.refresh_weight()  # the parameter will be replaced
        return super()._apply(fn, recurse)

    def __repr__(self) -> str:
        text = super().__repr__().removesuffix(")")
        return f"{text}{'' if text.endswith('(') else ', '}fp8={self.recipe})"


def convert_subclass_(layer: torch.nn.Linear, recipe: Recipe) -> torch.nn.Linear:
    """Turns a layer of a subclass of torch.nn.Linear, or of itself, into an FP8 layer in place.

    `layer` must be one for which `overrides` is None.
    """
    if type(layer) is torch.nn.Linear:
        return Linear.convert_(layer, recipe)
    return _convert_(layer, _Subclass, recipe)


def convert_transposed_(layer: torch.nn.Module, recipe: Recipe) -> torch.nn.Module:
    """Turns a layer for which `is_transposed_linear` is true into an FP8 layer in place."""
    return _convert_(layer, TransposedLinear, recipe)


def _convert_(layer: Any, base: type, recipe: Recipe) -> Any:
    plain: Any = type(layer)
    layer.__class__ = made_class(base, plain)
    layer.recipe = recipe
    layer._weight_cache = WeightCache()
    return layer


@functools.cache
def made_class(base: type, plain: type, prefix: str = "FP8") -> type:
    """The class of `base` (a subclass of Converted) and `plain`, whose name is prefixed."""

    def fill(namespace: dict[str, Any]) -> None:
        namespace["plain_class"] = plain
        namespace["made_of"] = base
        namespace["__module__"] = plain.__module__
        namespace["__doc__"] = f"{plain.__name__} in FP8."

    return types.new_class(f"{prefix}{plain.__name__}", (base, plain), exec_body=fill)


def _new_instance(base: Any, plain: type, *arguments: Any) -> Any:
    """An empty instance of the class made of `base` and `plain`, for pickle and copy."""
    made = base.class_for(plain)
    return made.__new__(made, *arguments)


def is_fp8(module: torch.nn.Module) -> bool:
    """Whether `module` is a linear layer that multiplies in FP8."""
    return isinstance(module, (Linear, TransposedLinear))


# What an FP8 forward would bypass if a class between the layer's and torch.nn.Linear defined it.
_OVERRIDES = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__",
              "weight", "bias", "recipe", "_weight_cache")  # fmt: skip


def overrides(layer: torch.nn.Linear) -> str | None:
    """The name that the subclass of `layer` defines and an FP8 layer would bypass, or None."""
    for cls in type(layer).__mro__:
        if cls is torch.nn.Linear:
            break
        for name in _OVERRIDES:
            if name in vars(cls):
                return name
    return next((name for name in _ADDED if name in vars(layer)), None)


def is_transposed_linear(module: torch.nn.Module) -> bool:
    """Whether `module` computes x @ weight + bias from a weight [in, out], and nothing else.

    It does if it has these parameters and no modules or buffers, if its `nf` is the number of
    outputs, as in transformers' Conv1D, and if its forward gives this product for two random rows
    (unless it is on the meta device).
    """
    parameters = dict(module.named_parameters(recurse=False))
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if (
        type(weight) is not torch.nn.Parameter
        or type(bias) is not torch.nn.Parameter
        or len(parameters) != 2
        or weight.dim() != 2
        or bias.shape != weight.shape[1:]
        or getattr(module, "nf", None) != weight.shape[1]
        or module._buffers
        or module._modules
        or any(name in vars(module) for name in ("forward", *_ADDED))
        or isinstance(module, (torch.nn.Linear, TransposedLinear))
    ):
        return False
    if weight.is_meta:
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[0], generator=generator, device="cpu").to(weight)
    with torch.no_grad():
        expected = torch.addmm(bias, x, weight)
        try:
            y = type(module).forward(module, x)
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            return False  # it takes other arguments, so it is another kind of layer
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected)
