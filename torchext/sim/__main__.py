"""`python -m torchext.sim`: compile a CUDA file, list its kernels, launch one under the checker.

Exit status: 0 if there are no errors (notes do not count), 1 if there are errors or outputs that
depend on the schedule, 2 if nothing could be run: a compiler error, malformed PTX, or an invalid
launch specification.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import spec as spec_module
from .compiler import CompileError, compile_cuda
from .module import Module
from .report import Report
from .spec import LaunchSpec, load_spec


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torchext.sim",
        description="Compiles a CUDA file and lists its kernels, or runs one on the PTX simulator.",
        epilog=spec_module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="a .cu, .ptx or .ptx.gz file")
    parser.add_argument(
        "--launch", type=Path, metavar="SPEC", help="run the launch that this TOML file describes"
    )
    parser.add_argument(
        "--arch", default="90a", help="compile a .cu file for compute_ARCH (%(default)s)"
    )
    parser.add_argument(
        "--format",
        choices=("text", "json"),
        default="text",
        help="format of the output (%(default)s)",
    )
    parser.add_argument(
        "--keep-ptx", type=Path, metavar="FILE", help="write the PTX of a .cu file here"
    )
    parser.add_argument(
        "--timing", metavar="GPU", help="predict the launch's time on this GPU (docs/timing.md)"
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write the predicted timeline here, for ui.perfetto.dev (needs --timing)",
    )
    parser.add_argument(
        "-I",
        "--include",
        action="append",
        default=[],
        metavar="DIR",
        help="include path for a .cu file",
    )
    parser.add_argument(
        "--nvcc-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="nvcc option for a .cu file",
    )
    return parser


def _load(options: argparse.Namespace) -> Module:
    if options.source.name.endswith((".ptx", ".ptx.gz")):
        return Module(options.source)
    includes = [f"-I{folder}" for folder in options.include]
    return compile_cuda(
        options.source,
        arch=options.arch,
        options=[*includes, *options.nvcc_option],
        keep=options.keep_ptx,
    )


def _list(module: Module) -> tuple[dict[str, Any], int]:
    """All kernels with their parameters. The status is 2 if one has an unknown instruction."""
    kernels = []
    for kernel in module.kernels():
        error = None
        try:
            module.check(kernel.name)
        except ValueError as refusal:
            error = str(refusal)
        kernels.append({**asdict(kernel), "signature": kernel.signature, "error": error})
    status = 0 if kernels and all(kernel["error"] is None for kernel in kernels) else 2
    return {"target": module.target, "kernels": kernels}, status


def _print_list(listing: dict[str, Any]) -> None:
    kernels = listing["kernels"]
    print(f"{listing['target']}: {len(kernels)} kernel{'' if len(kernels) == 1 else 's'}")
    for kernel in kernels:
        print(f"\n{kernel['signature']}")
        if kernel["signature"] != kernel["name"]:
            print(f"    symbol: {kernel['name']}")
        for parameter in kernel["parameters"]:
            what = "a pointer" if parameter["is_pointer"] else parameter["type"]
            what = "a struct or array" if parameter["is_array"] else what
            print(
                f"    {parameter['name']}: {parameter['size']} bytes, aligned to "
                f"{parameter['alignment']} ({what})"
            )
        for name, key in (
            ("threads at most", "max_threads"),
            ("threads", "required_threads"),
            ("cluster", "cluster"),
        ):
            if any(kernel[key]):
                print(f"    {name}: {' x '.join(map(str, kernel[key]))}")
        if kernel["error"] is not None:
            print(f"    cannot be simulated: {kernel['error']}")


@dataclass(frozen=True)
class _Run:
    """The report of one schedule of the kernel, and the arrays after it."""

    seed: int
    completion: str
    report: Report
    tensors: dict[str, torch.Tensor]
    changed: list[str]  # arrays whose bits differ from the first run's


def _run_once(module: Module, spec: LaunchSpec, arguments: Sequence[Any], **options: Any) -> Report:
    return module.launch(
        spec.kernel,
        grid=spec.grid,
        block=spec.block,
        args=arguments,
        smem=spec.smem,
        cluster=spec.cluster,
        **options,
    )


def _runs(module: Module, spec: LaunchSpec) -> Iterator[_Run]:
    """Runs the kernel with every seed in every completion mode."""
    first: dict[str, torch.Tensor] | None = None
    for completion in spec.completion:
        for seed in spec.seeds:
            arguments, tensors = spec.arguments()
            report = _run_once(module, spec, arguments, seed=seed, completion=completion)
            first = tensors if first is None else first
            changed = [name for name in tensors if not _same_bits(tensors[name], first[name])]
            yield _Run(seed, completion, report, tensors, changed)


def _faults(report: Report) -> set[tuple[str, int, int]]:
    return {(f.kind, f.ptx_line, f.other_ptx_line) for f in report.findings}


def _predict(
    module: Module, spec: LaunchSpec, gpu: str, trace: Path | None, text: bool
) -> dict[str, Any]:
    """Predicts the launch's time with the first seed, without the checks that other runs make."""
    arguments, _ = spec.arguments()
    report = _run_once(module, spec, arguments, checks=False, timing=gpu)
    if report.timing is None:
        raise ValueError(f"the launch stopped, so nothing can be predicted: {report}")
    if text:
        print(f"\n{report.timing}")
    if trace is not None:
        report.timing.save_trace(trace)
    return report.timing.to_dict()


def _launch(module: Module, spec: LaunchSpec, text: bool) -> tuple[dict[str, Any], int]:
    """Runs all schedules. With `text`, prints each distinct fault once, when it first occurs."""
    runs: list[_Run] = []
    seen: set[tuple[str, int, int]] = set()
    for run in _runs(module, spec):
        if text and not _faults(run.report) <= seen:
            print(run.report, end="\n\n")
        seen |= _faults(run.report)
        if text and run.changed and not any(before.changed for before in runs):
            print(
                f"error: the bits of {', '.join(run.changed)} depend on the schedule: they differ "
                f'with seed={run.seed}, completion="{run.completion}"\n'
            )
        runs.append(run)
    for name, array in spec.arrays.items():
        if array.save is not None and runs:
            np.save(array.save, _storable(runs[0].tensors[name]))
    reports = [run.report for run in runs]
    faulty = sum(not report.ok for report in reports)
    noted = sum(report.ok and bool(report.notes) for report in reports)
    if text:
        instructions = sum(report.warp_instructions for report in reports)
        print(
            f"{spec.kernel}: {len(runs)} runs, {faulty} with findings, "
            f"{f'{noted} with notes only, ' if noted else ''}{len(seen)} distinct; "
            f"{instructions:,} warp-instructions in {sum(r.seconds for r in reports):.2f} s"
        )
    ok = faulty == 0 and not any(run.changed for run in runs)
    outcome = {
        "kernel": spec.kernel,
        "ok": ok,
        "runs": [
            {
                "seed": run.seed,
                "completion": run.completion,
                "differs_from_first_run": run.changed,
                **run.report.to_dict(),
            }
            for run in runs
        ],
    }
    return outcome, 0 if ok else 1


def _raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(np.array_equal(_raw(a), _raw(b)))


def _storable(tensor: torch.Tensor) -> np.ndarray:
    """The numpy array of a tensor. BF16 and FP8, which numpy lacks, become their codes."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    if tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point:
        return tensor.view(torch.uint8).numpy()
    return tensor.numpy()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    text = options.format == "text"
    try:
        if options.timing is None and options.trace is not None:
            raise ValueError(
                f"--timing must name a GPU for --trace (got --trace {options.trace} alone); "
                "docs/timing.md lists the GPUs"
            )
        if options.timing is not None and options.launch is None:
            raise ValueError(
                f"--launch must name a launch for --timing (got --timing {options.timing} alone)"
            )
        module = _load(options)
        if options.launch is None:
            outcome, status = _list(module)
            if text:
                _print_list(outcome)
        else:
            spec = load_spec(options.launch)
            outcome, status = _launch(module, spec, text)
            if options.timing is not None:
                timing = _predict(module, spec, options.timing, options.trace, text)
                outcome["timing"] = timing
    except (CompileError, OSError, TypeError, ValueError) as error:
        print(f"torchext.sim: {error}", file=sys.stderr)
        outcome, status = {"error": str(error)}, 2
    if not text:
        print(json.dumps({**outcome, "exit_status": status}, indent=2))
    return status


if __name__ == "__main__":
    sys.exit(main())
