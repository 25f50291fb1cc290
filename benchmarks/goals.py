"""The project's goals for speed, as data, and their verdicts: met, not met, or not measured.

A goal computes a figure for each case, from torchext's measurement and, if it compares, from a
peer's measurement of the same case. One statistic of these figures must satisfy a bound. A verdict
says how many of the goal's cases were measured. A CPU's goals are stated twice: for all threads,
and for one.
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
    subject: str = SUBJECT


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


def _weights(op: str, rows: range | tuple[int, ...]) -> Callable[[Case], bool]:
    """Products with M in `rows` and N, K >= 2048."""
    return lambda case: case.op == op and case.shape[0] in rows and min(case.shape[1:]) >= 2048


def _step(dtype: str) -> Callable[[Case], bool]:
    return lambda case: case.op == cases.FORWARD_BACKWARD and case.dtype == dtype


def _on_a_cpu(
    name: str,
    text: str,
    covers: Callable[[Case], bool],
    peer: str,
    at_least: float,
    *,
    subject: str = SUBJECT,
) -> Iterator[Goal]:
    """The worst case's speedup against `peer`, on all threads and on one."""
    for threads, where in ((0, "all threads"), (1, "one thread")):

        def covered(case: Case, threads: int = threads) -> bool:
            return case.threads == threads and covers(case)

        yield Goal(
            f"cpu_{name}_{where.replace(' ', '_')}",
            f"{text}, {where}",
            "cpu",
            covered,
            speedup,
            min,
            peer=peer,
            at_least=at_least,
            subject=subject,
        )


_MANY = range(cases.MANY_ROWS, 1 << 20)
CPU_GOALS = (
    *_on_a_cpu(
        "many_rows_vs_bf16", "fp8_gemm_nt, M >= 256, N, K >= 2048, against BF16 F.linear",
        _weights(cases.FPROP, _MANY), "bf16", 0.9,
    ),
    *_on_a_cpu(
        "many_rows_vs_fp32", "fp8_gemm_nt, M >= 256, N, K >= 2048, against FP32 F.linear",
        _weights(cases.FPROP, _MANY), "fp32", 2.0,
    ),
    *(
        goal
        for m, bound in zip(cases.FEW_ROWS, (2.0, 1.7, 1.5), strict=True)
        for goal in _on_a_cpu(
            f"m{m}",
            f"quantize_1x128 and fp8_gemm_nt, M = {m}, N, K >= 2048, against BF16 F.linear",
            _weights(cases.FPROP_BF16, (m,)), "bf16", bound,
        )
    ),
    *_on_a_cpu(
        "m1_1024", "quantize_1x128 and fp8_gemm_nt, 1 x 1024 x 1024, against BF16 F.linear",
        _is("gemm", cases.FPROP_BF16, shape=(1, 1024, 1024)), "bf16", 1.0,
    ),
    *(
        goal
        for m, bound in ((1, 2.0), (16, 1.5))
        for goal in _on_a_cpu(
            f"w8a16_m{m}", f"fp8_linear, M = {m}, N, K >= 2048, against BF16 F.linear",
            _weights(cases.FPROP_BF16, (m,)), "bf16", bound, subject="torchext_w8a16",
        )
    ),
    *(
        goal
        for dtype, peer, bound in (("float32", "fp32", 1.7), ("bfloat16", "bf16", 0.85))
        for goal in _on_a_cpu(
            f"linear_vs_{peer}",
            f"Linear forward + backward in {peer.upper()}, against nn.Linear in {peer.upper()}",
            _step(dtype), peer, bound,
        )
    ),
    *_on_a_cpu(
        "experts", "64 experts of 512 x 2048, 1 to 64 rows each, against a loop of BF16 F.linear",
        _is("grouped", cases.RAGGED), "bf16", 1.5,
    ),
    *(
        goal
        for ops in (("quantize_1x128",), ("quantize_128x128",), ("dequantize",),
                    ("quantize_1x128_dual", "quantize_128x128_dual"))
        for goal in _on_a_cpu(
            ops[0], f"{' and '.join(ops)}, 4096 x 7168, share of the speed of a copy",
            _is("quantize", *ops, shape=(4096, 7168)), "copy", 0.8,
        )
    ),
    *_on_a_cpu(
        "moe_permute_quantize",
        "moe_permute_quantize_1x128, 1024 x 7168, 8 choices, share of the speed of a copy",
        _is("moe", "moe_permute_quantize_1x128", shape=(1024, 7168)), "copy", 0.7,
    ),
    *_on_a_cpu(
        "moe_layer", "MoE forward + backward in BF16, against a loop over experts in BF16",
        _is("moe", cases.MOE_LAYER), "bf16", 1.3,
    ),
    *_on_a_cpu(
        "training_step", "a training step of the demo, against the FP32 step",
        _is("training", cases.STEP), "fp32", 1.15,
    ),
    Goal(
        "cpu_host_op", "fp8_gemm_nt, 16 x 16 x 128, microseconds, one thread", "cpu",
        _host("gemm"), host_microseconds, max, at_most=5.0,
    ),
    Goal(
        "cpu_host_linear_forward", "Linear forward, 16 x 16 x 128, microseconds, one thread", "cpu",
        _host("linear"), host_microseconds, max, at_most=20.0,
    ),
)  # fmt: skip

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
    *CPU_GOALS,
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
        subject, peer = records.get(goal.subject), records.get(goal.peer or goal.subject)
        if subject is None or peer is None:
            continue
        case = Case.from_dict({key: subject[key] for key in fields if key in subject})
        if not goal.covers(case):
            continue
        try:
            yield name, goal.figure(subject, peer, data["ceilings"])
        except KeyError:
            continue  # the record lacks this figure: there was no energy counter or no ceiling
