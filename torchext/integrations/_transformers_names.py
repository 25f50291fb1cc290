"""The private names of transformers that torchext.integrations.transformers reads and replaces.

Releases of transformers move them. This is the only module that knows where they are; it looks for
all of them before anything is replaced. The tests run with the version pinned in pyproject.toml.
"""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any, NamedTuple

TESTED = "5.24.0"
_FP8 = "transformers.integrations.finegrained_fp8"
_QUANTIZER = "transformers.quantizers.quantizer_finegrained_fp8"

# Each name, and the parameters that a function must begin with, or the attributes of a class.
_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    _FP8: {
        "_FINEGRAINED_FP8": (),
        "_apply_if_grad": ("function", "direct", "input"),
        "fp8_linear": (
            "input", "weight", "weight_scale_inv", "block_size", "bias", "activation_scale"
        ),
        "fp8_grouped_matmul": (
            "input", "weight", "weight_scale_inv", "offsets", "tokens_per_expert", "block_size"
        ),
        "fp8_grouped_mm_experts_forward": ("self", "hidden_states"),
        "FineGrainedFP8": ("matmul", "batched_matmul", "grouped_matmul"),
        "FP8Linear": ("forward",),
        "Fp8Quantize": ("_quantize_one",),
        "ALL_FP8_EXPERTS_FUNCTIONS": (),
    },
    _QUANTIZER: {"FineGrainedFP8HfQuantizer": ("validate_environment",)},
}  # fmt: skip


class Names(NamedTuple):
    """The module of the FP8 layers, and the class of the quantizer."""

    fp8: Any
    quantizer: Any


def find() -> Names:
    """Looks for every name.

    Raises:
        ImportError: transformers is not installed, or this release has another structure.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            "torchext.integrations.transformers: transformers must be installed (got "
            f"{error}); pip install transformers=={TESTED}"
        ) from None
    modules: dict[str, ModuleType] = {}
    missing = []
    for path, names in _NAMES.items():
        try:
            modules[path] = importlib.import_module(path)
        except ImportError:
            missing.append(path)
            continue
        missing += [
            f"{path}.{name}{f' with {parts}' if parts else ''}"
            for name, parts in names.items()
            if not _has(modules[path], name, parts)
        ]
    if missing:
        raise ImportError(
            "torchext.integrations.transformers: transformers must have the names that torchext "
            f"replaces (got {transformers.__version__} without {'; '.join(missing)}); install "
            f"transformers=={TESTED}, or a torchext that knows this release"
        )
    return Names(modules[_FP8], modules[_QUANTIZER].FineGrainedFP8HfQuantizer)  # type: ignore[attr-defined]


def _has(module: ModuleType, name: str, parts: tuple[str, ...]) -> bool:
    if not hasattr(module, name):
        return False
    found = getattr(module, name)
    if inspect.isfunction(found):
        return tuple(inspect.signature(found).parameters)[: len(parts)] == parts
    annotated = getattr(found, "__annotations__", {})
    return all(hasattr(found, part) or part in annotated for part in parts)
