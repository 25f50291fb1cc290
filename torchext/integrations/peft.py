"""LoRA of Hugging Face peft over layers with FP8 weights: torchext.nn.FP8Linear, and the layers of
transformers' FP8 models, which torchext.integrations.transformers runs.

    torchext.quantize_for_inference(model)
    config = torchext_peft.over_fp8(LoraConfig(target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(model, config)
    ...                                  # train as usual
    model = model.merge_and_unload()     # FP8 weights again

Adapters train without a wide copy of the weights, forward and backward. peft itself wraps an
FP8Linear as it wraps any torch.nn.Linear, but its merge would add to FP8 data; the layers made here
dequantize, add and quantize again, and `unmerge` gives the old bits back.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge

from ..nn.fp8_linear import FP8Linear, MergeError, merged
from . import _transformers_names

TESTED = "0.21.2"
_NAME = "torchext.integrations.peft"


class LoraFP8Linear(LoraLinear):
    """peft's LoRA layer over a layer with FP8 `weight` and `weight_scale_inv`.

    Attributes:
        merge_errors: {adapter: the error that merging it added}, of the adapters that are merged.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.merge_errors: dict[str, MergeError] = {}
        self._unmerged: tuple[torch.Tensor, ...] | None = None  # FP8 data and scales before

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters to the FP8 weight; keeps the old one until `unmerge`.

        Raises:
            NotImplementedError: an adapter is a variant of LoRA (DoRA, ...), or has a bias.
            ValueError: safe_merge is true and an adapter has a NaN or Inf.
        """
        base: Any = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names) or ():
            if name not in self.lora_A:
                continue
            if name in self.lora_variant or self.lora_bias[name]:
                raise NotImplementedError(
                    f"{_NAME}: adapter must be plain LoRA without a bias to merge into FP8 (got "
                    f"{name!r}); dequantize_() the layer first"
                )
            delta = self.get_delta_weight(name)
            if safe_merge and not delta.isfinite().all():
                raise ValueError(
                    f"{_NAME}: adapter must have finite values (got a NaN or Inf in {name!r}); do "
                    "not merge it"
                )
            if self._unmerged is None:
                self._unmerged = base.weight.clone(), base.weight_scale_inv.clone()
            with torch.no_grad():
                *pair, self.merge_errors[name] = merged(base.weight, base.weight_scale_inv, delta)
                self._set(*pair)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Gives the weight the bits that it had before the first merge."""
        if self._unmerged is not None:
            self._set(*self._unmerged)
        self._unmerged = None
        self.merge_errors.clear()
        self.merged_adapters.clear()

    def _set(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        base: Any = self.get_base_layer()
        base.weight.data, base.weight_scale_inv.data = data, scale


def over_fp8(config: LoraConfig) -> LoraConfig:
    """Makes `config` wrap layers with FP8 weights in layers that merge into them; returns it.

    Call it after transformers has loaded an FP8 model, if there is one.

    Raises:
        ImportError: this release of peft has no LoraConfig._register_custom_module.
    """
    if not hasattr(config, "_register_custom_module"):
        import peft

        raise ImportError(
            f"{_NAME}: peft must have LoraConfig._register_custom_module (got {peft.__version__}); "
            f"install peft=={TESTED}"
        )
    classes: dict[Any, Any] = {FP8Linear: LoraFP8Linear}
    if "transformers.integrations.finegrained_fp8" in sys.modules:
        names = _transformers_names.find()
        classes[names.fp8.FP8Linear] = LoraFP8Linear
    config._register_custom_module(classes)
    return config
