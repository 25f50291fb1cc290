"""vLLM's plug-in: linear layers of fine-grained FP8 models run on torchext's kernels.

    TORCHEXT_VLLM=1 vllm serve Qwen/Qwen3-0.6B-FP8

vLLM calls `register` in each of its processes through the entry point group
`vllm.general_plugins`. Without the environment variable TORCHEXT_VLLM it does nothing. Its parts,
separated by commas:

    linear     a kernel class for FP8 layers with 128x128 blocks, before all of vLLM's; the same
               as "1"
    deep_gemm  vLLM's DeepGEMM kernels, those of experts too, run on torchext.compat.deep_gemm

Written against vLLM 0.33.0, whose interface the tests copy; no test runs vLLM itself, which pins
another torch. docs/serving.md has the rest.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from .._architectures import path_of
from .._dispatch.layout import GROUP
from .._dispatch.scales import float32_scale
from ..availability import is_available
from ._plugins import asked_for, block_product, find, stand_in_for_deep_gemm

VARIABLE = "TORCHEXT_VLLM"
TESTED = "0.33.0"
KERNEL = "TorchextFp8BlockScaledMMKernel"

# What vLLM looks for in deep_gemm and the stand-in lacks. vLLM takes a missing name for a missing
# feature, and raises its own error where the feature is needed.
MISSING = {
    "fp8_einsum": "MLA of DeepSeek-V4",
    "fp8_fp4_mqa_logits": "sparse attention of DeepSeek-V3.2 and later",
    "fp8_fp4_paged_mqa_logits": "sparse attention of DeepSeek-V3.2 and later",
    "get_paged_mqa_logits_metadata": "sparse attention of DeepSeek-V3.2 and later",
    "fp8_fp4_sparse_mqa_logits": "sparse attention on Blackwell",
    "fp8_fp4_paged_sparse_mqa_logits": "sparse attention on Blackwell",
    "get_sparse_mqa_logits_metadata": "sparse attention on Blackwell",
    "get_paged_sparse_mqa_logits_metadata": "sparse attention on Blackwell",
    "tf32_hc_prenorm_gemm": "hyperconnections of DeepSeek-V4",
    "mega_mhc": "hyperconnections of DeepSeek-V4",
    "bf16_mega_gate": "fused gates on Blackwell",
    "set_pdl": "programmatic dependent launch, which torchext's kernels do not use",
}
_WIDE = (torch.bfloat16, torch.float16, torch.float32)
_LINEAR = "vllm.model_executor.kernels.linear"
_BASE = f"{_LINEAR}.scaled_mm.BlockScaledMMLinearKernel.Fp8BlockScaledMMLinearKernel"
_log = logging.getLogger("torchext")


def register() -> None:
    """Does what TORCHEXT_VLLM asks for; vLLM calls it. A second call changes nothing.

    Raises:
        ValueError: the variable has an unknown part.
        ImportError: this vLLM has another structure.
        RuntimeError: another deep_gemm was imported before.
    """
    parts = asked_for(VARIABLE)
    if "deep_gemm" in parts:
        stand_in_for_deep_gemm(MISSING)
    if "linear" in parts:
        _register_kernel()


def _register_kernel() -> None:
    base, register_linear_kernel, kernels, platforms, platform, replace_parameter = find(
        "vllm",
        TESTED,
        (
            _BASE,
            f"{_LINEAR}.register_linear_kernel",
            f"{_LINEAR}._POSSIBLE_FP8_BLOCK_KERNELS",
            "vllm.platforms.PlatformEnum",
            "vllm.platforms.current_platform",
            "vllm.model_executor.utils.replace_parameter",
        ),
    )
    for each in (platforms.CUDA, platforms.CPU):
        if any(kernel.__name__ == KERNEL for kernel in kernels.get(each, ())):
            continue
        register_linear_kernel(kernel_class(base, platform, replace_parameter), each, "fp8_block")
        # vLLM takes the first that can run, and appends new ones.
        kernels[each].insert(0, kernels[each].pop())
    _log.info("vLLM tries %s first for FP8 layers with 128x128 blocks", KERNEL)


def kernel_class(base: Any, platform: Any, replace_parameter: Any) -> type:
    """The kernel class.

    Args:
        base: vLLM's Fp8BlockScaledMMLinearKernel.
        platform: vLLM's current_platform.
        replace_parameter: vLLM's function of that name.
    """

    class TorchextFp8BlockScaledMMKernel(base):  # type: ignore[misc]
        """torchext's quantizer and GEMM for a layer with 1x128 by 128x128 scales."""

        apply_input_quant = False  # torchext's quantizer writes the layout that its GEMM reads

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            if compute_capability is not None and path_of(compute_capability) is None:
                return False, f"has no kernels for compute capability {compute_capability / 10}"
            ok, reason = is_available("cuda" if platform.is_cuda() else "cpu")
            return (True, None) if ok else (False, f"cannot run: {reason}")

        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, str | None]:
            possible, reason = super().can_implement(config)
            if not possible:
                return possible, reason
            for name, key, expected in (
                ("weights", config.weight_quant_key, (GROUP, GROUP)),
                ("activations", config.activation_quant_key, (1, GROUP)),
            ):
                shape = tuple(key.scale.group_shape)
                if shape != expected:
                    return False, f"needs {name} with a scale for each {expected} (got {shape})"
            if config.weight_quant_key.dtype is not torch.float8_e4m3fn:
                return False, f"needs e4m3 weights (got {config.weight_quant_key.dtype})"
            if config.out_dtype not in _WIDE:
                return False, f"writes BF16, FP16 or FP32 (asked for {config.out_dtype})"
            if config.weight_shape[1] % 16:
                return False, (
                    "reads rows of a weight that are a multiple of 16 bytes apart (got "
                    f"{config.weight_shape[1]} input features)"
                )
            return True, None

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            super().process_weights_after_loading(layer)
            parameters = self._get_layer_params(layer)
            scale = float32_scale(parameters.block_scale.detach()).contiguous()
            replace_parameter(layer, parameters.block_scale_attr, scale)

        def apply_block_scaled_mm(self, A: Tensor, B: Tensor, As: Tensor, Bs: Tensor) -> Tensor:
            return block_product(A, As, B, Bs, out_dtype=self.config.out_dtype)

    return TorchextFp8BlockScaledMMKernel
