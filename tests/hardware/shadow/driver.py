"""The CUDA driver by ctypes: what a launch of PTX needs. Every error becomes a DriverError."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass

# Enumerators of cuda.h.
UNSUPPORTED_PTX_VERSION = 222
NOT_FOUND = 500
NOT_READY = 600
MULTIPROCESSOR_COUNT, CAPABILITY_MAJOR, CAPABILITY_MINOR = 16, 75, 76
MAX_DYNAMIC_SHARED_SIZE_BYTES, NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 8, 14
COOPERATIVE, CLUSTER_DIMENSION = 2, 4
DISABLE_TIMING = 2
INFO_LOG, INFO_LOG_BYTES, ERROR_LOG, ERROR_LOG_BYTES = 3, 4, 5, 6
INPUT_PTX = 1
LOG_BYTES = 16384

# Errors after which no call of this process succeeds any more.
STICKY = {214, 700, 702, 710, 714, 715, 716, 717, 718, 719}


class DriverError(RuntimeError):
    """A call of the driver failed."""

    def __init__(self, call: str, code: int, name: str, log: str = ""):
        super().__init__(f"{call}: error {code} ({name})" + (f"\n{log}" if log else ""))
        self.call, self.code, self.log = call, code, log

    @property
    def sticky(self) -> bool:
        """Whether the context is lost, and with it the process's access to the GPU."""
        return self.code in STICKY


class HungError(RuntimeError):
    """A kernel did not end within its limit. It still runs, until the process ends."""


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute. The value is a union of 64 bytes, of which a launch needs integers."""

    _fields_ = [("id", c_uint), ("pad", c_uint), ("value", c_uint * 16)]


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", c_uint * 3), ("block", c_uint * 3), ("shared_bytes", c_uint),
        ("stream", c_void_p), ("attributes", POINTER(_LaunchAttribute)), ("count", c_uint),
    ]  # fmt: skip


_OPTIONS = (c_uint, POINTER(c_int), POINTER(c_void_p))
_SIGNATURES: dict[str, tuple[object, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuModuleLoadDataEx": (POINTER(c_void_p), c_void_p, *_OPTIONS),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuModuleGetGlobal_v2": (POINTER(c_uint64), POINTER(c_size_t), c_void_p, c_char_p),
    "cuLinkCreate_v2": (*_OPTIONS, POINTER(c_void_p)),
    "cuLinkAddData_v2": (c_void_p, c_int, c_void_p, c_size_t, c_char_p, *_OPTIONS),
    "cuLinkComplete": (c_void_p, POINTER(c_void_p), POINTER(c_size_t)),
    "cuLinkDestroy": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemcpyHtoD_v2": (c_uint64, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, c_uint64, c_size_t),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernelEx": (POINTER(_LaunchConfig), c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuTensorMapEncodeTiled": (
        c_void_p, c_int, c_uint, c_uint64, POINTER(c_uint64), POINTER(c_uint64), POINTER(c_uint),
        POINTER(c_uint), c_int, c_int, c_int, c_int,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """The shape of a launch. cluster None is the kernel's own."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0
    cluster: tuple[int, int, int] | None = None
    non_portable_cluster: bool = False
    cooperative: bool = False


class _Log:
    """The options of a JIT compilation that receive its messages."""

    def __init__(self) -> None:
        self._buffers = [ctypes.create_string_buffer(LOG_BYTES) for _ in range(2)]
        addresses = [ctypes.addressof(buffer) for buffer in self._buffers]
        self.keys = (c_int * 4)(INFO_LOG, INFO_LOG_BYTES, ERROR_LOG, ERROR_LOG_BYTES)
        self.values = (c_void_p * 4)(addresses[0], LOG_BYTES, addresses[1], LOG_BYTES)

    @property
    def arguments(self) -> tuple[object, ...]:
        return 4, self.keys, self.values

    def __str__(self) -> str:
        texts = [buffer.value.decode(errors="replace").strip() for buffer in self._buffers]
        return "\n".join(text for text in texts if text)


class Driver:
    """The driver, with the primary context of GPU 0 (which torch uses too) current."""

    def __init__(self, library: str = "libcuda.so.1"):
        self._library = ctypes.CDLL(library)
        for name, types in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = list(types), c_int
        self._call("cuInit", 0)
        device = c_int()
        self._call("cuDeviceGet", byref(device), 0)
        self._device = device.value
        context = c_void_p()
        self._call("cuDevicePrimaryCtxRetain", byref(context), self._device)
        self._context = context
        self.make_current()
        self._event = c_void_p()
        self._call("cuEventCreate", byref(self._event), DISABLE_TIMING)
        major, minor = self.attribute(CAPABILITY_MAJOR), self.attribute(CAPABILITY_MINOR)
        self.capability = 10 * major + minor
        self.num_sms = self.attribute(MULTIPROCESSOR_COUNT)

    def _call(self, name: str, *arguments: object, log: _Log | None = None) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise DriverError(name, code, self._error_name(code), "" if log is None else str(log))

    def _error_name(self, code: int) -> str:
        text = c_char_p()
        self._library.cuGetErrorString(code, byref(text))
        return (text.value or b"unknown").decode()

    def make_current(self) -> None:
        """Makes the context current in the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    def attribute(self, attribute: int) -> int:
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), attribute, self._device)
        return value.value

    # ---- modules ----

    def load(self, texts: Sequence[tuple[str, str]]) -> int:
        """Compiles (name, PTX text) pairs and links them if there are several."""
        if len(texts) > 1:
            return self._load_linked(texts)
        return self._load_image(texts[0][1].encode() + b"\0")

    def _load_image(self, image: bytes) -> int:
        module, log = c_void_p(), _Log()
        self._call("cuModuleLoadDataEx", byref(module), image, *log.arguments, log=log)
        return _value(module)

    def _load_linked(self, texts: Sequence[tuple[str, str]]) -> int:
        state, log = c_void_p(), _Log()
        self._call("cuLinkCreate_v2", *log.arguments, byref(state), log=log)
        try:
            for name, text in texts:
                data = text.encode() + b"\0"
                self._call(
                    "cuLinkAddData_v2", state, INPUT_PTX, data, len(data), name.encode(),
                    0, None, None, log=log,
                )  # fmt: skip
            image, size = c_void_p(), c_size_t()
            self._call("cuLinkComplete", state, byref(image), byref(size), log=log)
            # The image belongs to the link state, which must outlive the load.
            return self._load_image(ctypes.string_at(image, size.value))
        finally:
            self._call("cuLinkDestroy", state)

    def unload(self, module: int) -> None:
        self._call("cuModuleUnload", module)

    def function(self, module: int, name: str) -> int:
        function = c_void_p()
        self._call("cuModuleGetFunction", byref(function), module, name.encode())
        return _value(function)

    def variable(self, module: int, name: str) -> tuple[int, int] | None:
        """(address, bytes) of a device variable; None if the driver does not know the name."""
        address, size = c_uint64(), c_size_t()
        try:
            self._call(
                "cuModuleGetGlobal_v2", byref(address), byref(size), module, name.encode()
            )  # fmt: skip
        except DriverError as error:
            if error.code == NOT_FOUND:
                return None
            raise
        return address.value, size.value

    # ---- memory ----

    def allocate(self, size: int) -> int:
        address = c_uint64()
        self._call("cuMemAlloc_v2", byref(address), size)
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", address)

    def write(self, address: int, data: bytes) -> None:
        if data:
            self._call("cuMemcpyHtoD_v2", address, data, len(data))

    def read(self, address: int, size: int) -> bytes:
        data = (c_char * size)()
        if size:
            self._call("cuMemcpyDtoH_v2", data, address, size)
        return data.raw

    # ---- launches ----

    def launch(
        self, function: int, launch: Launch, parameters: Sequence[bytes], limit_s: float
    ) -> None:
        """Runs a kernel to its end.

        Raises DriverError if it cannot be launched or fails, HungError if it takes longer than
        `limit_s`.
        """
        if launch.shared_bytes:
            self._call(
                "cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE_BYTES, launch.shared_bytes
            )
        if launch.non_portable_cluster:
            self._call("cuFuncSetAttribute", function, NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
        attributes: list[tuple[int, tuple[int, ...]]] = []
        if launch.cluster is not None:
            attributes.append((CLUSTER_DIMENSION, launch.cluster))
        if launch.cooperative:
            attributes.append((COOPERATIVE, (1,)))
        array = (_LaunchAttribute * max(len(attributes), 1))()
        for entry, (number, values) in zip(array, attributes, strict=False):
            entry.id = number
            entry.value[: len(values)] = values
        config = _LaunchConfig(
            (c_uint * 3)(*launch.grid), (c_uint * 3)(*launch.block), launch.shared_bytes,
            None, array, len(attributes),
        )  # fmt: skip
        # Parameters are copied by the driver during the call; tensor maps need 64-byte alignment.
        buffers = [_aligned(parameter) for parameter in parameters]
        pointers = (c_void_p * max(len(buffers), 1))(*(address for _, address in buffers))
        self._call("cuLaunchKernelEx", byref(config), function, pointers, None)
        self._call("cuEventRecord", self._event, None)
        start = time.monotonic()
        while True:
            code = self._library.cuEventQuery(self._event)
            if code == 0:
                return
            if code != NOT_READY:
                raise DriverError("the kernel", code, self._error_name(code))
            waited = time.monotonic() - start
            if waited > limit_s:
                raise HungError(f"the kernel did not end within {limit_s:g} s")
            time.sleep(0 if waited < 0.002 else 0.001)

    def encode_tensor_map(
        self, *, data_type: int, global_address: int, global_dim: Sequence[int],
        global_strides: Sequence[int], box_dim: Sequence[int], element_strides: Sequence[int],
        interleave: int = 0, swizzle: int = 0, l2_promotion: int = 0, oob_fill: int = 0,
    ) -> bytes:  # fmt: skip
        """cuTensorMapEncodeTiled, with the arguments of torchext._sim.encode_tensor_map."""
        rank = len(global_dim)
        memory, address = _aligned(bytes(128))
        self._call(
            "cuTensorMapEncodeTiled", address, data_type, rank, global_address,
            (c_uint64 * rank)(*global_dim), (c_uint64 * max(rank - 1, 1))(*global_strides),
            (c_uint * rank)(*box_dim), (c_uint * rank)(*element_strides),
            interleave, swizzle, l2_promotion, oob_fill,
        )  # fmt: skip
        offset = address - ctypes.addressof(memory)
        return memory.raw[offset : offset + 128]


def _value(handle: c_void_p) -> int:
    if handle.value is None:
        raise DriverError("a call", 0, "success, but a null handle")
    return handle.value


def _aligned(data: bytes) -> tuple[ctypes.Array[c_char], int]:
    """(memory, address) of a copy of `data` at a multiple of 64 in `memory`."""
    memory = ctypes.create_string_buffer(len(data) + 64)
    address = -(-ctypes.addressof(memory) // 64) * 64
    ctypes.memmove(address, data, len(data))
    return memory, address
