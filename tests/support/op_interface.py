"""The C interface between the op library and a simulator, for ctypes; and a simulator that runs
nothing, but records which kernels an op launches."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torchext._dispatch.c_api import c_function


class Buffer(ctypes.Structure):
    """TorchextBuffer of ptx/sim/api/op_interface.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("access", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
    ]


class Simulator(ctypes.Structure):
    """TorchextSimulator of the same."""

    _fields_ = [
        ("context", ctypes.c_void_p),
        ("compute_capability", ctypes.c_int),
        ("sm_count", ctypes.c_int),
        ("encode_tensor_map", ctypes.c_void_p),
        ("launch", ctypes.c_void_p),
    ]


LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, *[ctypes.c_uint32 * 3] * 3, ctypes.c_uint32,
    ctypes.c_void_p, ctypes.POINTER(Buffer), ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t,
)  # fmt: skip
ENCODE_TENSOR_MAP = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32,
    ctypes.c_uint32, ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_uint64)] * 2,
    ctypes.POINTER(ctypes.c_uint32), ctypes.c_uint32, ctypes.c_char_p, ctypes.c_size_t,
)  # fmt: skip


@contextmanager
def recorded_launches(compute_capability: int, num_sms: int) -> Iterator[list[str]]:
    """The names of the kernels that ops launch within the block. Results are left unwritten."""
    names: list[str] = []

    def launch(_context: int, kernel: bytes, *_rest: object) -> int:
        names.append(kernel.decode())
        return 0

    encode_tensor_map, record = ENCODE_TENSOR_MAP(lambda *_: 0), LAUNCH(launch)
    address_of = [ctypes.cast(f, ctypes.c_void_p).value for f in (encode_tensor_map, record)]
    simulator = Simulator(None, compute_capability, num_sms, *address_of)
    install = c_function("torchext_set_simulator")
    install(ctypes.addressof(simulator))
    try:
        yield names
    finally:
        install(None)


@contextmanager
def without_simulator() -> Iterator[None]:
    """Within the block, ops on CPU tensors run the CPU kernels, also inside of sim.simulate()."""
    simulated = sys.modules.get("torchext.sim.ops")
    if simulated is None:
        yield
        return
    simulated._install(None)
    try:
        yield
    finally:
        simulated._install_innermost()
