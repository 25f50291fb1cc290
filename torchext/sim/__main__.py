"""`python -m torchext.sim`: compile a CUDA file, list its kernels, launch one under the checker.

Exit status: 0 without errors (notes do not count), 1 with errors or outputs that depend on the
schedule, 2 when there was nothing to run: a compiler error, malformed PTX, a specification that
does not fit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

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
    parser.add_argument("source", type=Path, help="a .cu or a .ptx file")
    parser.add_argument("--launch", type=Path, metavar="SPEC", help="run what this TOML file says")
    parser.add_argument(
        "--arch", default="90a", help="N of compute_N, for a .cu file (%(default)s)"
    )
    parser.add_argument("--keep-ptx", type=Path, metavar="FILE", help="leave the PTX here")
    parser.add_argument(
        "-I", "--include", action="append", default=[], metavar="DIR", help="for a .cu file"
    )
    parser.add_argument(
        "--nvcc-option", action="append", default=[], metavar="OPTION", help="for a .cu file"
    )
    return parser


def _load(options: argparse.Namespace) -> Module:
    if options.source.suffix == ".ptx":
        return Module(options.source)
    includes = [f"-I{folder}" for folder in options.include]
    return compile_cuda(
        options.source,
        arch=options.arch,
        options=[*includes, *options.nvcc_option],
        keep=options.keep_ptx,
    )


def _list(module: Module) -> int:
    """Prints every kernel with its parameters; 2 if one has instructions that are not known."""
    kernels = module.kernels()
    status = 0 if kernels else 2
    print(f"{module.target}: {len(kernels)} kernel{'' if len(kernels) == 1 else 's'}")
    for kernel in kernels:
        print(f"\n{kernel.name}")
        for parameter in kernel.parameters:
            print(f"    {parameter.name}: {parameter.size} bytes, aligned to {parameter.alignment}")
        for name, value in (
            ("threads at most", kernel.max_threads),
            ("threads", kernel.required_threads),
            ("cluster", kernel.cluster),
        ):
            if any(value):
                print(f"    {name}: {' x '.join(map(str, value))}")
        try:
            module.check(kernel.name)
        except ValueError as error:
            print(f"    cannot be simulated: {error}")
            status = 2
    return status


def _launch(module: Module, spec: LaunchSpec) -> int:
    """Runs every seed in every completion mode; prints each distinct fault once."""
    seen: set[tuple[str, int, int]] = set()
    runs: list[Report] = []
    first: dict[str, torch.Tensor] | None = None
    differs = False
    for completion in spec.completion:
        for seed in spec.seeds:
            arguments, tensors = spec.arguments()
            report = module.launch(
                spec.kernel,
                grid=spec.grid,
                block=spec.block,
                args=arguments,
                smem=spec.smem,
                cluster=spec.cluster,
                seed=seed,
                completion=completion,
            )
            runs.append(report)
            faults = {(f.kind, f.ptx_line, f.other_ptx_line) for f in report.findings}
            if not faults <= seen:
                print(report, end="\n\n")
            seen |= faults
            if first is None:
                first = tensors
            changed = [name for name in tensors if not _same_bits(tensors[name], first[name])]
            if changed and not differs:
                print(
                    f"error: the bits of {', '.join(changed)} depend on the schedule: they differ "
                    f'with seed={seed}, completion="{completion}"\n'
                )
            differs |= bool(changed)
    for name, array in spec.arrays.items():
        if array.save is not None and first is not None:
            np.save(array.save, _storable(first[name]))
    faulty = sum(not run.ok for run in runs)
    noted = sum(run.ok and bool(run.notes) for run in runs)
    instructions = sum(run.warp_instructions for run in runs)
    print(
        f"{spec.kernel}: {len(runs)} runs, {faulty} with findings, "
        f"{f'{noted} with notes only, ' if noted else ''}{len(seen)} distinct; "
        f"{instructions:,} warp-instructions in {sum(run.seconds for run in runs):.2f} s"
    )
    return 1 if faulty or differs else 0


def _raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(np.array_equal(_raw(a), _raw(b)))


def _storable(tensor: torch.Tensor) -> np.ndarray:
    """As numpy, where it has the dtype; BF16 and FP8 as their codes."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    if tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point:
        return tensor.view(torch.uint8).numpy()
    return tensor.numpy()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        module = _load(options)
        if options.launch is None:
            return _list(module)
        return _launch(module, load_spec(options.launch))
    except (CompileError, OSError, TypeError, ValueError) as error:
        print(f"torchext.sim: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
