"""Finds nvcc: the one rule of the build (csrc/build/toolchain.py) and of torchext.sim.

Needs the standard library alone, so that a build can load this file by its path.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its root, and the folder that holds libcudart_static.a, if one does."""

    home: Path
    library_dir: Path | None

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
    for site in installed_site_packages():
        homes += sorted(site.glob("nvidia/cu[0-9]*"), reverse=True)
    return homes


def find_toolkit(*, to_link: bool = False) -> Toolkit | None:
    """The first toolkit in: CUDA_HOME (else CUDA_PATH), /usr/local/cuda*, PATH, PyPI's packages.

    Args:
        to_link: pass over toolkits without libcudart_static.a, which building torchext needs and
            compiling to PTX does not.

    Returns None where there is none.
    """
    for home in _candidates():
        if not (home / "bin" / "nvcc").is_file():
            continue
        folders = (home / "lib64", home / "lib", home / "targets/x86_64-linux/lib")
        linked = [folder for folder in folders if (folder / "libcudart_static.a").exists()]
        if linked or not to_link:
            return Toolkit(home, linked[0] if linked else None)
    return None
