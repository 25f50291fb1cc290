"""Finds nvcc, by the same rule for the build (csrc/build/toolchain.py) and for torchext.sim.

Imports only the standard library, so that a build can load this file by its path.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its root, and the folder of libcudart_static.a (None if it has none)."""

    home: Path
    library_dir: Path | None

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"


def installed_site_packages() -> list[Path]:
    """The interpreter's own site-packages, even in an isolated build environment."""
    return [Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")]


def _candidates() -> list[Path]:
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if homes:  # the user's choice is final
        return homes
    homes = [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    on_path = shutil.which("nvcc")
    if on_path:
        homes.append(Path(on_path).resolve().parent.parent)
    for site in installed_site_packages():
        homes += sorted(site.glob("nvidia/cu[0-9]*"), reverse=True)
    return homes


def find_toolkit(*, to_link: bool = False) -> Toolkit | None:
    """The first toolkit with nvcc, or None if there is none.

    If CUDA_HOME or CUDA_PATH is set, only these are searched, in this order. Otherwise the order is
    /usr/local/cuda, /usr/local/cuda-* (the highest name first), PATH, NVIDIA's PyPI packages.

    Args:
        to_link: skip toolkits without libcudart_static.a, which building torchext needs and
            compiling to PTX does not.
    """
    for home in _candidates():
        if not (home / "bin" / "nvcc").is_file():
            continue
        folders = (home / "lib64", home / "lib", home / "targets/x86_64-linux/lib")
        linked = [folder for folder in folders if (folder / "libcudart_static.a").exists()]
        if linked or not to_link:
            return Toolkit(home, linked[0] if linked else None)
    return None
