"""Experts that hold two 3-D weights in FP8, for inference; `quantize_for_inference` makes them.

torchext/_experts.py tells which modules are such experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.experts_function import ExpertsFunction, forward_only
from ..ops.experts_weights_only import weights_only_experts
from ..ops.linear_function import Operand
from ..ops.mlp_function import MLP
from ..recipe import Recipe
from .converted import Rerouted
from .experts import ExpertsRoles
from .fp8_linear import Mode
from .frozen_weights import FrozenWeights
from .linear import output_dtype

_RECIPE = Recipe.deepseek_v3()


class FrozenExperts(FrozenWeights, Rerouted):
    """Base of the classes that experts get: as FP8Experts, with weights in FP8 that do not train.

    The parameters keep their names, `up` [E, W, K] and `down` [E, K, I] in e4m3. Beside each is
    `<name>_scale_inv`, FP32 [E, ceil(rows / 128), ceil(columns / 128)], as in Hugging Face models.
    x and the choices' weights get gradients; backward keeps no copy of the weights.

    Attributes:
        fused_roles: what it computes.
        mode: "w8a8" multiplies in FP8 in grouped GEMMs. "w8a16" leaves x as it is, and calls
            `torchext.ops.fp8_linear` for each expert that has tokens; the host waits for a GPU to
            learn how many each has.
    """

    fused_roles: ExpertsRoles
    mode: Mode
    added = ("fused_roles", "mode")

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        names = self.fused_roles.arguments
        given = dict(zip(names, args, strict=False)) | kwargs
        if len(args) + len(kwargs) != 3 or given.keys() != set(names):
            raise TypeError(
                f"{type(self).__name__}: arguments must be {', '.join(names)} (got "
                f"{len(args)} by position and {', '.join(kwargs) or 'none'} by name); experts "
                "quantized for inference take these three"
            )
        x, ids, weights = (given[name] for name in names)
        pairs = [self.frozen_pair(name) for name in self.frozen_names()]
        roles = self.fused_roles
        if self.mode == "w8a16":
            y = weights_only_experts(
                x.to(output_dtype(x)), ids, weights, pairs, activation=roles.activation,
                tanh_approximation=roles.tanh_approximation,
            )  # fmt: skip
            return y.to(x.dtype)
        operands = [Operand(data, scale, None, None) for data, scale in pairs]
        config = MLP(roles.activation, roles.tanh_approximation, _RECIPE, output_dtype(x), "fp8")
        if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
            matrices = [data for data, _ in pairs]
            return ExpertsFunction.apply(x, ids, weights, config, operands, *matrices, None)
        return forward_only(config, operands, x, ids, weights)

    def frozen_names(self) -> tuple[str, ...]:
        return self.fused_roles.parameters

    def dequantize_(self, dtype: torch.dtype | None = None) -> Any:
        """Gives the module its own class and wide weights back; `dtype` as in FP8Linear's."""
        self.dequantize_in_place(dtype)
        return self.revert_()

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return f"{text}{', ' if text else ''}mode={self.mode!r}"


def quantize_experts_(
    module: Any, roles: ExpertsRoles, mode: Mode, *, pow2_scale: bool
) -> FrozenExperts:
    """Quantizes a module that recognize_experts recognized, in place."""
    module.__class__ = FrozenExperts.class_for(type(module))
    module.fused_roles = roles
    module.mode = mode
    module.quantize_in_place(pow2_scale=pow2_scale)
    frozen: FrozenExperts = module
    return frozen
