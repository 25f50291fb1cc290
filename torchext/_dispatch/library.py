"""Loads the compiled ops."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent.parent
PATH = PACKAGE / "_C.so"
_log = logging.getLogger("torchext")


def has_ptx() -> bool:
    """Whether this build has CUDA kernels. A build stores their PTX in the package."""
    return any((PACKAGE / "_ptx").glob("*/*.ptx.gz"))


def load(path: Path = PATH) -> None:
    """Registers `torch.ops.torchext.*`.

    Raises ImportError if the library was not built, or if this torch cannot load it.
    """
    if not path.is_file():
        raise ImportError(
            f"torchext: the compiled ops must be in {path} (got no such file); build them with "
            "`pip install .` (or, in a checkout, `python setup.py build_ext --inplace`); a C++ "
            "compiler is enough, nvcc adds the CUDA kernels"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"torchext: torch must be 2.10 or later and able to load {path.name} (got torch "
            f"{torch.__version__}: {error}); upgrade torch, or rebuild torchext on this machine "
            "with `pip install .`"
        ) from error
    if _log.isEnabledFor(logging.INFO):
        kernels = "with CUDA kernels" if has_ptx() else "without CUDA kernels"
        _log.info("loaded %s, built %s, into torch %s", path, kernels, torch.__version__)


load()
