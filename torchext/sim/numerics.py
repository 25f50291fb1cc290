"""Matrix products as the tensor cores of a GPU compute them, bit for bit."""

from __future__ import annotations

import numpy as np

from torchext import _sim
from torchext._architectures import simulated

from .memory import Array, view_of

_FORMATS = {
    "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2", "float16": "f16", "bfloat16": "bf16",
    "float32": "tf32",
}  # fmt: skip


def _units() -> dict[str, int]:
    """{unit: a compute capability that has it}."""
    rows = simulated().values()
    units = {"wgmma": next(row.capability for row in rows if row.wgmma)}
    return units | {f"mma.sync.sm_{row.mma_rounding}": row.mma_rounding for row in rows}


def _codes(array: Array, what: str) -> tuple[np.ndarray, str, int]:
    """(bytes [rows, K * size], format, size of an element)."""
    view = view_of(array, what)
    if view.dtype not in _FORMATS or len(view.shape) != 2:
        raise ValueError(
            f"{what} must be a matrix of {', '.join(_FORMATS)} (got {len(view.shape)} dimensions "
            f"of {view.dtype})"
        )
    if isinstance(array, np.ndarray):
        raw = np.ascontiguousarray(array).view(np.uint8)
    else:
        import torch

        raw = array.detach().contiguous().view(torch.uint8).numpy()
    return raw.reshape(view.shape[0], -1), _FORMATS[view.dtype], view.itemsize


def tensor_core_matmul(
    a: Array, b: Array, *, unit: str = "wgmma", promote_every: int | None = None
) -> np.ndarray:
    """a @ b.T with the rounding of a tensor core and an FP32 accumulator.

    Args:
        a: [M, K], b: [N, K], both float8 (of either kind), float16, bfloat16 or float32 (multiplied
            as TF32). Torch CPU tensors, or numpy arrays where numpy has the dtype.
        unit: "wgmma" (Hopper), or "mma.sync.sm_80", "mma.sync.sm_89", "mma.sync.sm_90".
        promote_every: None accumulates all of K in the tensor core. A multiple of 32 is a number of
            elements of K: after each so many, the accumulator is added to a sum in FP32 (rounded to
            nearest even) and set to zero. DeepSeek-V3 and torchext do so every 128.

    Returns:
        float32 [M, N]. K is padded with zeros to whole instructions (32 bytes of K).
        ptx/sim/numerics/tensor_core.h has the arithmetic and its sources.
    """
    where = "torchext.sim.tensor_core_matmul"
    units = _units()
    if unit not in units:
        raise ValueError(f"{where}: unit must be one of {', '.join(units)} (got {unit!r})")
    if promote_every is not None and (promote_every < 32 or promote_every % 32):
        raise ValueError(f"{where}: promote_every must be a multiple of 32 (got {promote_every})")
    (a_codes, a_format, size), (b_codes, b_format, b_size) = (
        _codes(a, f"{where}: a"),
        _codes(b, f"{where}: b"),
    )
    if size != b_size or a_codes.shape[1] != b_codes.shape[1]:
        raise ValueError(
            f"{where}: b must have the K of a, and a dtype of the same size (got "
            f"{tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype})"
        )
    missing = -a_codes.shape[1] % 32
    a_codes, b_codes = (np.pad(codes, ((0, 0), (0, missing))) for codes in (a_codes, b_codes))
    total = np.zeros((a_codes.shape[0], b_codes.shape[0]), np.float32)
    width = a_codes.shape[1] if promote_every is None else promote_every * size
    for k in range(0, a_codes.shape[1], max(width, 1)):
        part = _sim.mma(
            unit.partition(".sm_")[0], units[unit], "f32",
            np.ascontiguousarray(a_codes[:, k : k + width]), a_format,
            np.ascontiguousarray(b_codes[:, k : k + width]), b_format,
            np.zeros_like(total), 32 // size,
        )  # fmt: skip
        total = part if promote_every is None else total + part
    return total
