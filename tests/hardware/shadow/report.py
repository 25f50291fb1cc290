"""The report of a shadowed test run: python -m tests.hardware.shadow.report PARTS FILE"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GOOD = ("same", "skipped", "known")


def written(parts: Path, file: Path) -> str:
    """Joins the records in the folder `parts`: writes FILE and FILE.jsonl, returns the summary."""
    lines = [line for part in sorted(parts.glob("*.jsonl")) for line in part.open()]
    file.with_name(f"{file.name}.jsonl").write_text("".join(lines))
    summary, text = rendered(json.loads(line) for line in lines)
    file.write_text(text)
    return summary


def rendered(records: Iterable[dict[str, Any]]) -> tuple[str, str]:
    """(summary, whole report)."""
    records = list(records)
    statuses = Counter(r["status"] for r in records)
    reasons = {
        status: Counter(r["reason"] for r in records if r["status"] == status)
        for status in ("skipped", "known")
    }
    counts: Counter[str] = Counter()
    errors: dict[str, tuple[float, float]] = {}
    for r in records:
        counts.update(r.get("counts", {}))
        for function, (error, limit) in r.get("errors", {}).items():
            errors[function] = (max(error, errors.get(function, (0.0, 0.0))[0]), limit)
    summary = ["launches: " + ", ".join(f"{n} {s}" for s, n in statuses.most_common())]
    summary += [
        f"  {status} {n}: {reason}"
        for status, counter in reasons.items()
        for reason, n in counter.most_common()
    ]
    summary += [f"  elements {n}: {what}" for what, n in counts.most_common()]
    summary += [
        f"  {function}: differs from the simulator by up to {error:.3g} (documented: {limit:.3g})"
        for function, (error, limit) in sorted(errors.items())
    ]
    body: list[str] = []
    seen: Counter[str] = Counter()
    for r in sorted(records, key=lambda r: (r["status"], r["test"])):
        if r["status"] in GOOD:
            continue
        seen[r["test"]] += 1
        if seen[r["test"]] > 3:  # the others are in the .jsonl file
            continue
        code = "\n".join(f"    | {line}" for line in r.get("code", [])[:14])
        reason = "\n".join(f"  {line}" for line in r["reason"].splitlines())
        body.append(f"{r['status'].upper()} {r['test']} ({r['target']})\n{reason}\n{code}\n")
    head = "\n".join(summary) + "\n"
    return head, head + "\n" + "\n".join(body)


if __name__ == "__main__":
    print(written(Path(sys.argv[1]), Path(sys.argv[2])))
