"""Writes the table of GPUs in docs/architectures.md from csrc/runtime/architectures.inc.

python tools/architecture_tables.py            writes the table
python tools/architecture_tables.py --check    fails if the document's table is not up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc" / "build"))

from architectures import ARCHITECTURES, PATHS  # noqa: E402

DOCUMENT = ROOT / "docs" / "architectures.md"
BEGIN = "<!-- tools/architecture_tables.py writes this table -->\n"
END = "<!-- end of the table -->\n"
INSTRUCTIONS = {
    "bf16_mma": "BF16 `mma`", "fp8_mma": "FP8 `mma`", "block_scaled_mma": "block-scaled `mma`",
    "tma": "TMA", "setmaxnreg": "`setmaxnreg`", "wgmma": "`wgmma`", "tcgen05": "`tcgen05`",
}  # fmt: skip
COLUMNS = (
    "capability", "for example", "path", "code of its GEMM kernels", "simulated",
    "shared memory, KiB per CTA", "multiply-adds per cycle per SM: FP8; FP16", "SMs", "MHz", "GB/s",
    "instructions",
)  # fmt: skip


def machine_code(capability: int) -> str:
    """Which compiled form of its path's kernels the GPU runs."""
    row = ARCHITECTURES[capability]
    path = PATHS[row.path]
    # Machine code also runs on later GPUs of the same major version; others compile the PTX.
    if path // 10 == capability // 10:
        return f"sm_{ARCHITECTURES[path].target}"
    return f"PTX of compute_{path}, compiled by the driver"


def cells(capability: int) -> list[str]:
    row = ARCHITECTURES[capability]
    clusters = [f"clusters of {row.ctas_per_cluster}"] if row.ctas_per_cluster else []
    instructions = [text for name, text in INSTRUCTIONS.items() if getattr(row, name)]
    rates = [f"{rate:,}" if rate else "-" for rate in (row.fp8_macs, row.fp16_macs)]
    return [
        f"{capability // 10}.{capability % 10}",
        row.product or "-",
        f"`{row.path}`",
        machine_code(capability),
        "yes" if row.mma_rounding else "no",
        str(row.shared_per_block >> 10),
        "; ".join(rates),
        str(row.sms or "-"),
        f"{row.mhz:,}" if row.mhz else "-",
        f"{row.gigabytes_per_second:,}" if row.gigabytes_per_second else "-",
        ", ".join([*clusters, *instructions]) or "FP16 `mma`",
    ]


def table() -> str:
    rows = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, ARCHITECTURES)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def with_table(document: str) -> str:
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{DOCUMENT.name} must contain the lines {BEGIN!r} and {END!r}")
    return before + begin + "\n" + table() + "\n" + end + after


def main(arguments: list[str]) -> int:
    document = DOCUMENT.read_text()
    current = with_table(document)
    if "--check" in arguments:
        if document != current:
            print(f"{DOCUMENT.name}: not up to date; run python tools/architecture_tables.py")
        return int(document != current)
    DOCUMENT.write_text(current)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
