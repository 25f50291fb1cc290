"""DeepGEMM's functions for Blackwell's FP4, which are out of scope here.

The names exist so that importing them works; a call raises NotImplementedError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def _out_of_scope(name: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name}: FP4 is out of scope of torchext.compat.deep_gemm, which has DeepGEMM's FP8 "
            "interface for Hopper; cast with per_token_cast_to_fp8 or per_block_cast_to_fp8, or "
            "use DeepGEMM on a Blackwell GPU"
        )

    refuse.__name__ = refuse.__qualname__ = name
    refuse.__doc__ = "Out of scope, since FP4 needs Blackwell. Raises NotImplementedError."
    return refuse


per_token_cast_to_fp4 = _out_of_scope("per_token_cast_to_fp4")
cast_back_from_fp4 = _out_of_scope("cast_back_from_fp4")
transpose_packed_fp4 = _out_of_scope("transpose_packed_fp4")

# Mega MoE: what transformers 5 looks for when it loads a DeepGEMM.
transform_weights_for_mega_moe = _out_of_scope("transform_weights_for_mega_moe")
get_symm_buffer_for_mega_moe = _out_of_scope("get_symm_buffer_for_mega_moe")
fp8_fp4_mega_moe = _out_of_scope("fp8_fp4_mega_moe")
