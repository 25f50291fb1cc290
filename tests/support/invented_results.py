"""Invented results.json, for the tests of goals, reports and documents."""

from __future__ import annotations

from benchmarks.cases import Case, cpu_cases


def record(case: Case, contender: str, milliseconds: float, **more: object) -> dict:
    flops = 2.0 * case.shape[0] * case.shape[1] * case.shape[-1]
    return {
        **case.as_dict(),
        "case": case.name,
        "contender": contender,
        "status": "ok",
        "error": {"relative": 1e-3, "worst": 1e-2},
        "milliseconds": {"median": milliseconds, "p20": 1.0, "p80": 1.0, "samples": 9},
        "flops_per_s": flops / milliseconds * 1e3 if case.suite != "quantize" else None,
        "bytes_per_s": 1e12 if case.suite != "linear" else None,
        **more,
    }


def results(measurements: list[dict], device: str = "cuda") -> dict:
    return {
        "schema": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "environment": {"device": device, "gpu": {"name": "Fake GPU"}},
        "ceilings": {
            "copy_bytes_per_s": 4e12,
            "gemm_flops_per_s": 8e14,
            "gemm_dtype": "bfloat16",
            "fp8_flops_per_s": 1.6e15,
        },
        "contenders": [{"name": "torchext", "suite": "gemm", "version": "1"}],
        "measurements": measurements,
    }


def cpu_results(ours: float, theirs: float) -> dict:
    """As `everything`, on a CPU: half of the speed on one thread."""
    rows = []
    for case in cpu_cases():
        slower = 2.0 if case.threads == 1 else 1.0
        host = {"host_microseconds": 4.0 * ours} if case.host else {}
        rows.append(record(case, "torchext", slower * ours, **host))
        for name in case.peers:
            milliseconds = ours if name == "torchext_w8a16" else theirs
            rows.append(record(case, name, slower * milliseconds, **host))
    data = results(rows, "cpu")
    data["environment"] = {"device": "cpu", "cpu": "Fake CPU", "cpu_threads": 2}
    one = {key: 0.5 * rate for key, rate in data["ceilings"].items() if key != "gemm_dtype"}
    data["ceilings"]["one_thread"] = one | {"gemm_dtype": "bfloat16"}
    return data
