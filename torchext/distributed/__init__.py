"""Training on many ranks: FSDP2 whose all-gathers send FP8.

- `shard_fp8` is torch.distributed.fsdp.fully_shard with blockwise FP8 weights on the wire.
"""

from .sharding import gathered_dtypes, shard_fp8
from .weight import Fp8ShardedWeight

__all__ = ["Fp8ShardedWeight", "gathered_dtypes", "shard_fp8"]
