"""SGLang's plug-in: linear layers of fine-grained FP8 models run on torchext's kernels.

    TORCHEXT_SGLANG=1 python -m sglang.launch_server --model-path Qwen/Qwen3-0.6B-FP8

SGLang calls `register` in each of its processes through the entry point group
`sglang.srt.plugins`. Without the environment variable TORCHEXT_SGLANG it does nothing. Its parts,
separated by commas:

    linear     FP8 layers with 128x128 blocks multiply in torchext, whatever --fp8-gemm-backend
               says; the same as "1"
    deep_gemm  SGLang's DeepGEMM kernels, those of experts too, run on torchext.compat.deep_gemm

Written against SGLang 0.5.23, whose interface the tests copy; no test runs SGLang itself, which
pins another torch. docs/serving.md has the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._dispatch.layout import GROUP
from .._dispatch.scales import float32_scale
from ._plugins import asked_for, block_product, find, stand_in_for_deep_gemm

VARIABLE = "TORCHEXT_SGLANG"
TESTED = "0.5.23"

# What SGLang takes from deep_gemm and the stand-in lacks. Models that need one of them end in an
# AttributeError or ImportError that names it.
MISSING = {
    "bf16_gemm_nt": "BF16 products with FP32 results, such as routers of DeepSeek-V3",
    "bf16_gemm_nn": "--enable-deterministic-inference in BF16",
    "m_grouped_bf16_gemm_nt_masked": "BF16 experts with DeepEP's low-latency dispatch",
    "fp8_mqa_logits": "sparse attention of DeepSeek-V3.2 and later",
    "fp8_paged_mqa_logits": "sparse attention of DeepSeek-V3.2 and later",
    "get_paged_mqa_logits_metadata": "sparse attention of DeepSeek-V3.2 and later",
    "fp8_fp4_mqa_logits": "attention of DeepSeek-V4",
    "fp8_fp4_paged_mqa_logits": "attention of DeepSeek-V4",
    "fp8_fp4_paged_sparse_mqa_logits": "attention of DeepSeek-V4 on Blackwell",
    "get_paged_sparse_mqa_logits_metadata": "attention of DeepSeek-V4 on Blackwell",
    "fp8_einsum": "MLA of DeepSeek-V4",
    "tf32_hc_prenorm_gemm": "hyperconnections of DeepSeek-V4",
    "mega_mhc": "hyperconnections of DeepSeek-V4",
    "bf16_mega_gate": "fused gates on Blackwell",
    "fp8_mega_moe": "fused experts (Mega MoE)",
    "set_pdl": "programmatic dependent launch; asked for with hasattr",
    "get_compile_mode": "compilation at run time; asked for with hasattr",
    "set_compile_mode": "compilation at run time; asked for with hasattr",
}
_DISPATCH = "sglang.srt.layers.quantization.fp8_utils.dispatch_w8a8_block_fp8_linear"
_BLOCK = (GROUP, GROUP)


def register() -> None:
    """Does what TORCHEXT_SGLANG asks for; SGLang calls it, and logs what it raises.

    Raises:
        ValueError: the variable has an unknown part.
        ImportError: this SGLang has another structure.
        RuntimeError: another deep_gemm was imported before.
    """
    parts = asked_for(VARIABLE)
    if "deep_gemm" in parts:
        stand_in_for_deep_gemm(MISSING)
    if "linear" in parts:
        hooks = "sglang.srt.plugins.hook_registry"
        registry, kinds = find("sglang", TESTED, (f"{hooks}.HookRegistry", f"{hooks}.HookType"))
        registry.register(_DISPATCH, dispatch, kinds.AROUND)


def dispatch(
    original: Callable[..., Any],
    weight_block_size: Sequence[int] | None = None,
    act_scale_ue8m0: bool = False,
    **others: Any,
) -> Any:
    """Chooses the function that multiplies in FP8 layers with blocks: `linear` if they are 128x128;
    for others, what SGLang's own function, `original`, chooses."""
    if weight_block_size is not None and tuple(weight_block_size) != _BLOCK:
        return original(weight_block_size, act_scale_ue8m0, **others)
    return functools.partial(linear, pow2_scale=act_scale_ue8m0)


def linear(
    input: Tensor,
    weight: Tensor,
    block_size: Sequence[int],
    weight_scale: Tensor,
    input_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    pow2_scale: bool = False,
    weight_bf16: Tensor | None = None,
) -> Tensor:
    """input @ dequantized weight.T (+ bias), as SGLang's linear layers call it.

    Args:
        input: [..., K], FP32, BF16 or FP16; or e4m3 with `input_scale`.
        weight: e4m3 [N, K]; on a GPU, K is a multiple of 16.
        block_size: (128, 128).
        weight_scale: FP32, BF16 or UE8M0 [ceil(N / 128), ceil(K / 128)].
        input_scale: FP32 [..., ceil(K / 128)], with any strides.
        bias: [N]; None for none.
        pow2_scale: round the scales of a wide input up to powers of two.
        weight_bf16: SGLang's copy of the weight for few rows; ignored.

    Returns:
        [..., N], in the input's dtype; in BF16 if the input is FP8.

    Raises:
        ValueError: block_size is not [128, 128].
        TypeError: input_scale has another dtype than FP32.
    """
    if tuple(block_size) != _BLOCK:
        raise ValueError(
            f"torchext.integrations.sglang: weight_block_size must be [128, 128] (got "
            f"{list(block_size)}); unset {VARIABLE} for this model"
        )
    rows = input.reshape(-1, input.shape[-1])
    scale = None if input_scale is None else input_scale.reshape(rows.shape[0], -1)
    out_dtype = torch.bfloat16 if input_scale is not None else input.dtype
    y = block_product(
        rows, scale, weight, float32_scale(weight_scale), bias,
        out_dtype=out_dtype, pow2_scale=pow2_scale,
    )  # fmt: skip
    return y.view(*input.shape[:-1], weight.shape[0])
