"""Runs compiled PTX on a CPU, instruction by instruction, and checks every one.

    import numpy as np
    from torchext import sim

    module = sim.Module("saxpy.ptx")
    x, y = np.ones(1000, np.float32), np.zeros(1000, np.float32)
    report = module.launch(
        "saxpy", grid=4, block=256, args=[1000, 2.0, sim.read_only(x), y]
    )
    print(report)

`report` lists the faults that a GPU hides: reads outside a buffer or of bytes that nobody wrote,
data races, missing fences between the generic and the async proxy, wgmma operands that change
while the tensor cores read them, barriers that deadlock. `simulate()` runs `torch.ops.torchext.*`
the same way. `python -m torchext.sim` is the command line.
"""

from __future__ import annotations

try:
    from torchext import _sim
except ImportError as error:
    raise ImportError(
        "torchext.sim: the simulator's extension module torchext._sim is missing or was built for "
        f"another Python ({error}); reinstall torchext from source with this Python: "
        "`pip install .`"
    ) from error
try:
    import numpy as _numpy  # noqa: F401  (torch does without; every module below needs it)
except ImportError as error:
    raise ImportError(
        f"torchext.sim: numpy must be installed (got: {error}); run `pip install numpy`, or "
        "install torchext with its extra `sim`: `pip install '.[sim]'`"
    ) from error

from .arguments import Argument, output, pointer, read_only, struct, tensor_map, window
from .compiler import CompileError, compile_cuda
from .group import GroupReport, Launch, launch_group
from .module import Kernel, Module, Parameter, link
from .numerics import tensor_core_matmul
from .ops import Simulation, simulate
from .report import Finding, Report, SimulationError
from .timing import Remark, RoleWait, Timing
from .variables import Variable

PtxError = _sim.PtxError
TensorMapError = _sim.TensorMapError

__all__ = [
    "Argument",
    "CompileError",
    "Finding",
    "GroupReport",
    "Kernel",
    "Launch",
    "Module",
    "Parameter",
    "PtxError",
    "Remark",
    "Report",
    "RoleWait",
    "Simulation",
    "SimulationError",
    "TensorMapError",
    "Timing",
    "Variable",
    "compile_cuda",
    "launch_group",
    "link",
    "output",
    "pointer",
    "read_only",
    "simulate",
    "struct",
    "tensor_core_matmul",
    "tensor_map",
    "window",
]
