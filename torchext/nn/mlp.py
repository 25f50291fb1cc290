"""The feed-forward layers of transformers, with FP8 everywhere between their GEMMs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.nn.modules import module as torch_module

from ..ops.gathered_weight import is_weight
from ..ops.linear_function import Operand, quantize_weight
from ..ops.linear_operands import bias_fits, fit
from ..ops.mlp_function import MLP, MLPFunction, Save, mlp, quantized_input
from ..recipe import Recipe
from .composition import is_composed, is_composed_in_graph
from .converted import TransposedLinear
from .linear import Linear, output_dtype

_GROUP = 128


class _MLP(torch.nn.Module):
    """down_proj(activation(up_proj(x))), or of gate_proj(x) and up_proj(x).

    Subclasses set `activation` and `tanh_approximation`, as in MLP, and `_activate`.
    """

    activation: str
    tanh_approximation: bool | None = None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Recipe | None = None,
        save: Save = "fp8",
    ) -> None:
        """Allocates and initializes the projections, as torchext.nn.Linear does.

        Args:
            hidden_size: size K of the last dimension of input and output.
            intermediate_size: number of activated features, I.
            bias: whether the projections have biases.
            device, dtype: of the parameters, as for torchext.nn.Linear.
            recipe: of the projections; Recipe.deepseek_v3() if None.
            save: what backward gets of the activation's operands: "bf16", as they were computed;
                "fp8", quantized with 1x128 scales, half of the bytes; "recompute", nothing: it
                repeats the GEMMs before the activation.

        Raises:
            ValueError: `save` is another string.
            TypeError, RuntimeError: as for torchext.nn.Linear.
        """
        super().__init__()
        check_save(f"torchext.nn.{type(self).__name__}", save)
        self.save = save
        options: dict[str, Any] = {"device": device, "dtype": dtype, "recipe": recipe}
        if self._is_gated:
            self.gate_proj = Linear(hidden_size, intermediate_size, bias, **options)
        self.up_proj = Linear(hidden_size, intermediate_size, bias, **options)
        self.down_proj = Linear(intermediate_size, hidden_size, bias, **options)
        self.register_load_state_dict_pre_hook(_split_gate_up)

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output, [..., hidden_size].

        The three steps run fused if the projections are torchext.nn.Linears without hooks, with one
        blockwise recipe whose GEMMs are all FP8, and I is a multiple of 128 if there is a gate.
        Otherwise, and under torch.export, other tracers and transforms, they run one after another,
        with PyTorch's activation in between, which rounds its operands and its result to the
        output's dtype.

        Args:
            input: [..., hidden_size], as for torchext.nn.Linear.

        Raises:
            RuntimeError, TypeError: as torchext.nn.Linear's forward.
        """
        y = fused_mlp(
            self._projections(), self.activation, self.tanh_approximation, self.save, input
        )
        return self.down_proj(self._activate(input)) if y is None else y

    def extra_repr(self) -> str:
        return f"save={self.save!r}"

    @property
    def _is_gated(self) -> bool:
        return self.activation.endswith("_mul")

    def _activate(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    def _projections(self) -> list[Any]:
        names = ("gate_proj", "up_proj", "down_proj")[0 if self._is_gated else 1 :]
        return [self._modules[name] for name in names]


def check_save(name: str, save: str) -> None:
    """Raises ValueError unless `save` is one of the layers' options."""
    if save not in get_args(Save):
        options = ", ".join(map(repr, get_args(Save)))
        raise ValueError(f"{name}: save must be one of {options} (got {save!r}); omit it for 'fp8'")


def fused_mlp(
    layers: Sequence[torch.nn.Module],
    activation: str,
    tanh_approximation: bool | None,
    save: Save,
    input: Tensor,
) -> Tensor | None:
    """The output of an MLP of these layers, (gate,) up and down; None if it cannot run fused.

    The other arguments are as for MLP and _MLP.forward.
    """
    if not _can_fuse(layers, activation, input):
        return None
    linears = cast("Sequence[Linear | TransposedLinear]", layers)
    recipe = linears[0].recipe
    config = MLP(activation, tanh_approximation, recipe, output_dtype(input), save)
    weights = [as_out_in(layer) for layer in linears]
    biases: list[Any] = [layer.bias for layer in linears]
    parameters = [p for pair in zip(weights, biases, strict=True) for p in pair]
    graph = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (input, *parameters)
    )
    # down's dgrad runs for any gradient before it, that of gate and up for x's alone. Re-entrant
    # checkpointing runs forward without gradients first, and later with them.
    for_x, for_wide = input.requires_grad, graph
    if not torch.is_grad_enabled():
        for_x = for_wide = linears[0].training
    operands: list[Operand | None] = [None] * len(linears)
    if not torch.compiler.is_compiling():
        operands = [
            _kept_operand(layer, transposed=for_wide if layer is linears[-1] else for_x)
            for layer in linears
        ]
    if graph:
        return cast("Tensor", MLPFunction.apply(input, config, operands, *parameters))
    quantized = [
        operand or quantize_weight(weight, recipe, transposed=False)
        for operand, weight in zip(operands, weights, strict=True)
    ]
    x = quantized_input(input, recipe, transposed=False)
    y, _ = mlp(config, quantized, biases, x)
    return y.view(*input.shape[:-1], y.shape[-1])


def _can_fuse(layers: Sequence[torch.nn.Module], activation: str, input: Tensor) -> bool:
    if torch.compiler.is_compiling():
        if is_composed_in_graph():
            return False
    elif is_composed() or torch._C._len_torch_function_stack():
        return False
    if type(input) is not Tensor or input.is_nested or _has_global_hooks():
        return False
    recipe = getattr(layers[0], "recipe", None)
    if recipe is None or not can_fuse_recipe(recipe):
        return False
    if not all(_is_plain(layer, recipe) for layer in layers):
        return False
    pairs: list[tuple[Tensor, Any]] = [(as_out_in(layer), layer.bias) for layer in layers]
    *before, (down, _) = pairs
    width = down.shape[1]
    return (
        input.numel() > 0
        and input.device == down.device
        and (width % _GROUP == 0 or not activation.endswith("_mul"))
        and all(fit(input, weight, bias) for weight, bias in before)
        and all(weight.shape[0] == width for weight, _ in before)
        and all(
            bias_fits(weight, bias) and (bias is None or bias.is_contiguous())
            for weight, bias in pairs
        )
    )


def as_out_in(layer: Any) -> Tensor:
    """The layer's weight as [out_features, in_features]."""
    weight: Tensor = layer.weight
    return weight.t() if isinstance(layer, TransposedLinear) else weight


def _kept_operand(layer: Linear | TransposedLinear, *, transposed: bool) -> Operand | None:
    if isinstance(layer, TransposedLinear):
        return layer.kept_operand(cast("Tensor", layer.weight))
    return layer._weight_cache.operand(layer.weight, layer.recipe, transposed=transposed)


def can_fuse_recipe(recipe: Recipe) -> bool:
    """Whether an MLP of layers with this recipe can run fused: the kernels make 1x128 groups."""
    return recipe.granularity == "blockwise" and not recipe.wide_gemms


def can_fuse_class(layer: Any) -> bool:
    """Whether the class of the layer is one whose forward the fused MLP may replace."""
    if isinstance(layer, TransposedLinear):
        return type(layer).forward is TransposedLinear.forward
    return type(layer) is Linear


def _is_plain(layer: Any, recipe: Recipe) -> bool:
    """Whether a call of the layer does nothing but its products, by this recipe."""
    return (
        can_fuse_class(layer)
        and layer.recipe == recipe
        and is_weight(layer.weight)
        and (layer.bias is None or type(layer.bias) is Parameter)
        and "forward" not in vars(layer)
        and not has_hooks(layer)
    )


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of the module, whose forward a fused MLP replaces, calls hooks of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _has_global_hooks() -> bool:
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _split_gate_up(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Loads `gate_up_proj`, the rows of the gate and then those of up, if it is there."""
    if not module._is_gated:
        return
    for name in ("weight", "bias"):
        both = state_dict.pop(f"{prefix}gate_up_proj.{name}", None)
        if both is not None:
            gate, up = both.chunk(2)
            state_dict[f"{prefix}gate_proj.{name}"] = gate
            state_dict[f"{prefix}up_proj.{name}"] = up


class SwiGLU(_MLP):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), as in Llama, Mistral, Qwen and DeepSeek.

    Parameters are those of three linear layers without biases: `gate_proj.weight` and
    `up_proj.weight`, [intermediate_size, hidden_size], and `down_proj.weight`, [hidden_size,
    intermediate_size]. A state_dict may hold `gate_up_proj.weight` in place of the first two.
    """

    activation = "silu_mul"

    def _activate(self, input: Tensor) -> Tensor:
        return F.silu(self.gate_proj(input)) * self.up_proj(input)


class GEGLU(_MLP):
    """down_proj(gelu(gate_proj(x)) * up_proj(x)), as in Gemma, which approximates GELU by tanh."""

    activation = "gelu_mul"

    def __init__(self, *args: Any, tanh_approximation: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        self.tanh_approximation = tanh_approximation

    def _activate(self, input: Tensor) -> Tensor:
        return _gelu(self.gate_proj(input), self.tanh_approximation) * self.up_proj(input)


class GELUMLP(_MLP):
    """down_proj(gelu(up_proj(x))), as in GPT-2, BERT and ViT."""

    activation = "gelu"

    def __init__(self, *args: Any, tanh_approximation: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.tanh_approximation = tanh_approximation

    def _activate(self, input: Tensor) -> Tensor:
        return _gelu(self.up_proj(input), self.tanh_approximation)


class ReLU2MLP(_MLP):
    """down_proj(relu(up_proj(x)) ** 2), as in Nemotron."""

    activation = "relu2"

    def _activate(self, input: Tensor) -> Tensor:
        return F.relu(self.up_proj(input)).square()


def _gelu(x: Tensor, tanh_approximation: bool | None) -> Tensor:
    return F.gelu(x, approximate="tanh" if tanh_approximation else "none")
