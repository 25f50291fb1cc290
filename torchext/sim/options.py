"""The options that every simulated launch takes, and their checks."""

from __future__ import annotations

from typing import TypedDict

from torchext import _sim

COMPLETIONS = ("late", "eager", "random")
LANE_ORDERS = ("converged", "strict")


class LaunchOptions(TypedDict):
    """What torchext._sim reads from the options of a launch; `Module.launch` documents them."""

    seed: int
    completion: str
    lane_order: str
    checks: bool
    num_threads: int
    num_sms: int
    max_instructions: int
    non_portable_cluster: bool
    timing: str  # "": none
    timing_only: bool


def launch_options(
    where: str,
    *,
    seed: int,
    completion: str,
    lane_order: str = "converged",
    checks: bool = True,
    num_threads: int = 0,
    num_sms: int = 132,
    max_instructions: int = 20_000_000_000,
    non_portable_cluster: bool = False,
    timing: str | None = None,
    timing_only: bool = False,
) -> LaunchOptions:
    """The options as torchext._sim takes them.

    Raises ValueError for a value that is not allowed; the message starts with `where`.
    """
    for name, value, allowed in (
        ("completion", completion, COMPLETIONS),
        ("lane_order", lane_order, LANE_ORDERS),
    ):
        if value not in allowed:
            raise ValueError(f"{where}: {name} must be one of {', '.join(allowed)} (got {value!r})")
    for name, number, least in (
        ("seed", seed, 0),
        ("num_threads", num_threads, 0),
        ("num_sms", num_sms, 1),
        ("max_instructions", max_instructions, 1),
    ):
        if number < least:
            raise ValueError(f"{where}: {name} must be at least {least} (got {number})")
    gpus = tuple(row["name"] for row in _sim.timing_gpus())
    if timing is not None and timing not in gpus:
        raise ValueError(
            f"{where}: timing must be one of {', '.join(gpus)} (got {timing!r}); "
            "docs/timing.md lists the GPUs"
        )
    if timing_only and timing is None:
        raise ValueError(
            f"{where}: timing must name a GPU if timing_only is True (got None); "
            f'pass timing="{gpus[0]}"'
        )
    return {
        "seed": seed,
        "completion": completion,
        "lane_order": lane_order,
        "checks": checks and not timing_only,
        "num_threads": num_threads,
        "num_sms": num_sms,
        "max_instructions": max_instructions,
        "non_portable_cluster": non_portable_cluster,
        "timing": timing or "",
        "timing_only": timing_only,
    }
