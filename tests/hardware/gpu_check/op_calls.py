"""Calls every op on every sample of torchext._catalog and compares with torchext.reference.

This program also runs under compute-sanitizer, which makes kernels about a hundred times slower. It
makes inputs and compares results on the CPU, so that almost all kernels on the GPU are torchext's.
For each call it prints "calling NAME", then "ok NAME" or "WRONG NAME: why"; at last "end of calls".
A call that breaks the CUDA context or exceeds the time limit ends the process before that.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import torchext
from benchmarks.problems import WrongResultError, difference, require
from benchmarks.selection import Configuration, Product, Selection
from torchext import ops, reference
from torchext._catalog import BITS, CATALOG, Entry

BROKEN_CONTEXT = 71  # exit status if the CUDA context no longer works
Call = Callable[[str], object]  # device -> outputs


def every_call() -> dict[str, tuple[Entry, str, Call]]:
    """Name of a call -> (entry, label of the sample, call), for every sample of every op."""

    def call(entry: Entry, label: str) -> Call:
        def run(device: str) -> object:
            given = entry.sample(label, device)
            outputs = getattr(ops, entry.name)(*given.args, **given.kwargs)
            finish(device)  # before `given` is freed, which aborts in a broken context
            return outputs

        return run

    return {
        f"{entry.name} {label}": (entry, label, call(entry, label))
        for entry in CATALOG.values()
        for label in entry.samples
    }


def every_tile() -> dict[str, tuple[Entry, str, Call]]:
    """Calls of a dense GEMM, whose K is long enough to split, in each configuration of the Hopper
    kernel."""
    selection = Selection(132)
    entry = CATALOG["fp8_gemm_nt"]
    label = "long K"
    m, n, k = entry.shape(*entry.sample(label).args)
    product = Product(m, n, k, "1d2d")

    def in_configuration(configuration: Configuration) -> Call:
        def forced(device: str) -> object:
            given = entry.sample(label, device)
            with selection.forced(configuration):
                outputs = ops.fp8_gemm_nt(*given.args)
            finish(device)
            return outputs

        return forced

    return {
        f"fp8_gemm_nt in {configuration}": (entry, label, in_configuration(configuration))
        for configuration in sorted(selection.expected_cycles(product), key=str)
    }


def finish(device: str) -> None:
    """Waits for the GPU. Ends the process if the CUDA context is broken."""
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"BROKEN CONTEXT: {error}", flush=True)
        os._exit(BROKEN_CONTEXT)


def check(entry: Entry, got: object, want: object) -> None:
    """Raises WrongResultError if `got` is not within the entry's bound of `want`."""
    results, expected = _tensors(got), _tensors(want)
    if entry.bound is BITS:
        for result, right in zip(results, expected, strict=True):
            if (result.dtype, result.shape) != (right.dtype, right.shape):
                raise WrongResultError(f"expected {right.dtype} {tuple(right.shape)}", {})
            differs = result.cpu().float() != right.float()
            differs &= ~(result.cpu().float().isnan() & right.float().isnan())
            if differs.any():
                count = int(differs.sum())
                raise WrongResultError(f"{count} of {right.numel()} elements differ", {})
        return
    if len(expected) == 2:  # data and scales
        results, expected = _dequantized(*results), _dequantized(*expected)
    ((result,), (right,)) = results, expected
    undefined = right.isnan()  # rows that belong to no group
    result = result.cpu().masked_fill(undefined, 0)
    right = right.masked_fill(undefined, 0)
    if result.shape != right.shape or right.count_nonzero():
        error = difference(result, right)
    else:  # expected: no elements, or zeros, for which there is no relative error
        error = dict.fromkeys(("relative", "worst"), float(result.count_nonzero()))
    require(error, entry.bound.relative, entry.bound.worst)


def _dequantized(data: Tensor, scale: Tensor) -> tuple[Tensor]:
    return (reference.dequantize(data.cpu(), scale.cpu(), out_dtype=torch.float32),)


def _tensors(outputs: object) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)  # type: ignore[return-value]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--skip", nargs="*", default=[], help="names of calls to leave out")
    parser.add_argument(
        "--no-results", action="store_true", help="do not copy and compare what the calls return"
    )
    parser.add_argument("--call-limit", type=float, metavar="SECONDS", help="limit of each call")
    options = parser.parse_args()
    uncovered = set(ops.OPS) - set(CATALOG)
    if uncovered:
        print(f"WRONG coverage: no call of {', '.join(sorted(uncovered))}", flush=True)
        return 1
    calls = every_call()
    if options.device == "cuda" and torchext.is_available("sm90")[0]:
        calls.update(every_tile())
    print(f"torchext {torchext.__version__} on {options.device}: {len(calls)} calls", flush=True)
    wrong = 0
    for name, (entry, label, call) in calls.items():
        if name in options.skip:
            continue
        print(f"calling {name}", flush=True)
        if options.call_limit:
            faulthandler.dump_traceback_later(options.call_limit, exit=True)
        try:
            got = call(options.device)
            if not options.no_results:
                check(entry, got, entry.expected(label))
        except (WrongResultError, RuntimeError, ValueError) as error:
            wrong += 1
            print(f"WRONG {name}: {error}", flush=True)
            finish(options.device)
        else:
            print(f"ok {name}", flush=True)
    faulthandler.cancel_dump_traceback_later()
    print("end of calls", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
