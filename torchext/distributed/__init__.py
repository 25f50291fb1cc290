"""Training on many ranks: FSDP2 and tensor parallelism whose communication is in FP8.

- `shard_fp8` is torch.distributed.fsdp.fully_shard with blockwise FP8 weights on the wire;
  `gathered_dtypes` tells what travels in FP8.
- `Fp8ColwiseParallel`, `Fp8RowwiseParallel` and `PrepareFp8Input` are styles for
  torch.distributed.tensor.parallel.parallelize_module.
- Once it is imported, torchext.ops take DTensors whose placements let each rank compute its part
  alone, and refuse others. Only fp8_linear and the layers' own ops redistribute, as torch's do.
"""

from .._dispatch import sharding as _rules  # noqa: F401  (registers the ops' rules with DTensor)
from .sharding import gathered_dtypes, shard_fp8
from .tensor_parallel import Fp8ColwiseParallel, Fp8RowwiseParallel, PrepareFp8Input
from .weight import Fp8ShardedWeight

__all__ = [
    "Fp8ColwiseParallel",
    "Fp8RowwiseParallel",
    "Fp8ShardedWeight",
    "PrepareFp8Input",
    "gathered_dtypes",
    "shard_fp8",
]
