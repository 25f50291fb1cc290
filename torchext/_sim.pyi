"""Types of torchext._sim, the simulator's extension module (ptx/sim/api). torchext.sim is its
public face. Addresses and sizes are ints, in bytes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from torchext.sim.options import LaunchOptions

class PtxError(ValueError):
    """PTX that is malformed, unknown, or refused by its target; the message names file and line."""

class TensorMapError(ValueError):
    """A broken rule of cuTensorMapEncodeTiled; the message names argument, rule and value."""

# ---- Modules and launches (bindings_launch.cpp) ----

class Module:
    """Parsed and linked PTX with its device variables. Programs are decoded on first use."""

    def __init__(self, named_texts: Sequence[tuple[str, str]]) -> None:
        """Parses (name, PTX text) pairs and links them. Raises PtxError."""
    @property
    def target(self) -> str:
        """Such as "sm_90a"."""
    def kernels(self) -> list[dict[str, Any]]:
        """The fields of `torchext.sim.Kernel`; parameters are tuples of `Parameter`'s fields."""
    def variables(self) -> list[dict[str, Any]]:
        """The fields of `torchext.sim.Variable`, without `_module`."""
    def reset_variables(self) -> None:
        """Gives every variable its initial value."""
    def decode(self, kernel: str, /) -> None:
        """Decodes a kernel and all that it calls. Raises PtxError for what is not known."""
    def traits(self, kernel: str, /) -> list[dict[str, Any]]:
        """What the machine knows of each instruction of a kernel's program (frontend/traits.h)."""
    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        cluster: tuple[int, int, int],
        smem: int,
        options: LaunchOptions,
        params: Sequence[bytes],
        buffers: Sequence[tuple[int, int, str, str]],
        /,
    ) -> dict[str, Any]:
        """Runs a kernel without the GIL; returns the fields of `torchext.sim.Report`.

        cluster (0, 0, 0) is the kernel's own. buffers: (address, bytes, "read", "write" or
        "read_write", name). Raises ValueError for a launch that the target's GPUs would refuse.
        """

def launch_group(
    launches: Sequence[
        tuple[
            Module,
            str,
            tuple[int, int, int],
            tuple[int, int, int],
            tuple[int, int, int],
            int,
            bool,
            Sequence[bytes],
            int,
        ]
    ],
    options: LaunchOptions,
    buffers: Sequence[tuple[tuple[int, int, str, str], int]],
    /,
) -> list[dict[str, Any]]:
    """Runs a grid on each of several devices without the GIL, with a report for each.

    launches: (module, kernel, grid, block, cluster, smem, non-portable cluster, params, device).
    buffers: those of `Module.launch`, each with its device. Raises as `Module.launch`.
    """

def timing_gpus() -> list[dict[str, Any]]:
    """The GPUs that the timing model knows (csrc/runtime/timing.inc)."""

def timing_constants() -> list[tuple[str, float, str, bool, str, str]]:
    """The model's constants: name, value, unit, whether a fit may move it, grade, source."""

class OpSimulator:
    """Executes the kernels of the op library, whose PTX it finds among `ptx_files`."""

    def __init__(
        self,
        ptx_files: Sequence[str],
        read_ptx: Callable[[str], str],
        options: LaunchOptions,
        compute_capability: int,
    ) -> None:
        """read_ptx: the text of a file. compute_capability: 90 for sm_90."""
    @property
    def interface(self) -> int:
        """Address of the TorchextSimulator that torchext_set_simulator takes."""
    def launches(self) -> list[dict[str, Any]]:
        """The fields of a `torchext.sim.Report` for each launch so far."""

def demangle(symbol: str, /) -> str:
    """The C++ signature of a symbol; a name that is no C++ symbol is returned unchanged."""

def short_name(symbol: str, /) -> str:
    """The C++ name with namespaces and template arguments, without return type and parameters."""

def finding_kinds() -> list[tuple[str, str, str, str]]:
    """(name, grade, remedy, example) of every kind of finding."""

def opcodes() -> list[dict[str, Any]]:
    """The opcode table: opcode, file, classes, units, target (the least sm number)."""

def op_classes() -> list[dict[str, str]]:
    """The classes of instructions of similar cost: class, unit, text."""

# ---- Number formats, tensor cores, tensor maps (bindings_numerics.cpp) ----

def encode(
    format: str,
    values: npt.ArrayLike,
    rounding: str = "rn",
    satfinite: bool = False,
    relu: bool = False,
) -> npt.NDArray[np.uint32]:
    """Codes of `values` (flat) in f32, tf32, f16, bf16, e4m3, e5m2 or ue8m0, as `cvt` rounds."""

def decode(format: str, codes: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The values (flat) of codes, exactly; NaN codes give the canonical NaN."""

def mma(
    instruction: str,
    target: int,
    accumulator: str,
    a: npt.NDArray[np.uint8],
    a_format: str,
    b: npt.NDArray[np.uint8],
    b_format: str,
    c: npt.NDArray[np.float32],
    k_per_instruction: int,
    one_by_one: bool = False,
) -> npt.NDArray[np.float32]:
    """a @ b.T + c by a chain of "wgmma" or "mma.sync" of sm_`target`.

    a: [M, K * element size] bytes, b: [N, K * element size] bytes, c: [M, N]; K is a multiple of
    k_per_instruction. one_by_one takes the slow path, which computes one element at a time.
    """

def encode_tensor_map(
    data_type: int,
    global_address: int,
    global_dim: Sequence[int],
    global_strides: Sequence[int],
    box_dim: Sequence[int],
    element_strides: Sequence[int],
    interleave: int = 0,
    swizzle: int = 0,
    l2_promotion: int = 0,
    oob_fill: int = 0,
) -> bytes:
    """128 bytes from cuTensorMapEncodeTiled's arguments, innermost dimension first.

    Enumerations are the CUDA driver's numbers. Raises TensorMapError.
    """

def decode_tensor_map(map: bytes) -> dict[str, Any]:
    """The arguments that made a map, with `box_bytes` and `box_span_bytes`."""

def replace_tensor_map_field(map: bytes, field: str, ordinal: int, value: int) -> bytes:
    """What tensormap.replace.tile.`field` makes of a map. Raises TensorMapError."""

def box_runs(
    map: bytes, coordinates: Sequence[int], shared_address: int
) -> list[tuple[int, int, int | None]]:
    """(shared address, bytes, global address or None if out of bounds) of each contiguous run."""

def oob_fill(map: bytes, bytes: int) -> bytes:
    """So many bytes of what a load writes for elements outside the tensor."""
