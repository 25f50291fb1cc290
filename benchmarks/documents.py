"""Writes the figures of docs/benchmarks.md, and docs/images/cpu_rows.svg, from the results of a run
on a CPU: `python -m benchmarks.documents FOLDER`.

The figures stand between two marks. The tests write them again from the results that they name.
"""

from __future__ import annotations

import argparse
import json
import re
from datetime import date
from pathlib import Path

from . import goals
from .report import ceilings_of, replace_between, roof_seconds, table

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- python -m benchmarks.documents: begin -->\n"
END = "<!-- python -m benchmarks.documents: end -->\n"
IMAGE = Path("docs/images/cpu_rows.svg")
DOCUMENT = Path("docs/benchmarks.md")


def block(data: dict, folder: str) -> str:
    """Returns the text between the marks. folder: that of the results, from the root."""
    image = Path("..") / IMAGE
    paragraphs = [
        measured_on(data, folder),
        f"![Time of a product by its number of rows]({image})",
        goals_table(data),
        roofline(data),
    ]
    return "\n\n".join(paragraphs) + "\n"


def measured_on(data: dict, folder: str) -> str:
    facts = data["environment"]
    day = date.fromisoformat(data["created"][:10])
    return (
        f"Measured by `make bench-cpu` on {facts['cpu_threads']} cores, {facts['cpu']}"
        f" ({facts['cpu_capability']}), torch {facts['torch']}, {day.day} {day:%B %Y}; all numbers"
        f" are in [{folder}](../{folder}/report.md). Figures are the other's time over"
        " torchext's, in the worst of the goal's cases."
    )


def goals_table(data: dict) -> str:
    """A row for each goal, with a column for all threads and one for one thread."""
    rows: dict[str, dict[str, dict]] = {}
    for goal in goals.evaluate(data):
        for where in ("all threads", "one thread"):
            if goal["text"].endswith(f", {where}"):
                text = goal["text"].removesuffix(f", {where}")
                rows.setdefault(text, {})[where] = goal
    header = ["", "goal", f"{data['environment']['cpu_threads']} threads", "1 thread"]

    def cell(goal: dict | None) -> str:
        if goal is None or goal["value"] is None:
            return "-"
        return f"{goal['value']:.2f}" + " (missed)" * (goal["verdict"] == "not met")

    return table(
        header,
        (
            (text, next(iter(of.values()))["bound"], cell(of.get("all threads")),
             cell(of.get("one thread")))
            for text, of in rows.items()
        ),
    )  # fmt: skip


def roofline(data: dict) -> str:
    """For the products of the plot: the share of the measured BF16 rate and of the copy bandwidth,
    and of the roof that the two make."""
    rows: list[tuple] = []
    for record in data["measurements"]:
        if record["model"] != "sweep" or record["status"] != "ok":
            continue
        if not record["contender"].startswith("torchext"):
            continue
        threads = record.get("threads", 0)
        ceilings = ceilings_of(data, threads)
        share = 1e3 * roof_seconds(record, ceilings) / record["milliseconds"]["median"]
        rows.append(
            (
                record["shape"][0],
                record["contender"],
                threads or data["environment"]["cpu_threads"],
                f"{100 * record['flops_per_s'] / ceilings['fp8_flops_per_s']:.0f} %",
                f"{100 * record['bytes_per_s'] / ceilings['copy_bytes_per_s']:.0f} %",
                f"{100 * share:.0f} %",
            )
        )
    rates = [
        f"{threads or data['environment']['cpu_threads']} threads:"
        f" {ceilings['gemm_flops_per_s'] / 1e9:.0f} GFLOPS and"
        f" {ceilings['copy_bytes_per_s'] / 1e9:.1f} GB/s"
        for threads, ceilings in ((0, ceilings_of(data, 0)), (1, ceilings_of(data, 1)))
    ]
    intro = (
        "Roofline of the plot's products: shares of the BF16 GEMM rate and of the bandwidth of a"
        f" copy that the same run measured ({'; '.join(rates)})."
    )
    header = ("M", "contender", "threads", "of the BF16 rate", "of a copy", "of the roof")
    rows.sort(key=lambda row: (-row[2], row[1], row[0]))
    return intro + "\n\n" + table(header, rows)


def with_block(text: str, content: str) -> str:
    """`text` with `content` between the marks."""
    return replace_between(text, BEGIN, END, content)


def named_folder(text: str) -> str | None:
    """The results that the document's block names."""
    match = re.search(
        r"\[(benchmarks/results/[^\]]+)\]", text.partition(BEGIN)[2].partition(END)[0]
    )
    return match[1] if match else None


def draw(data: dict, folder: str) -> None:
    import matplotlib

    from .plots import rows

    matplotlib.rcParams["svg.hashsalt"] = "torchext"  # the same file from the same data
    figure = rows(data)
    if figure is None:
        raise ValueError(f"documents: {folder} must have the sweep over M")
    figure.savefig(ROOT / IMAGE, metadata={"Source": folder, "Date": None})


def write(path: Path) -> None:
    """Writes the document's figures, and the plot, from the results in the folder `path`."""
    folder = path.relative_to(ROOT).as_posix()
    data = json.loads((path / "results.json").read_text())
    file = ROOT / DOCUMENT
    file.write_text(with_block(file.read_text(), block(data, folder)))
    draw(data, folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.documents", description=__doc__)
    parser.add_argument("folder", type=Path, help="below benchmarks/results, with results.json")
    write(parser.parse_args().folder.resolve())


if __name__ == "__main__":
    main()
