"""The compiled library's plain C functions, which are not ops, with their C signatures."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char_p, c_int, c_int32, c_int64, c_uint64, c_void_p
from typing import Any

from .library import PATH

# Name: (result, *arguments). Each comment names the defining file and the arguments.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    # csrc/runtime/content_hash.cpp: (data, bytes)
    "torchext_content_hash": (c_uint64, c_void_p, c_int64),
    # csrc/runtime/cpu_level.h: the level of the CPU kernels, or an error's message
    "torchext_cpu_level": (c_char_p,),
    # csrc/runtime/device.h: (path, 0 for none)
    "torchext_force_path": (None, c_int32),
    # csrc/runtime/device.h: (simulator's interface, null for none)
    "torchext_set_simulator": (None, c_void_p),
    # csrc/runtime/memory_rate.h: (GB/s, 0 for the architecture table's)
    "torchext_set_simulated_memory": (None, c_int32),
    # csrc/runtime/memory_rate.h: (index of a GPU) -> GB/s
    "torchext_memory_gigabytes_per_second": (c_int32, c_int32),
    # csrc/runtime/architecture.h: the table as JSON; (capability) -> path
    "torchext_architectures": (c_char_p,),
    "torchext_path_of_capability": (c_int32, c_int32),
    # csrc/gemm/built.h: (path)
    "torchext_is_path_built": (c_bool, c_int32),
    # csrc/gemm/sm90/select.cpp, in builds with CUDA kernels: (m, n, k, granularity, a_e5m2, b_e5m2,
    # out_bytes, accumulate, grouping, groups, group_rows, num_sms, sm_count, GB/s, text, size)
    "torchext_explain_gemm": (
        c_int64,
        *(c_int64, c_int64, c_int64, c_int, c_bool, c_bool, c_int64, c_bool, c_int),
        *(c_int64, c_int64, c_int, c_int, c_int, c_char_p, c_int64),
    ),
    # csrc/gemm/sm90/select.cpp, in builds with CUDA kernels: (tile or null, split_k, cluster)
    "torchext_force_gemm": (None, c_char_p, c_int, c_int),
}


def c_function(name: str) -> Any:
    """The C function `name` with its signature set. ctypes releases the interpreter lock in calls.

    Raises AttributeError if this build lacks the function.
    """
    result, *arguments = _SIGNATURES[name]
    function = getattr(ctypes.CDLL(str(PATH)), name)
    function.restype, function.argtypes = result, arguments
    return function
