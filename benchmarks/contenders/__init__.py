"""The libraries that are measured. Each module lists its `CONTENDERS` and imports its library only
when a contender is used; if the library is absent, the results say so and the run goes on.

To add a peer, add a module here and its name to `PLUGINS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..cases import SUBJECT
from ..problems import Run

__all__ = ["PLUGINS", "SUBJECT", "Contender", "all_contenders", "contenders_for"]

PLUGINS = ("torchext_ops", "plain_torch", "cublaslt", "deepgemm", "torchao_float8")


@dataclass(frozen=True)
class Contender:
    """A library, or one of its variants, in one suite.

    name: the same in every suite. require: takes the device and returns the library's version, or
    raises an error that says why the library cannot run. prepare: takes a Problem and returns a
    Run, or raises UnsupportedError. compiles: True if first calls compile kernels, which may take
    minutes; such calls are made before the measurement.
    """

    name: str
    suite: str
    devices: tuple[str, ...]
    require: Callable[[str], str]
    prepare: Callable[[Any], Run]
    compiles: bool = False


def all_contenders() -> list[Contender]:
    return [
        contender
        for plugin in PLUGINS
        for contender in import_module(f"{__name__}.{plugin}").CONTENDERS
    ]


def contenders_for(device: str, names: list[str] | None = None) -> list[Contender]:
    """The contenders that run on `device`; with `names`, only those named and torchext.

    Raises ValueError for an unknown name.
    """
    everyone = all_contenders()
    known = sorted({contender.name for contender in everyone})
    for name in names or ():
        if name not in known:
            raise ValueError(
                f"benchmarks: --peers must be some of {', '.join(known)} (got {name!r})"
            )
    return [
        contender
        for contender in everyone
        if device in contender.devices and (names is None or contender.name in (SUBJECT, *names))
    ]
