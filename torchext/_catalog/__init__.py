"""One entry per op: inputs that hurt, reference, least memory traffic, flops and error bound.

Tests, benchmarks, soak and gpu_check iterate over CATALOG, so an op that has an entry is covered by
all of them. Nothing in torchext imports this package; it ships so that a machine with a GPU has it.
"""

from . import fused, gemm, grouped, quantize
from .entry import BITS, Bits, Bound, Entry, Sample

CATALOG: dict[str, Entry] = {
    entry.name: entry for module in (quantize, gemm, grouped, fused) for entry in module.ENTRIES
}

__all__ = ["BITS", "CATALOG", "Bits", "Bound", "Entry", "Sample"]
