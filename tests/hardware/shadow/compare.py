"""Compares a buffer of the GPU with the simulator's, and classes what may legitimately differ."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

# Registers whose values PTX leaves to the machine.
VARYING = re.compile(r"%(clock(64|_hi)?|globaltimer(_lo|_hi)?|n?smid|n?warpid|gridid|pm\d(_64)?)\b")
APPROXIMATE = re.compile(
    r"\b(ex2|lg2|sin|cos|tanh|rcp|rsqrt|sqrt|div)\.(?:approx|full)(?:\.ftz)?"
    r"\.(f16x2|bf16x2|f16|bf16|f32|f64)\b"
)
# (relative, absolute) error that the PTX ISA manual documents; it documents none for f64.
DOCUMENTED = {
    "rcp f32": (2**-23, 0.0), "div f32": (2**-22, 0.0), "sqrt f32": (2**-23, 0.0),
    "rsqrt f32": (2**-22.9, 0.0), "sin f32": (0.0, 2**-20.5), "cos f32": (0.0, 2**-20.5),
    "lg2 f32": (2**-22, 2**-22), "ex2 f32": (2**-22, 0.0), "tanh f32": (2**-11, 0.0),
    "ex2 f16": (2**-9.9, 0.0), "ex2 f16x2": (2**-9.9, 0.0), "ex2 bf16": (2**-7, 0.0),
    "ex2 bf16x2": (2**-7, 0.0), "tanh f16": (0.0, 2**-10.987), "tanh f16x2": (0.0, 2**-10.987),
    "tanh bf16": (0.0, 2**-8), "tanh bf16x2": (0.0, 2**-8),
    "rcp f64": (2**-19, 0.0), "rsqrt f64": (2**-19, 0.0),
}  # fmt: skip

# numpy's or torch's dtype -> (bits of the exponent and all below it, of infinity).
_NAN = {
    "float16": (0x7FFF, 0x7C00), "bfloat16": (0x7FFF, 0x7F80),
    "float32": (0x7FFFFFFF, 0x7F800000), "float64": (0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    "float8_e5m2": (0x7F, 0x7C), "float8_e4m3fn": (0x7F, 0x7E),
}  # fmt: skip
FUNCTION_WINDOW = 3  # the highest byte of a function's address in the simulator
TENSOR_MAP_MAGIC = int.from_bytes(b"xtexTmap", "little")  # its tensor maps begin so
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Buffer:
    """One buffer after a launch on the GPU and on the simulator."""

    name: str
    dtype: str
    itemsize: int
    gpu: bytes
    sim: bytes


@dataclass
class Verdict:
    """What the comparison of a launch found.

    counts: elements that differ legitimately, by class.
    errors: largest (error, documented maximum) by approximate function.
    mismatches: lines that describe what must not differ.
    """

    counts: Counter[str] = field(default_factory=Counter)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    mismatches: list[str] = field(default_factory=list)


def compare(
    verdict: Verdict,
    buffer: Buffer,
    text: str,
    allocations: list[tuple[int, int, int]],
    inputs: list[Buffer],
) -> None:
    """Adds the differences in `buffer` to `verdict`.

    text: the PTX. allocations: (simulated address, device address, bytes). inputs: buffers whose
    elements explain those of this buffer; their `sim` is what the launch read.
    """
    size = buffer.itemsize if buffer.itemsize in _BITS else 1
    if len(buffer.sim) % size:
        size = 1
    gpu, sim = (np.frombuffer(data, _BITS[size]) for data in (buffer.gpu, buffer.sim))
    differs = gpu != sim
    if not differs.any():
        return
    if VARYING.search(text):
        verdict.counts["reads a register that varies"] += int(differs.sum())
        return
    for what, where in (
        ("NaN payload", _both_nan(gpu, sim, buffer.dtype, text)),
        ("address", _by_bytes(_addresses, buffer, size, allocations)),
        ("tensor map", _by_bytes(_tensor_maps, buffer, size, allocations)),
    ):
        verdict.counts[what] += int((differs & where).sum())
        differs &= ~where
    functions = sorted({f"{m[1]} {m[2]}" for m in APPROXIMATE.finditer(text)})
    if functions:
        within = _within_documented(verdict, gpu, sim, differs, functions)
        verdict.counts["approximate function"] += int((differs & within).sum())
        differs &= ~within
    if differs.any():
        verdict.mismatches.append(_described(buffer, gpu, sim, differs, inputs))


def _described(
    buffer: Buffer, gpu: np.ndarray, sim: np.ndarray, differs: np.ndarray, inputs: list[Buffer]
) -> str:
    digits = 2 * gpu.itemsize
    lines = [
        f"{buffer.name} ({buffer.dtype}): {int(differs.sum())} of {differs.size} elements differ"
    ]
    for at in np.flatnonzero(differs)[:4]:
        given = [
            f"{other.name}[{at}]={other.sim[at * n : (at + 1) * n][::-1].hex()}"
            for other in inputs
            for n in [other.itemsize]
            if (at + 1) * n <= len(other.sim) and len(other.sim) // n == differs.size
        ]
        lines.append(
            f"  [{at}] gpu 0x{int(gpu[at]):0{digits}x} sim 0x{int(sim[at]):0{digits}x}"
            + (f" for {', '.join(given)}" if given else "")
        )
    return "\n".join(lines)


def _is_nan(bits: np.ndarray, dtype: str) -> np.ndarray:
    mask, infinity = _NAN[dtype]
    return (bits & bits.dtype.type(mask)) > bits.dtype.type(infinity)


def _halves(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _both_nan(gpu: np.ndarray, sim: np.ndarray, dtype: str, text: str) -> np.ndarray:
    """Where both are NaN. Tests hold floats in integer arrays too: there, by the PTX's types."""
    found = np.zeros(gpu.shape, bool)
    if dtype in _NAN:
        return _is_nan(gpu, dtype) & _is_nan(sim, dtype)
    for token, kind in (("f16", "float16"), ("bf16", "bfloat16"), ("f32", "float32"),
                        ("f64", "float64")):  # fmt: skip
        if re.search(rf"\.{token}(x2)?\b", text) is None:
            continue
        if np.dtype(_BITS[gpu.itemsize]).itemsize == {"float32": 4, "float64": 8}.get(kind, 2):
            found |= _is_nan(gpu, kind) & _is_nan(sim, kind)
        elif gpu.itemsize == 4 and kind in ("float16", "bfloat16"):
            each = [
                (g == s) | (_is_nan(g, kind) & _is_nan(s, kind))
                for g, s in zip(_halves(gpu), _halves(sim), strict=True)
            ]
            found |= each[0] & each[1]
    return found


Allocations = list[tuple[int, int, int]]


def _by_bytes(
    find: Callable[[np.ndarray, np.ndarray, Allocations], np.ndarray],
    buffer: Buffer,
    size: int,
    allocations: Allocations,
) -> np.ndarray:
    """For each element of `size` bytes, whether it lies in an 8-byte word that `find` chooses."""
    words = len(buffer.sim) // 8
    gpu, sim = (np.frombuffer(data, np.uint64, words) for data in (buffer.gpu, buffer.sim))
    chosen = np.zeros(len(buffer.sim), bool)
    chosen[: 8 * words] = np.repeat(find(gpu, sim, allocations), 8)
    return np.asarray(chosen.reshape(-1, size).all(1))


def _addresses(gpu: np.ndarray, sim: np.ndarray, allocations: Allocations) -> np.ndarray:
    """Words that are the same place of an allocation, or a function on both sides."""
    found = (sim >> np.uint64(56) == FUNCTION_WINDOW) & (gpu != 0)
    for simulated, device, size in allocations:
        inside = (sim >= np.uint64(simulated)) & (sim <= np.uint64(simulated + size))
        found |= inside & (sim - np.uint64(simulated) == gpu - np.uint64(device))
    return found


def _tensor_maps(gpu: np.ndarray, sim: np.ndarray, allocations: Allocations) -> np.ndarray:
    """The 16 words of tensor maps, whose layout is the driver's and the simulator's own."""
    found = np.zeros(sim.shape, bool)
    for at in np.flatnonzero(sim == TENSOR_MAP_MAGIC):
        found[at : at + 16] = True
    return found


def _as_floats(bits: np.ndarray, kind: str) -> np.ndarray:
    """float64 [elements, parts] of f16, bf16, f32, f64 or the packed types."""
    if kind in ("f16x2", "bf16x2"):
        return np.stack([_as_floats(h.copy(), kind[:-2])[:, 0] for h in _halves(bits)], 1)
    if kind == "bf16":
        values = (bits.astype(np.uint32) << 16).view(np.float32)
    else:
        values = bits.view({"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind])
    return values.astype(np.float64)[:, None]


def _within_documented(
    verdict: Verdict,
    gpu: np.ndarray,
    sim: np.ndarray,
    differs: np.ndarray,
    functions: list[str],
) -> np.ndarray:
    """Where the results of an approximate function differ by no more than both may err."""
    found = np.zeros(gpu.shape, bool)
    for function in functions:
        kind = function.split()[1]
        if gpu.itemsize != {"f64": 8, "f16": 2, "bf16": 2}.get(kind, 4):
            continue
        g, s = _as_floats(gpu, kind), _as_floats(sim, kind)
        relative, absolute = DOCUMENTED.get(function, (0.0, 0.0))
        allowed = 2 * (absolute + relative * np.abs(s)) + 2.0**-126
        with np.errstate(invalid="ignore"):
            error = np.abs(g - s)
        fine = (g == s) | (np.isnan(g) & np.isnan(s)) | (error <= allowed)
        found |= fine.all(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            measured = error if absolute and not relative else error / np.abs(s)
        finite = measured[differs][np.isfinite(measured[differs])]
        if finite.size:
            largest, _ = verdict.errors.get(function, (0.0, 0.0))
            limit = absolute if absolute and not relative else relative
            verdict.errors[function] = (max(largest, float(finite.max())), limit)
    return found
