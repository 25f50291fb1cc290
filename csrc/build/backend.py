"""PEP 517 backend: setuptools, but building against the torch that is already installed.

An isolated build would download gigabytes of another torch, only to read its headers. The binary is
the same for every torch >= 2.10 (stable ABI), so the build uses the installed torch. If none is
installed, the build environment gets one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from setuptools import build_meta as _setuptools

from toolchain import installed_site_packages

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    # setuptools would run setup.py to find out, which imports torch.
    installed = any((site / "torch" / "version.py").exists() for site in installed_site_packages())
    return [] if installed else ["torch>=2.10"]


get_requires_for_build_editable = get_requires_for_build_sdist = get_requires_for_build_wheel


def _with_installed_torch(hook: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        # Appended, so that the build environment's own packages take precedence.
        sites = map(str, installed_site_packages())
        sys.path += [site for site in sites if site not in sys.path]
        return hook(*arguments, **options)

    return run


build_editable = _with_installed_torch(_setuptools.build_editable)
build_sdist = _with_installed_torch(_setuptools.build_sdist)
build_wheel = _with_installed_torch(_setuptools.build_wheel)
prepare_metadata_for_build_editable = _with_installed_torch(
    _setuptools.prepare_metadata_for_build_editable
)
prepare_metadata_for_build_wheel = _with_installed_torch(
    _setuptools.prepare_metadata_for_build_wheel
)
