"""PEP 517 backend: setuptools, but built against the torch that is already installed.

An isolated build would download another torch, gigabytes of it, only to read its headers. The
binary is the same for every torch >= 2.10 (stable ABI), so the installed one serves; a machine
without torch gets one in the build environment.
"""

from __future__ import annotations

import sys

from setuptools import build_meta as _setuptools
from setuptools.build_meta import (
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
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


def _has_torch() -> bool:
    return any((site / "torch" / "version.py").exists() for site in installed_site_packages())


def _use_installed_torch() -> None:
    # Last, so that the build environment's own packages win.
    sys.path += [str(site) for site in installed_site_packages() if str(site) not in sys.path]


def get_requires_for_build_wheel(config_settings=None):
    torch = [] if _has_torch() else ["torch>=2.10"]
    return _setuptools.get_requires_for_build_wheel(config_settings) + torch


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _use_installed_torch()
    return _setuptools.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _use_installed_torch()
    return _setuptools.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    return _setuptools.build_sdist(sdist_directory, config_settings)
