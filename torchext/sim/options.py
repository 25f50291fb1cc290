"""Options that every simulated launch takes, checked."""

from __future__ import annotations

from typing import Any

COMPLETIONS = ("late", "eager", "random")
LANE_ORDERS = ("converged", "strict")


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
) -> dict[str, Any]:
    """The options as torchext._sim takes them; raises ValueError in the name of `where`."""
    for name, value, allowed in (
        ("completion", completion, COMPLETIONS),
        ("lane_order", lane_order, LANE_ORDERS),
    ):
        if value not in allowed:
            raise ValueError(f"{where}: {name} must be one of {', '.join(allowed)}; got {value!r}")
    for name, number, least in (
        ("seed", seed, 0),
        ("num_threads", num_threads, 0),
        ("num_sms", num_sms, 1),
        ("max_instructions", max_instructions, 1),
    ):
        if number < least:
            raise ValueError(f"{where}: {name} must be at least {least}; got {number}")
    return {
        "seed": seed,
        "completion": completion,
        "lane_order": lane_order,
        "checks": checks,
        "num_threads": num_threads,
        "num_sms": num_sms,
        "max_instructions": max_instructions,
    }
