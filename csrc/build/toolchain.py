"""Finds the CUDA compiler that the extension is built with, and whatever torch is installed.

Used by setup.py and by the build backend (backend.py), with nothing but the standard library.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# NVIDIA's compiler on PyPI: `make` installs these where no nvcc is found. Together they lay a
# toolkit under site-packages/nvidia/cu13.
PYPI_TOOLKIT = (
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
)


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its root, and the folder that holds libcudart_static.a."""

    home: Path
    library_dir: Path

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"


def installed_site_packages() -> list[Path]:
    """The interpreter's own site-packages, also from within an isolated build environment."""
    return [Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")]


def _candidates() -> list[Path]:
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if homes:  # an explicit choice is not second-guessed
        return homes
    homes = [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    on_path = shutil.which("nvcc")
    if on_path:
        homes.append(Path(on_path).resolve().parent.parent)
    homes += [site / "nvidia" / "cu13" for site in installed_site_packages()]
    return homes


def find_toolkit() -> Toolkit | None:
    """The first usable toolkit in: CUDA_HOME, /usr/local/cuda*, PATH, PyPI's packages; or None."""
    for home in _candidates():
        for library_dir in (home / "lib64", home / "lib", home / "targets/x86_64-linux/lib"):
            if (home / "bin" / "nvcc").exists() and (library_dir / "libcudart_static.a").exists():
                return Toolkit(home, library_dir)
    return None


if __name__ == "__main__":  # for the Makefile: what pip still has to install to get a compiler
    if find_toolkit() is None:
        print(" ".join(PYPI_TOOLKIT))
