"""What modules have in common that hold weights in FP8 for inference, with `<name>_scale_inv`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .._dispatch.scales import float32_scale
from ..ops.quantize import dequantize, quantize_128x128

E4M3 = torch.float8_e4m3fn
_SUFFIX = "_scale_inv"


class FrozenWeights(torch.nn.Module):
    """Base of these modules: casts leave FP8 weights and scales alone, and loading checks them.

    The weights and their scales are parameters without gradients.

    Attributes:
        wide_dtype: the dtype that the weights had before they were quantized.
    """

    wide_dtype: torch.dtype

    def frozen_names(self) -> tuple[str, ...]:
        """The names of the weights."""
        raise NotImplementedError

    def holds_transposes(self) -> bool:
        """Whether the weights are the transposes [E, K, N] of what products read. In memory the
        rows of what products read are contiguous all the same, so that nothing copies them."""
        return False

    def hold(self, name: str, data: Tensor, scale: Tensor) -> None:
        """Makes parameters of an FP8 weight and its scales."""
        self._parameters[name] = Parameter(data, requires_grad=False)
        self._parameters[name + _SUFFIX] = Parameter(scale, requires_grad=False)

    @torch.no_grad()
    def quantize_in_place(self, *, pow2_scale: bool) -> None:
        """Replaces the wide weights by FP8 ones with a scale for each 128x128 block."""
        for name in self.frozen_names():
            wide = self._parameters[name]
            assert wide is not None
            self.wide_dtype = wide.dtype
            if self.holds_transposes():
                data, scale = quantize_128x128(wide.mT, pow2_scale=pow2_scale)
                self.hold(name, data.contiguous().mT, scale.mT.contiguous())
            else:
                data, scale = quantize_128x128(wide, pow2_scale=pow2_scale)
                self.hold(name, data.contiguous(), scale)

    @torch.no_grad()
    def dequantize_in_place(self, dtype: torch.dtype | None) -> None:
        """Replaces the FP8 weights by wide parameters, which require a gradient."""
        for name in self.frozen_names():
            data, scale = self._parameters[name], self._parameters.pop(name + _SUFFIX)
            assert data is not None
            assert scale is not None
            wide = data.new_empty(data.shape, dtype=dtype or self.wide_dtype)
            if data.dim() == 2:
                wide = dequantize(data, scale, out_dtype=wide.dtype)
            else:  # a block does not cross experts
                for target, *pair in zip(wide, data, scale, strict=True):
                    target.copy_(dequantize(*pair, out_dtype=wide.dtype))
            self._parameters[name] = Parameter(wide)
        del self.wide_dtype

    def frozen_pair(self, name: str) -> tuple[Tensor, Tensor]:
        """An FP8 weight and its scales, checked.

        Raises:
            TypeError: something cast them.
            RuntimeError: the weight requires a gradient.
        """
        data, scale = getattr(self, name), getattr(self, name + _SUFFIX)
        if data.dtype is not E4M3 or scale.dtype is not torch.float32:
            raise TypeError(
                f"torchext: {name} must be torch.float8_e4m3fn with torch.float32 scales (got "
                f"{data.dtype} and {scale.dtype}); do not cast the parameter itself, as "
                "MixedPrecisionPolicy(param_dtype=...) does: .to(dtype) of the module leaves it "
                "alone"
            )
        if data.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"torchext: {name} must not require a gradient (got requires_grad=True): FP8 "
                "weights do not train; call requires_grad_(False) on it and train an adapter, or "
                "dequantize the module"
            )
        return data, scale

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    # torch can save FP8 tensors, but not read what plain pickle writes of them.
    def __getstate__(self) -> dict[str, Any]:
        parameters = {
            name: p.data.view(torch.uint8) if type(p) is Parameter and p.dtype is E4M3 else p
            for name, p in self._parameters.items()
        }
        return {**self.__dict__, "_parameters": parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parameters = {
            name: p
            if p is None or p.dtype is not torch.uint8
            else Parameter(p.view(E4M3), requires_grad=False)
            for name, p in state["_parameters"].items()
        }
        super().__setstate__({**state, "_parameters": parameters})

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        names = self.frozen_names()
        kept = [self._parameters[n] for name in names for n in (name, name + _SUFFIX)]

        def without_casts(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype != tensor.dtype and any(tensor is t for t in kept):
                return tensor.to(result.device)
            return result

        return super()._apply(without_casts, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        error_msgs: list[str] = rest[-1]
        # Without these checks a wide weight, or one without its scales, would load silently.
        for name in self.frozen_names():
            key = prefix + name
            data, scale = state_dict.get(key), state_dict.get(key + _SUFFIX)
            if data is not None and data.dtype is not E4M3:
                error_msgs.append(
                    f"{key} must be torch.float8_e4m3fn (got {data.dtype}); load it before "
                    "torchext.quantize_for_inference quantizes the model"
                )
                return
            if data is not None and scale is None:
                error_msgs.append(
                    f"{key}{_SUFFIX} must come with {key} (got an FP8 weight without scales); load "
                    "both from the same checkpoint"
                )
                return
            if scale is not None:
                shape = getattr(self, name + _SUFFIX).shape
                scale = float32_scale(scale)
                one = scale.numel() == 1 and shape.numel() == 1
                state_dict[key + _SUFFIX] = scale.view(shape) if one else scale
        super()._load_from_state_dict(state_dict, prefix, *rest)
