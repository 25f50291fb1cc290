"""torchext.nn.Linear: torch.nn.Linear whose three GEMMs run in FP8."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.fx import Proxy
from torch.nn import Parameter

from ..ops.linear_function import LinearFunction, Operand, apply_eagerly, linear
from ..ops.linear_operands import bias_fits, fit, layer_error, misfit
from ..ops.linear_ranges import open_range
from ..recipe import Recipe
from .composition import composed, is_composed, is_composed_in_graph
from .nested import rows_of_nested
from .weight_cache import WeightCache


class Linear(torch.nn.Linear):
    """y = x @ weight.T + bias, whose forward and backward GEMMs run in FP8.

    In every other way it behaves as torch.nn.Linear.

    Parameters (`weight` [out_features, in_features], `bias` [out_features]), their initialization
    and `state_dict` keys are those of torch.nn.Linear, so either class loads the other's
    checkpoints. in_features and out_features may be any numbers.

    Backward uses an FP8 copy of the input (one byte for each element, plus scales); the original is
    not kept. Every forward uses the current weight, whatever wrote it. On a CPU the layer keeps the
    FP8 weight, one byte for each element (two in training), and quantizes the parameter again only
    when a hash of its bytes changes. On CUDA and under torch.compile every forward quantizes the
    parameter. `torchext.fixed_weights` saves both the hash and the quantization while weights do
    not change.

    """

    recipe: Recipe
    _weight_cache: WeightCache
    _keeps_input: bool = False  # as `keep_input` of LinearFunction

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Recipe | None = None,
    ) -> None:
        """Allocates and initializes the parameters, as torch.nn.Linear does.

        Args:
            in_features: size K of the input's last dimension.
            out_features: size N of the output's last dimension. `weight` is [N, K].
            bias: whether the layer has a parameter `bias`, [N]; otherwise `bias` is None.
            device: device of the parameters; torch's default device if None.
            dtype: dtype of the parameters: FP32, BF16 or FP16; torch's default dtype if None.
                Only `forward` checks it.
            recipe: how the input, the weight and the output's gradient are quantized;
                Recipe.deepseek_v3() if None.

        Raises:
            TypeError: recipe is not a torchext.Recipe, or a size is not an integer.
            RuntimeError: a size is negative; dtype is not floating-point; torch lacks the device.
        """
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe = _checked_recipe(recipe)
        self._weight_cache = WeightCache()

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, recipe: Recipe | None = None) -> Linear:
        """A new FP8 layer that shares the parameters and hooks of `linear`, and has its mode.

        Raises TypeError unless `linear` is a plain torch.nn.Linear: a subclass's own behavior would
        be lost. Raises TypeError for a recipe that is not a torchext.Recipe.
        """
        if type(linear) is not torch.nn.Linear:
            raise TypeError(
                "Linear.from_linear: linear must be a torch.nn.Linear (got "
                f"{type(linear).__module__}.{type(linear).__qualname__}); pass its weights to a "
                "new torchext.nn.Linear by load_state_dict"
            )
        new = torch.nn.Linear.__new__(torch.nn.Linear)
        # Copies the dictionaries that list parameters and hooks, and shares what they list.
        new.__dict__ = {
            name: copy.copy(value) if isinstance(value, dict) else value
            for name, value in linear.__dict__.items()
        }
        return cls.convert_(new, recipe)

    @classmethod
    def convert_(cls, linear: torch.nn.Linear, recipe: Recipe | None = None) -> Linear:
        """Turns a plain torch.nn.Linear into an FP8 layer in place, and returns it.

        It stays the same object, so references to it (in hooks, other modules, optimizers) stay
        valid. Raises TypeError for a recipe that is not a torchext.Recipe.
        """
        recipe = _checked_recipe(recipe)
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.recipe = recipe
        linear._weight_cache = WeightCache()
        return linear

    def revert_(self) -> torch.nn.Linear:
        """Undoes `convert_`: turns this layer into a torch.nn.Linear in place, and returns it.

        It stays the same object with the same parameters, hooks and mode.

        Raises TypeError for a subclass of torchext.nn.Linear, which a parametrized layer is, too.
        """
        if type(self) is not Linear:
            raise TypeError(
                "Linear.revert_: the layer must be a torchext.nn.Linear (got its subclass "
                f"{type(self).__name__}, whose own behavior would be lost); first remove its "
                "parametrizations, or replace the layer"
            )
        for name in Linear.__annotations__:  # the attributes that this class adds
            self.__dict__.pop(name, None)
        self.__class__ = torch.nn.Linear  # type: ignore[assignment]
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Returns input @ weight.T + bias, [..., out_features].

        The output has the input's dtype or, under torch.autocast, autocast's.

        Args:
            input: [..., in_features], FP32, BF16 or FP16, of any strides, on the device of the
                parameters; or a jagged nested tensor. Its dtype may differ from the parameters'.

        Raises:
            RuntimeError: a shape or device does not fit.
            TypeError: input or a parameter has another dtype.
        """
        parameters: dict[str, Any] = self._parameters
        try:  # Module.__getattr__ is a Python function and takes longer than all checks below
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:  # parametrized, or replaced by a hook
            weight, bias = self.weight, self.bias
        compiling = torch.compiler.is_compiling()
        rewrap = None
        if (
            type(input) is not Tensor
            or input.is_nested
            or type(weight) is not Parameter
            or (is_composed_in_graph() if compiling else is_composed())
        ):
            nested = None if isinstance(input, Proxy) else rows_of_nested(input)
            if nested is not None:
                input, rewrap = nested
            y = composed(self, input, weight, bias)
            if y is not None:
                return y if rewrap is None else rewrap(y)
        # Eagerly, the GEMM checks the bias. A compiled graph would do so only when it runs.
        if not fit(input, weight, bias) or (compiling and not bias_fits(weight, bias)):
            raise misfit(input, weight, bias)
        opened = None
        if not compiling and profiler._is_profiler_enabled:
            opened = open_range("forward", self.recipe)
        try:
            quantized_weight = None if compiling else self._quantized_weight(weight, input)
            out_dtype = output_dtype(input)
            if _needs_graph(input, weight, bias):
                inputs: tuple[Any, ...] = (input, weight, bias, self.recipe, out_dtype)
                inputs += (quantized_weight, self._keeps_input)
                y = LinearFunction.apply(*inputs) if compiling else apply_eagerly(*inputs)
            else:
                y = linear(
                    input,
                    weight,
                    bias,
                    recipe=self.recipe,
                    out_dtype=out_dtype,
                    quantized_weight=quantized_weight,
                )[0]
        except RuntimeError as error:
            raise layer_error(error, input, weight, bias) from None
        finally:
            if opened is not None:
                opened.__exit__(None, None, None)
        return y if rewrap is None else rewrap(y)

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by torch.jit.script for a module that it can compile in place of this one."""
        raise NotImplementedError(
            "torchext.nn.Linear: a module for torch.jit.script must be written in TorchScript (got "
            "an FP8 layer); use torch.jit.trace, whose result can be trained and saved, or "
            "torch.export"
        )

    def refresh_weight(self) -> None:
        """Drops the FP8 weight and frees its memory; the next forward quantizes the parameter.

        Required within `torchext.fixed_weights` after a write that PyTorch does not record.
        """
        self._weight_cache.clear()

    def _quantized_weight(self, weight: Tensor, input: Tensor) -> Operand | None:
        """The FP8 weight from the cache, or newly quantized; None if it may not be cached, or if no
        GEMM needs it."""
        recipe = self.recipe
        # Re-entrant checkpointing runs forward without gradients first, and later with them.
        transposed = recipe.dgrad == "fp8" and (
            input.requires_grad if torch.is_grad_enabled() else self.training
        )
        if not transposed and recipe.fprop != "fp8":
            return None
        return self._weight_cache.operand(weight, recipe, transposed=transposed)

    def train(self, mode: bool = True) -> Linear:
        if mode != self.training and not self._weight_cache.fixed:
            self.refresh_weight()  # evaluation needs only half of the bytes that training keeps
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        self.refresh_weight()  # the parameter will be replaced
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fp8={self.recipe}"


def _checked_recipe(recipe: Recipe | None) -> Recipe:
    if recipe is None:
        return Recipe.deepseek_v3()
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"torchext.nn.Linear: recipe must be a torchext.Recipe (got {recipe!r}); pass, for "
            "example, Recipe.deepseek_v3()"
        )
    return recipe


def _needs_graph(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        weight.requires_grad or input.requires_grad or (bias is not None and bias.requires_grad)
    )


def output_dtype(input: Tensor) -> torch.dtype:
    device = "cuda" if input.is_cuda else "cpu" if input.is_cpu else None
    if device is not None and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return input.dtype
