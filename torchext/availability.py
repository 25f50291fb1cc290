"""What this build of torchext can run on this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple, overload

import torch

from ._architectures import architectures, built_paths, path_of, paths, why_not_built
from ._dispatch import library
from ._dispatch.c_api import c_function
from ._dispatch.errors import python_error


def get_include() -> str:
    """The folder to pass to a compiler with -I, so that it finds `#include <ptx/isa/wgmma.h>`.

    It is `torchext/include` in an installed wheel, and the root of a checkout.

    Raises FileNotFoundError if the installation lacks the headers.
    """
    for folder in (library.PACKAGE.parent, library.PACKAGE / "include"):
        if (folder / "ptx" / "isa" / "wgmma.h").is_file():
            return str(folder)
    folder = library.PACKAGE / "include" / "ptx" / "isa"
    raise FileNotFoundError(
        f"torchext.get_include: the headers must be in {folder} (got no such folder); reinstall "
        "torchext"
    )


class Availability(NamedTuple):
    """Whether a feature can be used. It is itself true or false, and unpacks into both fields.

    Attributes:
        ok: whether the feature can be used.
        reason: why, in one sentence; with a remedy if it cannot be used.
    """

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return f"{'yes' if self.ok else 'no'}: {self.reason}"


class Availabilities(dict[str, Availability]):
    """{feature: Availability}, which prints as a table."""

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:<{width}}  {answer}" for name, answer in self.items())


@overload
def is_available(feature: str) -> Availability: ...
@overload
def is_available(feature: None = None) -> Availabilities: ...
def is_available(feature: str | None = None) -> Availability | Availabilities:
    """Whether this build can use `feature` on this machine; without `feature`, all answers.

    Args:
        feature: one of these, or None.
            "cpu": the CPU kernels. The reason names the vector instructions that they use: the
            best that the machine has, or what the environment variable TORCHEXT_CPU asks for.
            False if it asks for what the machine lacks.
            "cuda": the CUDA kernels were built, and torch's current GPU can run them (compute
            capability 7.5 or later, and not left out by TORCHEXT_ARCHS). The reason says which
            kernels were built, and which of them the GPU runs.
            "sm90": as "cuda", and the GPU has compute capability 9.0, which Hopper's kernels need.
            "sim": the PTX simulator (`torchext.sim`) and the PTX of the kernels were built, and
            numpy is installed.

    Returns:
        For a feature, an object that is true or false, has a `.reason`, and unpacks as in
        `ok, reason = is_available("cuda")`. For None, a dict from each feature to such an object,
        which prints as a table.

    Raises:
        ValueError: feature is none of these.
    """
    if feature is None:
        return Availabilities((name, Availability(*check())) for name, check in _FEATURES.items())
    check = _FEATURES.get(feature)
    if check is None:
        raise ValueError(
            f"torchext.is_available: feature must be one of {', '.join(map(repr, _FEATURES))} "
            f"(got {feature!r}); is_available() answers for all of them"
        )
    return Availability(*check())


def _cpu() -> tuple[bool, str]:
    level = c_function("torchext_cpu_level")().decode()
    if " " in level:  # an error
        return False, str(python_error(RuntimeError(level)))
    return True, f"CPU kernels are part of every build; this process uses those for {level}"


def _cuda() -> tuple[bool, str]:
    if not library.has_ptx():
        return False, (
            "this build of torchext has no CUDA kernels (no nvcc was found when it was built); "
            "reinstall torchext where nvcc is on PATH or CUDA_HOME is set"
        )
    if torch.version.cuda is None:
        return False, (
            f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch "
            f"(torchext has the {_listed()} kernels)"
        )
    if not torch.cuda.is_available():
        return False, (
            "torch sees no GPU; check `nvidia-smi` and CUDA_VISIBLE_DEVICES (torchext has the "
            f"{_listed()} kernels)"
        )
    name = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    capability = 10 * major + minor
    path = path_of(capability)
    if path is None:
        oldest = min(architectures())
        return False, (
            f"{name} has compute capability {major}.{minor}; the CUDA kernels need "
            f"{oldest // 10}.{oldest % 10} or later"
        )
    missing = why_not_built(capability)
    if missing is not None:
        return False, f"torch sees {name}; {missing}"
    reason = (
        f"the {_listed()} CUDA kernels are built and torch sees {name}, of compute capability "
        f"{major}.{minor}, which runs the {path} GEMM kernels"
    )
    if capability not in architectures():
        reason += (
            "; this version of torchext does not know that capability: it runs the kernels of the "
            f"nearest earlier GPU of compute capability {major}.x or, if there is none, the "
            "latest kernels that every later GPU can run"
        )
    return True, reason


def _sm90() -> tuple[bool, str]:
    available, reason = _cuda()
    if not available:
        return False, reason
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return False, (
            f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}; Hopper's "
            "kernels need 9.0 (H100, H200, H800, GH200)"
        )
    return True, f"{torch.cuda.get_device_name()} has compute capability 9.0"


def _sim() -> tuple[bool, str]:
    if importlib.util.find_spec("torchext._sim") is None:
        return False, (
            "the simulator (torchext._sim) was not built for this Python; reinstall torchext from "
            "source with this Python"
        )
    if not library.has_ptx():
        return False, (
            "this build of torchext has no PTX to simulate (no nvcc was found when it was built); "
            "reinstall torchext where nvcc is on PATH or CUDA_HOME is set"
        )
    try:
        importlib.import_module("numpy")
    except ImportError as error:
        return False, f"the simulator needs numpy ({error}); pip install numpy"
    reason = "the simulator and the PTX of the CUDA kernels are built, and numpy is there"
    if len(built_paths()) < len(paths()):
        reason += f"; of the GEMM kernels only {_listed()} (TORCHEXT_ARCHS)"
    return True, reason


def _listed() -> str:
    """The built kernels, such as "plain, sm80 and sm90"."""
    *others, last = reversed(built_paths())
    return f"{', '.join(others)} and {last}" if others else last


_FEATURES: dict[str, Callable[[], tuple[bool, str]]] = {
    "cpu": _cpu,
    "cuda": _cuda,
    "sm90": _sm90,
    "sim": _sim,
}
