"""CUDA sources to PTX, with whatever nvcc there is."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .._toolchain import find_toolkit
from .module import Module


class CompileError(RuntimeError):
    """nvcc is missing, or refused the source; the message holds what it said."""


def find_nvcc() -> Path:
    """nvcc of CUDA_HOME, else of /usr/local/cuda*, PATH, or the PyPI packages of the compiler."""
    toolkit = find_toolkit()
    if toolkit is not None:
        return toolkit.nvcc
    raise CompileError(
        "torchext.sim.compile_cuda: nvcc must be in CUDA_HOME, /usr/local/cuda* or PATH (got none)"
        "; install the CUDA toolkit or, from PyPI, nvidia-cuda-nvcc, nvidia-cuda-crt, nvidia-nvvm, "
        "nvidia-cuda-runtime and nvidia-cuda-cccl; a .ptx file needs no compiler"
    )


def compile_cuda(
    source: str | Path, *, arch: str = "90a", options: Sequence[str] = (), keep: Path | None = None
) -> Module:
    """Compiles a CUDA file to PTX, with line information, and loads it.

    Args:
        source: path of a .cu file.
        arch: N of compute_N.
        options: more options of nvcc, such as include paths.
        keep: where to leave the PTX; by default nowhere.

    Raises CompileError if there is no nvcc or if it fails, OSError if the source cannot be read,
    PtxError if the PTX is not understood.
    """
    nvcc = find_nvcc()
    if not Path(source).is_file():
        what = "which is a folder" if Path(source).is_dir() else "which does not exist"
        raise FileNotFoundError(
            f"torchext.sim.compile_cuda: source must be a CUDA file (got {str(source)!r}, {what})"
        )
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / f"{Path(source).stem}.ptx" if keep is None else keep
        command = [
            str(nvcc), "-std=c++17", "-lineinfo", "-ptx", "-o", str(ptx), str(source),
            f"-gencode=arch=compute_{arch},code=compute_{arch}", *options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CompileError(f"{' '.join(command)}\n{done.stdout}{done.stderr}".rstrip())
        return Module(ptx, name=ptx.name if keep is None else None)
