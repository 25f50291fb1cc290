"""The options that every simulated launch takes, and their checks."""

from __future__ import annotations

from typing import TypedDict

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
    return {
        "seed": seed,
        "completion": completion,
        "lane_order": lane_order,
        "checks": checks,
        "num_threads": num_threads,
        "num_sms": num_sms,
        "max_instructions": max_instructions,
        "non_portable_cluster": non_portable_cluster,
    }
