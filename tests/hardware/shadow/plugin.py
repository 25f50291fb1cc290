"""Pytest plugin (-p tests.hardware.shadow.plugin) that repeats simulated launches on a GPU.

With pytest-xdist (-n), a process that a fault or a hang ends is replaced by another.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from .driver import Driver
from .report import written
from .shadow import Shadow

DEAD_CONTEXT = 71  # exit status if the GPU cannot be used any more
_terminal = os.dup(2)  # duplicated before pytest captures stderr


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shadow-gpu", type=Path, metavar="FILE",
        help="run each simulated launch on the GPU too; FILE gets the report, FILE.jsonl the data",
    )  # fmt: skip
    parser.addoption("--shadow-limit", type=float, default=10.0, help="seconds for a GPU kernel")
    parser.addoption("--shadow-library", default="libcuda.so.1", help="the CUDA driver's library")


def _raw(config: pytest.Config) -> Path:
    file = config.getoption("--shadow-gpu").resolve()
    return file.with_name(f"{file.name}.parts")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--shadow-gpu") is not None:
        config.pluginmanager.register(_Plugin(config), "shadow-gpu")


class _Plugin:
    def __init__(self, config: pytest.Config):
        self._config = config
        self._worker = hasattr(config, "workerinput")
        self._folder = _raw(config)
        if not self._worker:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        library = config.getoption("--shadow-library")
        self._shadow = Shadow(lambda: Driver(library), self._record, self._lost)
        self._shadow.limit_s = config.getoption("--shadow-limit")
        self._installed = self._shadow.installed()
        self._installed.__enter__()

    def _record(self, values: dict[str, Any]) -> None:
        with (self._folder / f"{os.getpid()}.jsonl").open("a") as file:
            print(json.dumps(values), file=file)

    def _lost(self, error: Exception) -> NoReturn:
        os.write(_terminal, f"\n{self._shadow.test}: {error}\n".encode())
        os._exit(DEAD_CONTEXT)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._shadow.test, self._shadow.mismatches = item.nodeid, []
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        result = yield
        if self._shadow.mismatches:
            text = "\n".join(self._shadow.mismatches)
            pytest.fail(f"GPU and simulator differ:\n{text}", pytrace=False)
        return result

    def pytest_sessionfinish(self) -> None:
        self._installed.__exit__(None, None, None)
        if self._worker:
            return
        summary = written(self._folder, self._config.getoption("--shadow-gpu").resolve())
        shutil.rmtree(self._folder)
        sys.stderr.write(summary)
