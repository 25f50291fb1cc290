"""Who is measured. Each module is a plug-in: it lists `CONTENDERS`, and imports what it needs only
when asked, so that an absent package costs nothing but a line in the results.

To add a peer, add a module here and its name to `PLUGINS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..problems import Run

PLUGINS = ("torchext_ops", "plain_torch", "cublaslt", "deepgemm", "torchao_float8")
SUBJECT = "torchext"  # the contender that the others are compared with


@dataclass(frozen=True)
class Contender:
    """name: the same work by the same library has the same name in every suite.

    require: given the device, returns the version of what will run, or raises with the reason why
    it cannot. prepare: given a Problem, returns a Run, or raises UnsupportedError. compiles: its
    first calls compile kernels, so they are worth making ahead of time and may take minutes.
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
    """Those that run on `device`; with `names`, of those only the named ones and the subject."""
    everyone = all_contenders()
    known = sorted({contender.name for contender in everyone})
    for name in names or ():
        if name not in known:
            raise ValueError(f"--peers: expected some of {', '.join(known)}, got {name!r}")
    return [
        contender
        for contender in everyone
        if device in contender.devices and (names is None or contender.name in (SUBJECT, *names))
    ]
