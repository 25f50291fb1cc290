"""Code that the plug-ins for vLLM and SGLang share: they read what the user asked for, find the
engine's names, and multiply.

An engine loads the plug-ins of every installed package in each of its processes, so they do
nothing unless an environment variable asks for it.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._dispatch.layout import m_major
from ..ops import fp8_gemm_nt, quantize_1x128

PARTS = ("linear", "deep_gemm")
_OFF = ("", "0", "off")
_SUBMODULES = ("testing", "utils", "utils.layout", "utils.math")
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_log = logging.getLogger("torchext")


def asked_for(variable: str) -> frozenset[str]:
    """The parts, of PARTS, that an environment variable lists; "1" means "linear".

    Raises:
        ValueError: the variable lists something else.
    """
    value = os.environ.get(variable, "").strip()
    if value.lower() in _OFF:
        return frozenset()
    parts = frozenset(part.strip() for part in value.split(","))
    if value == "1":
        return frozenset(["linear"])
    if not parts <= set(PARTS):
        raise ValueError(
            f"torchext: the environment variable {variable} must be 0, 1 or some of "
            f"{', '.join(PARTS)}, separated by commas (got {value!r}); 1 means linear"
        )
    return parts


def stand_in_for_deep_gemm(missing: Mapping[str, str]) -> None:
    """Makes `import deep_gemm` give torchext.compat.deep_gemm, in this process.

    Args:
        missing: {name that the engine looks for and the stand-in lacks: what needs it}; logged.

    Raises:
        RuntimeError: another deep_gemm was imported before, parts of which may be in use.
    """
    ours = importlib.import_module("torchext.compat.deep_gemm")
    before = sys.modules.get("deep_gemm")
    if before not in (None, ours):
        raise RuntimeError(
            "torchext: deep_gemm must not be imported before the plug-in runs (got "
            f"{getattr(before, '__file__', None)}); import the engine first, or leave deep_gemm "
            "out of the plug-in's environment variable"
        )
    sys.modules["deep_gemm"] = ours
    for name in _SUBMODULES:
        module = importlib.import_module(f"torchext.compat.deep_gemm.{name}")
        sys.modules[f"deep_gemm.{name}"] = module
    _log.info("deep_gemm is torchext.compat.deep_gemm, without %s", ", ".join(missing))


def find(engine: str, tested: str, names: Iterable[str]) -> list[Any]:
    """The objects of these dotted names ("package.module.NAME").

    Raises:
        ImportError: the engine is not installed, or this release has another structure.
    """
    found, lacking = [], []
    for name in names:
        path, _, attribute = name.rpartition(".")
        try:
            found.append(getattr(importlib.import_module(path), attribute))
        except (ImportError, AttributeError) as error:
            lacking.append(f"{name} ({error})")
    if lacking:
        module: ModuleType | None = sys.modules.get(engine)
        version = getattr(module, "__version__", "of an unknown version")
        raise ImportError(
            f"torchext.integrations.{engine}: {engine} must have the names that the plug-in uses "
            f"(got {engine} {version} without {'; '.join(lacking)}); install {engine}=={tested}, "
            "or unset the plug-in's environment variable"
        )
    return found


def block_product(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    pow2_scale: bool = False,
) -> Tensor:
    """x @ dequantized weight.T (+ bias) of a linear layer in fine-grained FP8.

    Args:
        x: [M, K], FP32, BF16 or FP16; or FP8 with `x_scale`.
        x_scale: FP32 [M, ceil(K / 128)], with any strides; ignored for a wide x.
        weight, weight_scale: e4m3 [N, K] and FP32 [ceil(N / 128), ceil(K / 128)].
        bias: [N]; None for none.
        out_dtype: the dtype of the result: BF16, FP16 or FP32.
        pow2_scale: round the scales of a wide x up to powers of two.

    Returns:
        [M, N].

    Raises:
        TypeError: x is FP8, and x_scale is missing or has another dtype, such as int32 with four
            exponents in each element.
    """
    if x.dtype in _FP8:
        if x_scale is None or x_scale.dtype is not torch.float32:
            kind = None if x_scale is None else x_scale.dtype
            raise TypeError(
                "torchext: the scales of an FP8 input must be torch.float32 [M, ceil(K / 128)] "
                f"(got {kind}); packed exponents are Blackwell's, so unset the plug-in's "
                "environment variable there"
            )
        data, scale = x, m_major(x_scale)
    else:
        data, scale = quantize_1x128(x, pow2_scale=pow2_scale)
    return fp8_gemm_nt(data, scale, weight, weight_scale, bias=bias, out_dtype=out_dtype)
