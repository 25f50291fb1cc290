"""torchext: FP8 mixed-precision training and inference kernels for PyTorch.

`torchext.convert_to_fp8_training(model)` replaces a model's `nn.Linear`s; `torchext.nn` has the
layers, `torchext.ops` the ops, `torchext.reference` what each op computes, in plain PyTorch, and
`torchext.sim` runs the compiled CUDA kernels on a CPU.
"""

from __future__ import annotations

from types import ModuleType

from . import nn, ops
from ._library import get_include, is_available
from .convert import convert_to_fp8_training
from .gemm_selection import explain_gemm
from .recipe import Recipe

__version__ = "0.1.0"

__all__ = [
    "Recipe",
    "__version__",
    "convert_to_fp8_training",
    "explain_gemm",
    "get_include",
    "is_available",
    "nn",
    "ops",
]


def __getattr__(name: str) -> ModuleType:
    # The simulator needs numpy and an extension of its own: it is loaded when asked for.
    if name in ("reference", "sim"):
        from importlib import import_module

        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
