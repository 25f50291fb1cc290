"""Finds the CUDA toolkit to build the extension with, and the interpreter's own site-packages.

setup.py and the build backend (backend.py) use it, so it imports only the standard library. The
rule is in torchext/_toolchain.py, which is loaded by its path because `import torchext` needs the
compiled ops.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

# NVIDIA's compiler on PyPI. `make` installs these packages if no nvcc is found. Together they put a
# toolkit into site-packages/nvidia/cu13.
PYPI_TOOLKIT = (
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
)

_RULE = Path(__file__).resolve().parents[2] / "torchext" / "_toolchain.py"
_spec = importlib.util.spec_from_file_location("torchext_toolchain", _RULE)
assert _spec is not None and _spec.loader is not None
rule = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = rule  # dataclasses look up their module here
_spec.loader.exec_module(rule)

installed_site_packages = rule.installed_site_packages


def find_toolkit() -> Any:
    """The first toolkit that torchext can be built with, a rule.Toolkit, or None."""
    return rule.find_toolkit(to_link=True)


if __name__ == "__main__":  # for setup_venv.sh: the packages that pip must install for a compiler
    if find_toolkit() is None:
        print(" ".join(PYPI_TOOLKIT))
