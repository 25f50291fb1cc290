"""Decorators of DeepGEMM's test scripts, and the architecture whose interface this is."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

Function = Callable[..., None]


def get_arch_major() -> int:
    """9, on any device: the interface here is DeepGEMM's for Hopper, and scripts choose by it."""
    return 9


def test_filter(condition: Callable[[], bool]) -> Callable[[Function], Function]:
    """Decorates a function that runs only if `condition()`, and says so if it does not."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> None:
            if condition():
                function(*args, **kwargs)
            else:
                print(f"{function.__name__}: left out, by its filter")

        return call

    return decorate


test_filter.__test__ = False  # type: ignore[attr-defined]  # its name makes pytest collect it


def ignore_env(name: str, condition: Callable[[], bool]) -> Callable[[Function], Function]:
    """Decorates a function that runs without environment variable `name` if `condition()`."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> None:
            value = os.environ.pop(name, None) if condition() else None
            try:
                function(*args, **kwargs)
            finally:
                if value is not None:
                    os.environ[name] = value

        return call

    return decorate
