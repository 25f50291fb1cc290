"""Command line of the benchmarks; docs/benchmarks.md explains every option."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

from . import goals
from .cases import SUITES, select
from .contenders import contenders_for
from .environment import describe, slug
from .report import markdown
from .results import Results
from .runner import Runner, subject_ok, warm_up

ROUNDS = {"cpu": 25, "cuda": 30}
QUICK_ROUNDS = 3


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda, if there is one")
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument(
        "--shapes", nargs="+", default=[], help="MxNxK, or models: deepseek-v3, llama-3-70b, ..."
    )
    parser.add_argument("--peers", nargs="*", help="measure only these beside torchext")
    parser.add_argument("--quick", action="store_true", help="the most important cases, few rounds")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/<date>-<hardware>-torch-<version>"
    )
    parser.add_argument(
        "--documents", action="store_true", help="then write the documents' figures (CPU)"
    )
    parser.add_argument("--warm-up", type=int, metavar="JOBS", help="only let peers compile")
    return parser.parse_args(arguments)


def default_folder(environment: dict) -> Path:
    name = (environment.get("gpu") or {}).get("name") or environment["cpu"]
    version = environment["torch"].partition("+")[0]
    return Path("benchmarks/results") / f"{date.today()}-{slug(name)}-torch-{version}"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: torchext ran with no failed or wrong case. 1: it did not. 2: nothing ran."""
    options = parse(arguments)
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        cases = select(options.device, options.suite, options.shapes, options.quick)
        contenders_for(options.device, options.peers)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    environment = describe(options.device)
    if "reason" in environment.get("gpu", {}):
        print(f"benchmarks: --device cuda: {environment['gpu']['reason']}", file=sys.stderr)
        return 2
    out = options.out or default_folder(environment)
    out.mkdir(parents=True, exist_ok=True)
    log = out / "benchmarks.log"
    if options.warm_up:
        warm_up(
            options.warm_up,
            options.device,
            cases,
            log,
            peers=options.peers,
            budget_s=options.budget,
        )
        return 0
    results = Results.open(out / "results.json") if options.out else Results(out / "results.json")
    results.data["environment"] = environment | results.data["environment"]
    rounds = QUICK_ROUNDS if options.quick else ROUNDS[options.device]
    runner = Runner(
        results,
        options.device,
        cases,
        log,
        peers=options.peers,
        rounds=rounds,
        budget_s=options.budget,
        progress=lambda line: print(line, flush=True),
    )
    runner.run()
    results.data["goals"] = goals.evaluate(results.data)
    results.write()
    (out / "report.md").write_text(markdown(json.loads(results.path.read_text())))
    subprocess.run([sys.executable, "-m", "benchmarks.report", str(out)], check=False)
    for goal in results.data["goals"]:
        value = "" if goal["value"] is None else f" {goal['value']:.3f} ({goal['bound']})"
        print(f"{goal['verdict']:>13}: {goal['text']}{value}")
    if options.documents:
        from .documents import write

        write(out.resolve())
    print(f"results: {out}")
    return 0 if subject_ok(results) else 1


if __name__ == "__main__":
    sys.exit(main())
