"""torchext: FP8 mixed-precision training and inference kernels for PyTorch.

- `torchext.convert_to_fp8_training(model)` makes a model's `nn.Linear`s train in FP8.
- `torchext.quantize_for_inference(model)` replaces their weights by FP8 ones, one byte for each.
- `torchext.advise(model, tokens=...)` predicts which layers FP8 makes faster.
- `torchext.nn` has the layers, `torchext.ops` the ops.
- `torchext.moe` sends tokens to experts on other ranks, in FP8.
- `torchext.checkpoint` reads, checks and writes FP8 checkpoints.
- `torchext.distributed` shards models over ranks, with FP8 on the wire.
- `torchext.debug` shows what FP8 does to the values of a model.
- `torchext.reference` computes what each op computes, in plain PyTorch.
- `torchext.sim` runs CUDA kernels on a CPU and checks them.
- `torchext.compat.deep_gemm` stands in for DeepGEMM.
- `torchext.is_available()` tells what works on this machine.
"""

from __future__ import annotations

import importlib as _importlib
import logging as _logging
from typing import Any as _Any

from . import nn, ops
from ._conversion_result import ConversionResult
from ._dispatch.sm_budget import sm_budget
from ._memory_report import MemoryReport, memory_report
from .advice import Advice, advise
from .availability import get_include, is_available
from .convert import convert_to_fp8_training, revert_to_linear, unconvert
from .gemm_selection import explain_gemm
from .inference import InferenceResult, dequantize_weights, quantize_for_inference
from .nn.weight_cache import fixed_weights
from .ops.delayed import WeightGradientQueue, delay_weight_gradients
from .recipe import Recipe

__version__ = "0.1.0"

# Silent unless the user configures logging. Logged are conversions, forced kernels and the path of
# the loaded library.
_logging.getLogger("torchext").addHandler(_logging.NullHandler())

# Imported at first use: the simulator needs numpy and its own extension module, checkpoints need
# safetensors, and FSDP2 takes a second.
_LAZY = ("checkpoint", "compat", "debug", "distributed", "moe", "reference", "sim")

__all__ = [
    "Advice",
    "ConversionResult",
    "InferenceResult",
    "MemoryReport",
    "Recipe",
    "WeightGradientQueue",
    "__version__",
    "advise",
    "convert_to_fp8_training",
    "delay_weight_gradients",
    "dequantize_weights",
    "explain_gemm",
    "fixed_weights",
    "get_include",
    "is_available",
    "memory_report",
    "nn",
    "ops",
    "quantize_for_inference",
    "revert_to_linear",
    "sm_budget",
    "unconvert",
]


def __getattr__(name: str) -> _Any:
    if name in _LAZY:
        return _importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_LAZY})
