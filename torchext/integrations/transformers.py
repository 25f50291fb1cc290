"""Runs the FP8 models of Hugging Face transformers on torchext's kernels, on CPUs and GPUs.

    import torchext.integrations.transformers as torchext_transformers

    with torchext_transformers.enable():
        model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B-FP8")
        model.generate(...)

`enable()` without `with` lasts until `disable()` is called on what it returns.

While it is enabled, models with a FineGrainedFP8Config (`quant_method: fp8` in config.json) stay in
FP8 on every device that torchext runs on, also on CPUs, where transformers itself would dequantize
them. Their layers keep transformers' classes, tensors and names, so `save_pretrained` writes the
same bits. Linear layers and experts, in every `experts_implementation`, multiply on torchext's
kernels, and have gradients for their inputs (LoRA). A model must run while it is enabled. Weights
that are quantized on the fly have the bits of torchext's quantizers; blocks need not divide a
weight's sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._dispatch.layout import GROUP, pitched
from .._dispatch.scales import float32_scale
from ..nn.fp8_linear import Mode, check_mode
from ..ops import fp8_linear as multiply_wide
from ..ops import quantize_128x128
from ..ops.experts_weights_only import fp8_linear_by_expert
from ..ops.frozen import frozen_product
from . import _transformers_names

_NAME = "torchext.integrations.transformers"
_MISSING = object()


def enable(mode: Mode = "w8a8") -> Enabled:
    """Makes transformers run FP8 models on torchext's kernels.

    Args:
        mode: "w8a8" quantizes the inputs of linear layers and experts, as transformers does;
            "w8a16" multiplies inputs as they are.

    Returns:
        A context manager whose end undoes it, as its `disable()` does. Undo nested ones from the
        last to the first.

    Raises:
        ImportError: transformers is missing, or this release has other private names.
        ValueError: mode is another string.
    """
    check_mode(f"{_NAME}.enable", mode)
    return Enabled(_transformers_names.find(), mode)


class Enabled:
    """What `enable` replaced in transformers, until `disable()` or the end of a `with` block."""

    def __init__(self, names: _transformers_names.Names, mode: Mode) -> None:
        fp8 = names.fp8
        functions = fp8.ALL_FP8_EXPERTS_FUNCTIONS
        grouped = fp8.fp8_grouped_mm_experts_forward
        original_quantize = fp8.Fp8Quantize._quantize_one

        @functools.wraps(fp8.fp8_linear)  # a nested `enable` looks at the signature
        def linear(*args: Any, **kwargs: Any) -> Tensor:
            return _linear(mode, *args, **kwargs)

        def grouped_matmul(*args: Any, **kwargs: Any) -> Tensor:
            return _grouped_matmul(mode, *args, **kwargs)

        def batched_matmul(*args: Any, **kwargs: Any) -> Tensor:
            return _batched_matmul(mode, *args, **kwargs)

        def quantize_one(self: Any, key: str, value: Tensor) -> dict[str, Tensor]:
            return _quantize_one(original_quantize, self, key, value)

        kernels = fp8.FineGrainedFP8(
            matmul=_matmul, batched_matmul=batched_matmul, grouped_matmul=grouped_matmul
        )
        self._undo: list[tuple[Any, str, Any]] = []
        self._undo_functions: list[tuple[str, Any]] = []
        self._functions = functions
        self._replace(fp8, "_FINEGRAINED_FP8", kernels)
        self._replace(fp8, "fp8_linear", linear)
        self._replace(fp8, "_apply_if_grad", _apply_directly)
        self._replace(fp8.Fp8Quantize, "_quantize_one", quantize_one)
        self._replace(names.quantizer, "validate_environment", _accept_every_device)
        for name in ("deepgemm", "deepgemm_megamoe"):
            if name in functions:
                before = functions[name] if name in functions._local_mapping else _MISSING
                self._undo_functions.append((name, before))
                functions[name] = grouped

    def disable(self) -> None:
        """Gives transformers its own functions back. A second call does nothing."""
        while self._undo:
            owner, name, value = self._undo.pop()
            setattr(owner, name, value)
        while self._undo_functions:
            name, value = self._undo_functions.pop()
            if value is _MISSING:
                del self._functions[name]
            else:
                self._functions[name] = value

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)


# ---- what replaces transformers' functions; arguments have its names and order ----


class _Halves:
    """Gate and up of fewer than 128 rows each, in one weight with a row of scales for each."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.pairs = list(zip(weight.chunk(2, dim=-2), scale.chunk(2, dim=-2), strict=True))

    @staticmethod
    def fits(weight: Tensor, scale: Tensor) -> bool:
        return weight.shape[-2] <= GROUP and scale.dim() > 1 and scale.shape[-2] == 2

    def product(self, x: Tensor, **options: Any) -> Tensor:
        parts = [frozen_product(x, pitched(w), scale, **options) for w, scale in self.pairs]
        return torch.cat(parts, -1)


def _linear(
    mode: Mode,
    input: Tensor,
    weight: Tensor,
    weight_scale_inv: Tensor,
    block_size: Sequence[int] | None = None,
    bias: Tensor | None = None,
    activation_scale: Tensor | None = None,
    allow_deepgemm: bool = True,
) -> Tensor:
    scale = _checked_scale(weight, weight_scale_inv, block_size)
    x_scale = None if activation_scale is None else activation_scale.float()
    options: dict[str, Any] = {"out_dtype": input.dtype, "x_scale": x_scale}
    if bias is None and _Halves.fits(weight, scale):
        return _Halves(weight, scale).product(input, **options)
    if mode == "w8a16" and x_scale is None:
        return multiply_wide(input, weight, scale, bias)
    return frozen_product(input, weight, scale, bias, **options)


def _matmul(
    A: Tensor,
    B: Tensor,
    Bs: Tensor,
    block_size: Sequence[int] | None,
    output_dtype: torch.dtype | None = None,
    activation_scale: Tensor | None = None,
) -> Tensor:
    y = _linear("w8a8", A, B, Bs, block_size, None, activation_scale)
    return y if output_dtype is None else y.to(output_dtype)


def _grouped_matmul(
    mode: Mode,
    A: Tensor,
    B: Tensor,
    Bs: Tensor,
    offsets: Tensor,
    tokens_per_expert: Tensor | None = None,
    block_size: Sequence[int] | None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    scale = _checked_scale(B, Bs, block_size)
    options: dict[str, Any] = {"out_dtype": output_dtype or A.dtype, "offsets": offsets.int()}
    if _Halves.fits(B, scale):
        return _Halves(B, scale).product(A, **options)
    if mode == "w8a16":
        y = fp8_linear_by_expert(A, B, scale, options["offsets"])
        return y.to(options["out_dtype"])
    return frozen_product(A, B, scale, **options)


def _batched_matmul(
    mode: Mode,
    A: Tensor,
    B: Tensor,
    Bs: Tensor,
    expert_ids: Tensor,
    block_size: Sequence[int] | None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Row by row; a row whose id is no expert's gives zeros."""
    ids, order = expert_ids.sort(stable=True)
    experts = torch.arange(B.shape[0], dtype=ids.dtype, device=ids.device)
    ends = torch.searchsorted(ids, experts, right=True, out_int32=True)
    y = _grouped_matmul(mode, A[order], B, Bs, ends, None, block_size, output_dtype)
    return y[order.argsort()]


def _apply_directly(function: Any, direct: Any, input: Tensor, *args: Any) -> Tensor:
    """Without transformers' autograd functions: torchext's products have gradients themselves."""
    result: Tensor = direct(input, *args)
    return result


def _accept_every_device(self: Any, *args: Any, **kwargs: Any) -> None:
    """In place of checks for a GPU of compute capability 8.9, without which models dequantize."""


def _quantize_one(original: Any, quantizer: Any, key: str, value: Tensor) -> dict[str, Tensor]:
    config = quantizer.hf_quantizer.quantization_config
    if value.ndim < 2 or tuple(config.weight_block_size or ()) != (GROUP, GROUP):
        result: dict[str, Tensor] = original(quantizer, key, value)
        return result
    ue8m0 = config.scale_fmt == "ue8m0"
    # Gate and up are rows of one parameter. transformers gives each at least one row of scales.
    halves = key.endswith("gate_up_proj") and value.shape[-2] <= GROUP
    parts = value.chunk(2, dim=-2) if halves else (value,)
    pairs = [quantize_128x128(part, pow2_scale=ue8m0) for part in parts]
    data = torch.cat([data.view(torch.uint8) for data, _ in pairs], -2).view(pairs[0][0].dtype)
    scale = torch.cat([scale for _, scale in pairs], -2)
    weight = key.endswith(".weight")
    scale_key = f"{key.removesuffix('.weight')}.weight_scale_inv" if weight else f"{key}_scale_inv"
    return {key: data.contiguous(), scale_key: scale.to(torch.float8_e8m0fnu) if ue8m0 else scale}


def _checked_scale(weight: Tensor, scale: Tensor, block_size: Sequence[int] | None) -> Tensor:
    """The scales in FP32, in a shape that torchext's products take."""
    if weight.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise NotImplementedError(
            f"{_NAME}: weight must be torch.float8_e4m3fn or torch.float8_e5m2 (got "
            f"{weight.dtype}, such as FP4 in int8); disable torchext for this model"
        )
    rows, columns = weight.shape[-2:]
    if block_size is not None and tuple(block_size) not in ((GROUP, GROUP), (rows, columns)):
        raise NotImplementedError(
            f"{_NAME}: weight_block_size must be (128, 128) or None (got {tuple(block_size)}); "
            "disable torchext for this model"
        )
    scale = float32_scale(scale)
    if scale.numel() == 1:
        return scale.view((1,) * weight.dim())
    return scale
