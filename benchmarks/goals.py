"""The project's goals for speed, as data, and their verdicts: met, not met, or not measured.

A goal computes a figure for each case, from torchext's measurement and, if it compares, from a
peer's measurement of the same case. One statistic of these figures must satisfy a bound. A verdict
says how many of the goal's cases were measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import cases
from .cases import Case
from .contenders import SUBJECT

Figures = dict[str, float]


def speedup(subject: dict, peer: dict, ceilings: dict) -> float:
    return peer["milliseconds"]["median"] / subject["milliseconds"]["median"]


def energy_ratio(subject: dict, peer: dict, ceilings: dict) -> float:
    return subject["joules"] / peer["joules"]


def share_of_fp8_rate(subject: dict, peer: dict, ceilings: dict) -> float:
    return subject["flops_per_s"] / ceilings["fp8_flops_per_s"]


def host_microseconds(subject: dict, peer: dict, ceilings: dict) -> float:
    return subject["host_microseconds"]


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


@dataclass(frozen=True)
class Goal:
    """The statistic of `figure`, over the cases that `covers` accepts, must satisfy the bound
    `at_least` or `at_most`."""

    name: str
    text: str
    device: str
    covers: Callable[[Case], bool]
    figure: Callable[[dict, dict, dict], float]  # takes torchext's record, the peer's, ceilings
    statistic: Callable[[list[float]], float]
    peer: str | None = None
    at_least: float | None = None
    at_most: float | None = None


def _deepseek(op: str, rows: range = range(1, 1 << 20)) -> Callable[[Case], bool]:
    return lambda case: case.model == "deepseek-v3" and case.op == op and case.shape[0] in rows


def _large(case: Case) -> bool:
    """Whether an fprop is clearly compute bound: at least 1,000 FLOP for each byte moved (FP8 in,
    BF16 out)."""
    if case.op != cases.FPROP:
        return False
    m, n, k = case.shape
    return 2 * m * n * k >= 1000 * (m * k + n * k + 2 * m * n)


def _is(suite: str, *ops: str, shape: tuple[int, ...] | None = None) -> Callable[[Case], bool]:
    return lambda case: (
        case.suite == suite and case.op in ops and (shape is None or case.shape == shape)
    )


def _host(suite: str) -> Callable[[Case], bool]:
    return lambda case: case.suite == suite and case.host


GOALS = (
    Goal(
        "fprop_vs_deepgemm",
        "fprop at the DeepSeek-V3 shapes, geometric mean, against DeepGEMM",
        "cuda",
        _deepseek(cases.FPROP),
        speedup,
        geometric_mean,
        peer="deepgemm",
        at_least=1.05,
    ),
    Goal(
        "fprop_vs_deepgemm_worst",
        "fprop at the DeepSeek-V3 shapes, the worst one, against DeepGEMM",
        "cuda",
        _deepseek(cases.FPROP),
        speedup,
        min,
        peer="deepgemm",
        at_least=0.97,
    ),
    Goal(
        "fprop_small_m_vs_deepgemm",
        "fprop at the DeepSeek-V3 shapes with M <= 64, geometric mean, against DeepGEMM",
        "cuda",
        _deepseek(cases.FPROP, range(1, 65)),
        speedup,
        geometric_mean,
        peer="deepgemm",
        at_least=1.3,
    ),
    Goal(
        "wgrad_vs_deepgemm",
        "wgrad added to FP32 at the DeepSeek-V3 shapes, geometric mean, against DeepGEMM",
        "cuda",
        _deepseek(cases.WGRAD_ACCUMULATE),
        speedup,
        geometric_mean,
        peer="deepgemm",
        at_least=1.1,
    ),
    Goal(
        "grouped_vs_deepgemm",
        "grouped GEMMs, geometric mean, against DeepGEMM",
        "cuda",
        lambda case: case.suite == "grouped" and case.model == "deepseek-v3",
        speedup,
        geometric_mean,
        peer="deepgemm",
        at_least=1.1,
    ),
    Goal(
        "blockwise_vs_cublaslt",
        "fprop and wgrad, every shape, against cuBLASLt's blockwise F.scaled_mm",
        "cuda",
        _is("gemm", cases.FPROP, cases.WGRAD),
        speedup,
        min,
        peer="cublaslt",
        at_least=1.0,
    ),
    Goal(
        "large_share_of_peak",
        "arithmetic-bound fprop, the worst shape, share of twice the measured BF16 GEMM rate",
        "cuda",
        _large,
        share_of_fp8_rate,
        min,
        at_least=0.75,
    ),
    Goal(
        "linear_vs_bf16",
        "Linear forward + backward, the worst DeepSeek-V3 shape with M >= 4096, against BF16",
        "cuda",
        _deepseek(cases.FORWARD_BACKWARD, range(4096, 1 << 20)),
        speedup,
        min,
        peer="bf16",
        at_least=1.35,
    ),
    Goal(
        "host_op",
        "host time of an op call in microseconds, the slowest",
        "cuda",
        lambda case: case.host and case.suite != "linear",
        host_microseconds,
        max,
        at_most=8.0,
    ),
    Goal(
        "host_linear_forward",
        "host time of a Linear forward in microseconds",
        "cuda",
        _host("linear"),
        host_microseconds,
        max,
        at_most=25.0,
    ),
    *(
        Goal(
            f"energy_vs_{peer}",
            f"joules of an fprop, the worst shape, relative to {peer}'s",
            "cuda",
            lambda case: case.energy,
            energy_ratio,
            max,
            peer=peer,
            at_most=1.0,
        )
        for peer in ("deepgemm", "cublaslt")
    ),
    Goal(
        "cpu_quantize",
        "quantize_1x128 of 4096 x 7168 on a CPU against plain PyTorch",
        "cpu",
        _is("quantize", "quantize_1x128", shape=(4096, 7168)),
        speedup,
        min,
        peer="plain",
        at_least=5.0,
    ),
    Goal(
        "cpu_linear",
        "Linear forward + backward at 1024^3 on a CPU against FP32 nn.Linear",
        "cpu",
        _is("linear", cases.FORWARD_BACKWARD, shape=(1024, 1024, 1024)),
        speedup,
        min,
        peer="fp32",
        at_least=0.5,
    ),
)


def evaluate(data: dict) -> list[dict]:
    """The verdict on every goal of the device that `data` (results.json) was measured on."""
    return [
        verdict(goal, data) for goal in GOALS if goal.device == data["environment"].get("device")
    ]


def verdict(goal: Goal, data: dict) -> dict:
    """The goal's verdict. `value`: the statistic over the cases that were measured. `measured`,
    `of`: how many cases were measured, and how many the goal covers. `at`: the case that has the
    minimum or maximum."""
    table = cases.cuda_cases() if goal.device == "cuda" else cases.cpu_cases()
    bound = f">= {goal.at_least:g}" if goal.at_least is not None else f"<= {goal.at_most:g}"
    figures = dict(_figures(goal, data))
    answer = {
        "goal": goal.name,
        "text": goal.text,
        "bound": bound,
        "verdict": "not measured",
        "value": None,
        "measured": len(figures),
        "of": sum(goal.covers(case) for case in table),
        "at": None,
    }
    if not figures:
        return answer
    value = goal.statistic(list(figures.values()))
    met = value >= goal.at_least if goal.at_least is not None else value <= (goal.at_most or 0)
    at = next((case for case, figure in figures.items() if figure == value), None)
    return answer | {"verdict": "met" if met else "not met", "value": value, "at": at}


def _figures(goal: Goal, data: dict) -> Iterator[tuple[str, float]]:
    by_case: dict[str, dict[str, dict]] = {}
    for record in data["measurements"]:
        if record["status"] == "ok":
            by_case.setdefault(record["case"], {})[record["contender"]] = record
    fields = Case.__dataclass_fields__
    for name, records in by_case.items():
        subject, peer = records.get(SUBJECT), records.get(goal.peer or SUBJECT)
        if subject is None or peer is None:
            continue
        case = Case.from_dict({key: subject[key] for key in fields})
        if not goal.covers(case):
            continue
        try:
            yield name, goal.figure(subject, peer, data["ceilings"])
        except KeyError:
            continue  # the record lacks this figure: there was no energy counter or no ceiling
