"""Experts that hold 3-D weights in FP8, for inference; `quantize_for_inference` makes them, of
torchext.nn.MoEs and of what torchext/_experts.py recognizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dispatch.layout import pitched
from ..ops.experts_function import ExpertsFunction, forward_only
from ..ops.experts_rows import Pair
from ..ops.experts_weights_only import weights_only_experts
from ..ops.frozen import frozen_product
from ..ops.linear_function import Operand
from ..ops.mlp_function import MLP, activate
from ..ops.quantize import quantize_128x128
from ..recipe import Recipe
from .converted import Converted, Rerouted, made_class
from .experts import ExpertsRoles, Roles, SortedExpertsRoles, routed
from .fp8_linear import Mode
from .frozen_weights import FrozenWeights
from .linear import output_dtype
from .moe import MoE

_RECIPE = Recipe.deepseek_v3()


class _Frozen(FrozenWeights, Converted):
    """Base of the classes that modules get whose experts are in FP8 and do not train.

    The parameters keep their names and shapes, in e4m3. Beside each is `<name>_scale_inv`, FP32
    [E, ceil(rows / 128), ceil(columns / 128)], as in Hugging Face models. x and the choices'
    weights get gradients; backward keeps no copy of the weights.

    Attributes:
        fused_roles: what it computes.
        mode: "w8a8" multiplies in FP8 in grouped GEMMs. "w8a16" leaves x as it is, and calls
            `torchext.ops.fp8_linear` for each expert that has tokens; the host waits for a GPU to
            learn how many each has.
    """

    fused_roles: Roles
    mode: Mode

    def frozen_names(self) -> tuple[str, ...]:
        return self.fused_roles.parameters

    def holds_transposes(self) -> bool:
        return isinstance(self.fused_roles, ExpertsRoles) and self.fused_roles.transposed

    def dequantize_(self, dtype: torch.dtype | None = None) -> Any:
        """Gives the module its own class and wide weights back; `dtype` as in FP8Linear's."""
        self.dequantize_in_place(dtype)
        return self.revert_()

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return f"{text}{', ' if text else ''}mode={self.mode!r}"

    def _pairs(self) -> list[Pair]:
        """The FP8 data and the scales of (gate,) up and down, as products read them."""
        pairs = [self.frozen_pair(name) for name in self.frozen_names()]
        if self.holds_transposes():
            pairs = [(data.mT, scale.mT) for data, scale in pairs]
        return [(_as_read(data), scale) for data, scale in pairs]

    def _weights_only(
        self, x: Tensor, ids: Tensor, weights: Tensor | None, residual: Tensor | None = None
    ) -> Tensor:
        roles = self.fused_roles
        return weights_only_experts(
            x.to(output_dtype(x)),
            ids,
            weights,
            self._pairs(),
            activation=roles.activation,
            tanh_approximation=roles.tanh_approximation,
            residual=residual,
        )


def _as_read(data: Tensor) -> Tensor:
    """`data` [E, N, K], or a copy if products could not read its rows.

    A GPU reads them at multiples of 16 bytes. Transposes that `load_state_dict(assign=True)` put
    in place are contiguous the other way.
    """
    return pitched(data) if data.shape[-1] % 16 or data.stride(-1) != 1 else data


class FrozenExperts(_Frozen, Rerouted):
    """Base of the classes that recognized experts get: as FP8Experts, with frozen weights."""

    added = ("fused_roles", "mode")

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        names = self.fused_roles.arguments
        given = dict(zip(names, args, strict=False)) | kwargs
        if len(args) + len(kwargs) != len(names) or given.keys() != set(names):
            raise TypeError(
                f"{type(self).__name__}: arguments must be {', '.join(names)} (got {len(args)} by "
                f"position and {', '.join(kwargs) or 'none'} by name); experts quantized for "
                "inference take no others"
            )
        x, *rest = (given[name] for name in names)
        if not rest:
            x = x.reshape(-1, x.shape[-1])
        pairs = self._pairs()
        ids, weights = routed([x, *rest], pairs[0][0].shape[0])
        if self.mode == "w8a16":
            return self._weights_only(x, ids, weights).to(x.dtype)
        if isinstance(self.fused_roles, SortedExpertsRoles):
            return self._gate_and_up_apart(x, ids, pairs)
        return self._in_fp8(x, ids, weights, pairs)

    def _in_fp8(self, x: Tensor, ids: Tensor, weights: Tensor | None, pairs: list[Pair]) -> Tensor:
        roles = self.fused_roles
        operands = [Operand(data, scale, None, None) for data, scale in pairs]
        config = MLP(roles.activation, roles.tanh_approximation, _RECIPE, output_dtype(x), "fp8")
        inputs = (x,) if weights is None else (x, weights)
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            matrices = [data for data, _ in pairs]
            return ExpertsFunction.apply(x, ids, weights, config, operands, *matrices, None)
        return forward_only(config, operands, x, ids, weights)

    def _gate_and_up_apart(self, x: Tensor, ends: Tensor, pairs: list[Pair]) -> Tensor:
        """Sorted experts: three grouped products, with PyTorch's activation between them. Side by
        side, as the fused activation reads gate and up, they would be a copy of the weights."""
        options: dict[str, Any] = {"out_dtype": output_dtype(x), "offsets": ends}
        *before, down = pairs
        wides = [frozen_product(x, *pair, **options) for pair in before]
        h = activate(self.fused_roles.activation, self.fused_roles.tanh_approximation, wides)
        return frozen_product(h, *down, **options).to(x.dtype)


class FrozenMoE(_Frozen):
    """Base of the classes that torchext.nn.MoEs get: the same layer with frozen weights.

    In mode "w8a8" the experts' results have the bits that the layer has in training: there it
    quantizes its weights likewise, for a recipe with the same `pow2_scale`.
    """

    added = ("mode",)

    @classmethod
    def class_for(cls, plain: type) -> type:
        base: Any = cls
        return made_class(base, plain, prefix="")

    def reset_parameters(self) -> None:
        """Draws the experts' weights as torchext.nn.MoE does, and quantizes them."""
        for name in self.frozen_names():
            data, scale = self.frozen_pair(name)
            bound = data.shape[-1] ** -0.5 if data.shape[-1] > 0 else 0.0
            for expert in range(data.shape[0]):
                wide = torch.empty(data.shape[1:], device=data.device).uniform_(-bound, bound)
                for parameter, value in zip((data, scale), quantize_128x128(wide), strict=True):
                    parameter.data[expert].copy_(value)

    def _experts(self, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor | None) -> Tensor:
        if self.mode == "w8a16":
            return self._weights_only(x, ids, weights, residual)
        y: Tensor = super()._experts(x, ids, weights, residual)  # type: ignore[misc]
        return y

    def _operands(self, for_x: bool, for_dh: bool) -> list[Operand]:
        return [Operand(data, scale, None, None) for data, scale in self._pairs()]

    def _wide_parameters(self) -> list[tuple[str, Tensor]]:
        return []


def quantize_experts_(module: Any, roles: Roles, mode: Mode, *, pow2_scale: bool) -> _Frozen:
    """Quantizes a module that find_experts found, in place."""
    base = FrozenMoE if isinstance(module, MoE) else FrozenExperts
    module.__class__ = base.class_for(type(module))
    module.fused_roles = roles
    module.mode = mode
    module.quantize_in_place(pow2_scale=pow2_scale)
    frozen: _Frozen = module
    return frozen
