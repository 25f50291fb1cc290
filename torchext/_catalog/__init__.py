"""One entry for each op: inputs that find bugs, reference, memory traffic, flops and error bound.

Tests, benchmarks, soak and gpu_check iterate over CATALOG, so all of them cover every op with an
entry. Nothing else in torchext imports this package. It is part of the wheel, so that gpu_check
finds it on a machine with a GPU.
"""

from . import activation, fused, gemm, grouped, moe, norm, quantize, weights_only
from .entry import BITS, Bits, Bound, Entry, Sample

CATALOG: dict[str, Entry] = {
    entry.name: entry
    for module in (quantize, activation, norm, gemm, grouped, fused, weights_only, moe)
    for entry in module.ENTRIES
}

__all__ = ["BITS", "CATALOG", "Bits", "Bound", "Entry", "Sample"]
