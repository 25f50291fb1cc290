"""Other libraries' interfaces on torchext's kernels: change one import and nothing else.

`torchext.compat.deep_gemm` is DeepGEMM's FP8 interface for Hopper.
"""

import importlib as _importlib
from typing import Any as _Any

__all__ = ["deep_gemm"]


def __getattr__(name: str) -> _Any:
    if name in __all__:
        return _importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
