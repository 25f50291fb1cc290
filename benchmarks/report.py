"""Writes report.md, the tables for people, from results.json. `python -m benchmarks.report FOLDER`
writes it and the plots again."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from . import goals
from .cases import Case
from .contenders import SUBJECT

SECTIONS = (
    "gemm",
    "grouped",
    "fused",
    "linear",
    "training",
    "quantize",
    "activation",
    "norm",
    "moe",
)


def markdown(data: dict) -> str:
    sections = [
        "# torchext: benchmark results",
        _environment(data),
        _stages(data),
        _goals(data),
        _tests(data),
        _sanitizer(data),
        _soak(data),
        *(_suite(data, suite) for suite in SECTIONS),
        _roofline(data),
        _scaling(data),
        _host(data),
        _energy(data),
        _failures(data),
        _contenders(data),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def table(header: Iterable[str], rows: Iterable[Iterable[object]], numeric_from: int = 1) -> str:
    """A Markdown table. Columns from index `numeric_from` on are aligned right."""
    header = list(header)
    rule = [":--" if i < numeric_from else "--:" for i in range(len(header))]
    lines = [header, rule, *(["" if cell is None else str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def replace_between(text: str, begin: str, end: str, content: str) -> str:
    """`text` with `content` in place of what stands between the marks `begin` and `end`.

    Raises ValueError: a mark is missing.
    """
    before, _, rest = text.partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"report: text must contain {begin.strip()} and {end.strip()}")
    return before + begin + content + end + after


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _environment(data: dict) -> str:
    facts = dict(data["environment"])
    gpu = facts.pop("gpu", None) or {}
    rows = [(key, value) for key, value in facts.items() if value is not None]
    rows += [(f"gpu: {key}", value) for key, value in gpu.items()]
    if "reason" in data["ceilings"]:
        rows.append(("ceilings", data["ceilings"]["reason"]))
    for threads, where in ((0, ""), (1, ", one thread")):
        ceilings = ceilings_of(data, threads)
        if "copy_bytes_per_s" in ceilings:
            rows += [
                (
                    f"measured copy bandwidth{where}",
                    f"{ceilings['copy_bytes_per_s'] / 1e9:.0f} GB/s",
                ),
                (
                    f"measured {ceilings['gemm_dtype']} GEMM rate{where}",
                    f"{ceilings['gemm_flops_per_s'] / 1e12:.2f} TFLOPS",
                ),
            ]
    rows.append(("created", data["created"]))
    return "## Measured on\n\n" + table(("what", "value"), rows, numeric_from=2)


def ceilings_of(data: dict, threads: int) -> dict:
    """The ceilings that a case with `threads` threads (0: all) is compared with; {} if there are
    none."""
    ceilings = data["ceilings"]
    return ceilings.get("one_thread", {}) if threads == 1 else ceilings


def _stages(data: dict) -> str:
    if not data.get("stages"):
        return ""
    rows = [
        (stage["name"], stage["status"], f"{stage['seconds']:.0f}", stage.get("reason", ""))
        for stage in data["stages"]
    ]
    return "## Stages\n\n" + table(("stage", "status", "s", "reason"), rows, numeric_from=4)


def _goals(data: dict) -> str:
    verdicts = goals.evaluate(data)
    if not verdicts:
        return ""
    rows = [
        (
            goal["text"],
            goal["bound"],
            "-" if goal["value"] is None else f"{goal['value']:.3f}",
            goal["verdict"],
            f"{goal['measured']} of {goal['of']}",
            goal["at"] or "",
        )
        for goal in verdicts
    ]
    header = ("goal", "bound", "measured", "verdict", "cases", "decided by")
    return "## Goals\n\n" + table(header, rows)


def _tests(data: dict) -> str:
    tests = data.get("tests")
    if not tests:
        return ""
    counts = ", ".join(f"{count} {outcome}" for outcome, count in tests["counts"].items())
    rows = [(bad["test"], bad["outcome"], bad["message"]) for bad in tests["failures"]]
    header = ("test", "outcome", "message")
    parts = [counts, table(header, rows, numeric_from=3) if rows else "None failed."]
    if not_run := tests.get("not_run"):
        left = Counter((test["test"].partition("::")[0], test["message"]) for test in not_run)
        whole = {test["test"] for test in not_run if "::" not in test["test"]}
        listed = [(f, why, "all" if f in whole else count) for (f, why), count in left.items()]
        parts += ["Not run:", table(("file", "reason", "tests"), listed, numeric_from=2)]
    return "## Tests\n\n" + "\n\n".join(parts)


def _sanitizer(data: dict) -> str:
    runs = data.get("sanitizer")
    if not runs:
        return ""
    rows = [
        (run["tool"], run["status"], run["calls"], f"{run['seconds']:.0f}", run["summary"])
        for run in runs
    ]
    header = ("tool", "status", "calls that were right", "s", "summary")
    return "## compute-sanitizer\n\n" + table(header, rows, numeric_from=5)


def _soak(data: dict) -> str:
    soak = data.get("soak")
    return f"## Soak\n\n{soak['summary']}" if soak else ""


def _suite(data: dict, suite: str) -> str:
    records = [r for r in data["measurements"] if r["suite"] == suite]
    if not any(r["status"] == "ok" for r in records):
        return ""
    present = {r["contender"] for r in records if r["status"] == "ok"}
    names = sorted(present, key=lambda name: (name != SUBJECT, name))
    others = [name for name in names if name != SUBJECT]
    by_case: dict[str, dict[str, dict]] = {}
    for record in records:
        by_case.setdefault(record["case"], {})[record["contender"]] = record
    header = ["case", *(f"{name}, us" for name in names)]
    header += [f"{SUBJECT} against {name}" for name in others]
    of_rate = (
        "share of BF16 rate" if data["environment"].get("device") == "cpu" else "share of FP8 rate"
    )
    compute = suite not in ("quantize", "training")
    header += ["TFLOPS", of_rate] if compute else []
    memory = suite not in ("linear", "training")
    header += ["GB/s", "share of copy"] if memory else []
    rows = []
    for case in sorted(by_case, key=_case_order):
        group = by_case[case]
        if not any(record["status"] == "ok" for record in group.values()):
            continue
        subject = _ok(group.get(SUBJECT))
        row = [case.removeprefix(f"{suite}/")]
        row += [_microseconds(group.get(name)) for name in names]
        row += [_ratio(_ok(group.get(name)), subject) for name in others]
        ceilings = ceilings_of(data, next(iter(group.values())).get("threads", 0))
        if compute:
            row.append(_scaled(subject, "flops_per_s", 1e12))
            row.append(_share(subject, "flops_per_s", ceilings.get("fp8_flops_per_s")))
        if memory:
            row.append(_scaled(subject, "bytes_per_s", 1e9))
            row.append(_share(subject, "bytes_per_s", ceilings.get("copy_bytes_per_s")))
        rows.append(row)
    note = (
        f"Medians. Ratios are the other's time over {SUBJECT}'s: above 1, {SUBJECT} is faster."
        f" TFLOPS, GB/s and shares are {SUBJECT}'s."
    )
    return f"## {suite}\n\n{note}\n\n" + table(header, rows)


def roof_seconds(record: dict, ceilings: dict) -> float:
    """The least seconds that the two ceilings allow for a measurement's work: its FLOP at the
    BF16 rate (twice that on a GPU), or its least bytes at the bandwidth of a copy."""
    seconds = record["milliseconds"]["median"] / 1e3
    flops = record["flops_per_s"] * seconds
    moved = record["bytes_per_s"] * seconds
    return max(flops / ceilings["fp8_flops_per_s"], moved / ceilings["copy_bytes_per_s"])


def _roofline(data: dict) -> str:
    """On a CPU: how much of the roofline each product reaches."""
    if data["environment"].get("device") != "cpu":
        return ""
    rows = []
    for record in sorted(data["measurements"], key=lambda r: _case_order(r["case"])):
        ceilings = ceilings_of(data, record.get("threads", 0))
        whole = record.get("flops_per_s") and record.get("bytes_per_s")
        ours = record["contender"].startswith(SUBJECT)
        if not (ours and whole and "fp8_flops_per_s" in ceilings):
            continue
        intensity = record["flops_per_s"] / record["bytes_per_s"]
        ridge = ceilings["fp8_flops_per_s"] / ceilings["copy_bytes_per_s"]
        share = 1e3 * roof_seconds(record, ceilings) / record["milliseconds"]["median"]
        bound = "arithmetic" if intensity > ridge else "memory"
        rows.append(
            (record["case"], record["contender"], f"{intensity:.1f}", bound, f"{100 * share:.0f} %")
        )
    if not rows:
        return ""
    note = (
        "The roof is the measured BF16 GEMM rate, or the measured copy bandwidth times FLOP per"
        " byte, on as many threads as the case. Work that only reads may exceed the bandwidth of a"
        " copy; work whose operands stay in the cache exceeds it by far."
    )
    header = ("case", "contender", "FLOP/byte", "bound by", "share of the roof")
    return f"## Roofline\n\n{note}\n\n" + table(header, rows, numeric_from=2)


def _scaling(data: dict) -> str:
    """Speedup of all threads over one, for every case that was measured with both."""
    medians: dict[tuple[str, str], dict[int, float]] = {}
    for record in data["measurements"]:
        if record["status"] == "ok":
            fields = {k: record[k] for k in Case.__dataclass_fields__ if k in record}
            key = (Case.from_dict(fields | {"threads": 0}).name, record["contender"])
            of_threads = medians.setdefault(key, {})
            of_threads[record.get("threads", 0)] = record["milliseconds"]["median"]
    threads = data["environment"].get("cpu_threads")
    rows = [
        (case, contender, f"{of[1]:.3f}", f"{of[0]:.3f}", f"{of[1] / of[0]:.2f}")
        for (case, contender), of in sorted(
            medians.items(), key=lambda item: _case_order(item[0][0])
        )
        if {0, 1} <= of.keys()
    ]
    header = ("case", "contender", "1 thread, ms", f"{threads} threads, ms", "speedup")
    return "## Scaling\n\n" + table(header, rows, numeric_from=2) if rows else ""


def _case_order(case: str) -> tuple:
    *names, shape = case.split("/")
    return tuple(names), tuple(int(size) for size in shape.split("x"))[::-1]


def _ok(record: dict | None) -> dict | None:
    return record if record and record["status"] == "ok" else None


def _microseconds(record: dict | None) -> str:
    if record is None:
        return "-"
    if record["status"] != "ok":
        return record["status"]
    return f"{1e3 * record['milliseconds']['median']:.1f}"


def _ratio(other: dict | None, subject: dict | None) -> str:
    if not other or not subject:
        return "-"
    return f"{other['milliseconds']['median'] / subject['milliseconds']['median']:.2f}"


def _scaled(record: dict | None, key: str, unit: float) -> str:
    return f"{record[key] / unit:.1f}" if record and record[key] else "-"


def _share(record: dict | None, key: str, ceiling: float | None) -> str:
    return f"{100 * record[key] / ceiling:.0f} %" if record and record[key] and ceiling else "-"


def _host(data: dict) -> str:
    rows = [
        (record["case"], record["contender"], f"{record['host_microseconds']:.1f}")
        for record in data["measurements"]
        if "host_microseconds" in record
    ]
    header = ("case", "contender", "us")
    return "## Host time of a call, us\n\n" + table(header, rows, numeric_from=2) if rows else ""


def _energy(data: dict) -> str:
    rows = [
        (record["case"], record["contender"], f"{record['joules']:.4f}")
        for record in data["measurements"]
        if "joules" in record
    ]
    header = ("case", "contender", "J")
    return "## Energy, J a call\n\n" + table(header, rows, numeric_from=2) if rows else ""


def _failures(data: dict) -> str:
    """Measurements that failed or were skipped; for those that ran out of time, only a count."""
    rows = [
        (record["case"], record["contender"], record["status"], record["reason"])
        for record in data["measurements"]
        if record["status"] != "ok" and "budget" not in record["reason"]
    ]
    rows += [("", "", "failed", reason) for reason in data.get("failures", [])]
    late = sum("budget" in record.get("reason", "") for record in data["measurements"])
    parts = []
    if rows:
        header = ("case", "contender", "status", "reason")
        parts.append(table(header, rows, numeric_from=4))
    if late:
        parts.append(f"{late} measurements were skipped because time ran out.")
    return "## Not measured\n\n" + "\n\n".join(parts) if parts else ""


def _contenders(data: dict) -> str:
    rows = [
        (known["suite"], known["name"], known.get("version", ""), known.get("reason", ""))
        for known in data["contenders"]
    ]
    if not rows:
        return ""
    header = ("suite", "contender", "version", "not run, because")
    return "## Contenders\n\n" + table(header, rows, numeric_from=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds results.json")
    folder = parser.parse_args().folder
    data = json.loads((folder / "results.json").read_text())
    (folder / "report.md").write_text(markdown(data))
    try:
        from .plots import draw
    except ImportError as error:
        print(f"no plots: {error}")
        return
    for path in draw(data, folder):
        print(path.name)


if __name__ == "__main__":
    main()
