"""Loads the compiled ops."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent.parent


def load(path: Path = PACKAGE / "_C.so") -> None:
    """Registers `torch.ops.torchext.*`.

    Raises ImportError when the library was not built, or when this torch cannot load it.
    """
    if not path.is_file():
        raise ImportError(
            f"torchext: its compiled ops are missing: expected {path}. Build them with "
            "`pip install .` (or, in a checkout, `python setup.py build_ext --inplace`); a C++ "
            "compiler is enough, nvcc adds the CUDA kernels."
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"torchext: torch {torch.__version__} cannot load {path.name}: {error}. Expected "
            "torch >= 2.10; upgrade torch, or rebuild torchext on this machine with "
            "`pip install .`."
        ) from error


def op_library() -> ctypes.CDLL:
    """The compiled ops as a C library: some of its functions are no ops (the simulator's seam)."""
    return ctypes.CDLL(str(PACKAGE / "_C.so"))


load()
