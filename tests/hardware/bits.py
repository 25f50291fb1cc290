"""Every op on a GPU, compared bit for bit with the simulator on the same inputs.

    python -m tests.hardware.bits --out FOLDER [--jobs 16] [--budget 100] [--device cpu]

Cases: each sample of torchext._catalog; a GEMM in each configuration of the Hopper kernel; GEMMs
and quantizers on inputs that are hard (outliers, zeros, subnormals, NaN and Inf, blocks of very
different scales). Quantizers are compared with the CPU kernels too. Strides must agree as well.

One line for each case goes to bits.txt, and the first differing ones with their tensors to
bits.npz. `--device cpu` takes the simulator with another schedule for the GPU: a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import torchext
from benchmarks.selection import Configuration, Product, Selection
from torchext import ops
from torchext._catalog import BITS, CATALOG, Sample
from torchext._catalog.entry import E4M3, E5M2, GRANULARITIES

HANG_S = 20.0
HUNG, LOST = 72, 71  # exit statuses of a worker whose GPU context must not be used any more
QUANTIZERS = [name for name in CATALOG if name.startswith("quantize_")]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Ops whose kernels use approximate functions (ex2.approx, rcp.approx), which the simulator rounds
# otherwise than a GPU: an FP8 result may differ by one step, a scale by a few units.
APPROXIMATE = ("swiglu", "gelu")


@dataclass(frozen=True)
class Case:
    """One call. undefined: gives tensors that are NaN where the op does not define its result."""

    name: str
    op: str
    make: Callable[[], Sample]
    configuration: Configuration | None = None
    undefined: Callable[[], Any] | None = None


# ---- cases ----


def catalog_cases() -> Iterator[Case]:
    for entry in CATALOG.values():
        for label in entry.samples:
            undefined = None if entry.bound is BITS else partial(entry.expected, label)
            yield Case(
                f"{entry.name} {label}", entry.name, entry.samples[label], undefined=undefined
            )


def _codes(rng: torch.Generator, like: Tensor, kind: str) -> Tensor:
    """FP8 data in the layout of `like`."""
    nan = 0x7F if like.dtype == E4M3 else 0x7C
    bits = torch.randint(0, 256, like.shape, generator=rng).to(torch.uint8)
    if kind == "subnormals":
        bits &= 0x80 | (7 if like.dtype == E4M3 else 3)
    if kind == "zeros":
        bits = torch.where(torch.rand(like.shape, generator=rng) < 0.8, bits & 0x80, bits)
    if kind == "positive":
        bits &= 0x7F
    special = (bits & 0x7F) >= nan
    if kind == "NaN":
        special &= torch.rand(like.shape, generator=rng) > 0.02
    bits = torch.where(special, torch.zeros_like(bits), bits)
    like.view(torch.uint8).copy_(bits)
    return like


def hard_operands(granularity: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype], seed: int,
                  sizes: tuple[int, int, int] = (136, 264, 520)) -> Sample:  # fmt: skip
    m, n, k = sizes
    rng = torch.Generator().manual_seed(seed)
    quantize_a, quantize_b = GRANULARITIES[granularity]
    args: list[Tensor] = []
    for rows, quantize, dtype in ((m, quantize_a, dtypes[0]), (n, quantize_b, dtypes[1])):
        x = torch.randn(rows, k, generator=rng)
        if kind == "outliers":
            x *= torch.where(torch.rand(x.shape, generator=rng) < 0.01, 1e4, 1.0)
        if kind == "scales":
            x *= 2.0 ** torch.randint(-30, 30, (rows, 1), generator=rng)
            x[:, k // 2 :] *= 2.0**-12
        data, scale = quantize(x, dtype=dtype)
        if kind not in ("normal", "outliers", "scales"):
            data = _codes(rng, data, kind)
        args += [data, scale]
    return Sample(tuple(args), {"out_dtype": torch.float32})


HARD = ("normal", "any code", "outliers", "scales", "zeros", "subnormals", "positive", "NaN")
PAIRS = ((E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2), (E5M2, E5M2))


def _pair_name(pair: tuple[torch.dtype, torch.dtype]) -> str:
    return " ".join("e5m2" if dtype == E5M2 else "e4m3" for dtype in pair)


def gemm_cases(selection: Selection) -> Iterator[Case]:
    sizes = (200, 272, 1040)
    for granularity in GRANULARITIES:
        for pair in PAIRS:
            if pair != PAIRS[0] and granularity != "1d2d":
                continue
            product = Product(*sizes, granularity, *pair, out_dtype=torch.float32)
            for configuration in sorted(selection.expected_cycles(product), key=str):
                yield Case(
                    f"fp8_gemm_nt {granularity} {_pair_name(pair)} in {configuration}",
                    "fp8_gemm_nt",
                    partial(hard_operands, granularity, "any code", pair, 5, sizes),
                    configuration,
                )
    draw = random.Random(0)
    for granularity in GRANULARITIES:
        for pair in PAIRS:
            product = Product(136, 264, 520, granularity, *pair, out_dtype=torch.float32)
            configurations = sorted(selection.expected_cycles(product), key=str)
            for kind in HARD:
                for seed in (1, 2):
                    configuration = draw.choice(configurations)
                    yield Case(
                        f"fp8_gemm_nt {granularity} {_pair_name(pair)} {kind} seed {seed} "
                        f"in {configuration}",
                        "fp8_gemm_nt",
                        partial(hard_operands, granularity, kind, pair, seed),
                        configuration,
                    )


def hard_matrix(of: torch.dtype, kind: str, seed: int, **options: Any) -> Sample:
    """A matrix of dtype `of`. options: of the quantizer."""
    rng = torch.Generator().manual_seed(seed)
    shape = (197, 388)
    size = of.itemsize
    if kind in ("bits", "NaN"):
        x = torch.randint(0, 256, (*shape, size), generator=rng).to(torch.uint8).view(of)[..., 0]
        if kind == "bits":
            x = torch.where(x.isfinite(), x, torch.zeros_like(x))
        else:  # some rows only, else every group is NaN
            rare = torch.rand(shape, generator=rng) < 0.002
            x = torch.where(x.isfinite() | rare, x, torch.zeros_like(x))
    else:
        wide = torch.randn(shape, generator=rng)
        if kind == "magnitudes":
            wide *= 10.0 ** torch.randint(-38, 37, (shape[0], 1), generator=rng)
        if kind == "outliers":
            wide *= torch.where(torch.rand(shape, generator=rng) < 0.01, 1e4, 1.0)
        if kind == "ties":  # multiples of half a unit in the last place of FP8
            wide = torch.randint(-896, 897, shape, generator=rng) / 2
            wide[:, ::7] = 448.0
        x = wide.to(of)
        x = torch.where(x.isinf(), torch.zeros_like(x), x)
    return Sample((x,), options)


def quantizer_cases() -> Iterator[Case]:
    for name in QUANTIZERS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for number, kind in enumerate(("bits", "NaN", "magnitudes", "outliers", "ties")):
                options = {
                    "dtype": E5M2 if number % 2 else E4M3,
                    "pow2_scale": (number + dtype.itemsize) % 3 == 0,
                }
                make = partial(hard_matrix, dtype, kind, number, **options)
                yield Case(f"{name} {str(dtype)[6:]} {kind}", name, make)


def every_case(num_sms: int) -> list[Case]:
    selection = Selection(num_sms)
    return [*catalog_cases(), *gemm_cases(selection), *quantizer_cases()]


# ---- comparison ----


def run_on(case: Case, device: str, num_sms: int, seed: int = 0) -> list[Tensor]:
    """The outputs on the CPU. device: "cuda", "sim" or "cpu"."""
    from torchext import sim

    given = case.make().to("cuda" if device == "cuda" else "cpu")
    with (Selection(num_sms) if device != "cpu" else _Never()).forced(case.configuration):
        op = getattr(ops, case.op)
        if device == "sim":
            with sim.simulate(num_sms=num_sms, checks=False, num_threads=1, seed=seed):
                outputs = op(*given.args, **given.kwargs)
        else:
            outputs = op(*given.args, **given.kwargs)
            if device == "cuda":
                _wait(case.name)
    return [_on_cpu(t) for t in tree_leaves(outputs)]


class _Never:
    @staticmethod
    def forced(configuration: Configuration | None) -> Any:
        from contextlib import nullcontext

        return nullcontext()


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy with the same strides."""
    result = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    integers = INTEGERS[tensor.element_size()]  # every device copies these
    result.view(integers).copy_(tensor.view(integers))
    return result


def _wait(name: str) -> None:
    """Waits for the GPU. A hung kernel ends the process, since nothing else ends the kernel."""
    event = torch.cuda.Event()
    event.record()
    start = time.monotonic()
    while not event.query():
        if time.monotonic() - start > HANG_S:
            print(json.dumps({"name": name, "status": "HUNG", "text": f"after {HANG_S:.0f} s"}))
            sys.stdout.flush()
            os._exit(HUNG)
        time.sleep(0.0002)


def _gpu_works() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def compare(
    what: str, gpu: list[Tensor], other: list[Tensor], undefined: list[Tensor | None], case: Case
) -> tuple[bool, list[str]]:
    """(whether they differ in what they must not, remarks)."""
    wrong, said = False, []
    for number, (g, s, u) in enumerate(zip(gpu, other, undefined, strict=True)):
        layout = (g.dtype, tuple(g.shape), g.stride())
        if layout != (s.dtype, tuple(s.shape), s.stride()):
            return True, [f"output {number}: gpu {layout}, {what} {s.dtype} {tuple(s.shape)} "
                          f"{s.stride()}"]  # fmt: skip
        differs = _bits(g) != _bits(s)
        if u is not None:
            differs &= ~u.float().isnan().reshape(differs.shape)
        nans = differs & g.float().isnan() & s.float().isnan()
        if nans.any():
            said.append(f"output {number}: {int(nans.sum())} NaNs have other bits than {what}'s")
        differs &= ~nans
        count = int(differs.sum())
        if not count:
            continue
        at = tuple(int(i) for i in differs.nonzero()[0])
        digits = 2 * g.element_size()
        mask = (1 << 8 * g.element_size()) - 1
        text = (
            f"output {number} ({str(g.dtype)[6:]}): {count} of {g.numel()} elements, first at "
            f"{list(at)}, gpu 0x{int(_bits(g)[at]) & mask:0{digits}x} "
            f"{what} 0x{int(_bits(s)[at]) & mask:0{digits}x}"
        )
        if any(word in case.op for word in APPROXIMATE) and _close(g, s, differs):
            said.append(f"approximate functions: {text}")
        else:
            wrong = True
            finite = differs & g.float().isfinite() & s.float().isfinite()
            if finite.any():
                error = (g.double() - s.double()).abs()[finite]
                scale = s.double().abs()[finite].clamp_min(1e-300)
                text += f", largest difference {float((error / scale).max()):.3g} of the value"
            said.append(text)
    return wrong, said


def _close(gpu: Tensor, sim: Tensor, differs: Tensor) -> bool:
    """Whether differing elements are neighbors in FP8, or differ by 2^-18 in wider types."""
    if gpu.element_size() == 1:
        steps = (_bits(gpu).int() - _bits(sim).int()).abs()[differs]
        return bool((steps <= 1).all()) and float(differs.float().mean()) < 0.01
    error = (gpu.double() - sim.double()).abs()
    return bool((error <= 2.0**-18 * sim.double().abs())[differs].all())


def check(case: Case, device: str, num_sms: int, keep: Path | None) -> dict[str, str]:
    gpu = run_on(case, device, num_sms, seed=0) if device == "cuda" else run_on(
        case, "sim", num_sms, seed=3)  # fmt: skip
    sim = run_on(case, "sim", num_sms)
    undefined: list[Tensor | None] = [None] * len(gpu)
    if case.undefined is not None:
        undefined = list(tree_leaves(case.undefined()))
    wrong, said = compare("sim", gpu, sim, undefined, case)
    if case.op in QUANTIZERS or case.op == "dequantize":
        more_wrong, more = compare("cpu", gpu, run_on(case, "cpu", num_sms), undefined, case)
        wrong, said = wrong or more_wrong, said + more
    if wrong and keep is not None:
        given = case.make()
        tensors = [*tree_leaves((given.args, given.kwargs)), *gpu, *sim]
        arrays = {
            f"{case.name}|{i}|{str(t.dtype)[6:]}": _bits(t).numpy()
            for i, t in enumerate(tensors)
            if isinstance(t, Tensor)
        }
        np.savez(keep, **arrays)  # type: ignore[arg-type]
    return {"name": case.name, "status": "DIFFERS" if wrong else "ok", "text": "; ".join(said)}


# ---- processes ----


def worker(options: argparse.Namespace) -> int:
    """Prints a line of JSON for each case of one share. Other processes run the other shares."""
    torch.set_num_threads(1)
    share, shares, start = options.worker
    saved = 0
    for number, case in enumerate(every_case(options.num_sms)[share::shares]):
        if number < start or options.only not in case.name:
            continue
        if time.time() > options.until:
            answer = {"name": case.name, "status": "not run", "text": ""}
        else:
            keep = options.parts / f"{share}-{number}.npz" if saved < 3 else None
            print(json.dumps({"begin": case.name, "number": number}), flush=True)
            begin = time.monotonic()
            try:
                answer = check(case, options.device, options.num_sms, keep)
            except Exception as error:  # any error is the result of this case
                text = f"{type(error).__name__}: {error}"[:1500]
                answer = {"name": case.name, "status": "FAILED", "text": text}
                if options.device == "cuda" and not _gpu_works():
                    print(json.dumps(answer), flush=True)
                    os._exit(LOST)
            saved += answer["status"] == "DIFFERS"
            answer["seconds"] = f"{time.monotonic() - begin:.1f}"
        print(json.dumps(answer), flush=True)
    return 0


def supervise(
    options: argparse.Namespace, share: int, say: Callable[[dict[str, str]], None]
) -> None:
    """Runs one share, in another process after each that ended early."""
    start = 0
    while True:
        command = [
            sys.executable, "-m", "tests.hardware.bits", "--device", options.device,
            "--worker", str(share), str(options.jobs), str(start), "--until", str(options.until),
            "--parts", str(options.parts), "--num-sms", str(options.num_sms),
            "--only", options.only,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        log = options.parts / f"{share}.log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        assert process.stdout is not None
        current: str | None = None
        began = start - 1
        for line in process.stdout:
            if not line.startswith("{"):
                continue  # what a kernel prints
            answer = json.loads(line)
            if "begin" in answer:
                current, began = answer["begin"], answer["number"]
            else:
                current = None
                say(answer)
        code = process.wait()
        if code == 0:
            return
        if current is not None or began < start:  # ended in a case, or before any
            tail = " | ".join(line.strip() for line in log.read_text().splitlines()[-3:])
            name = current or f"share {share}"
            say({"name": name, "status": "CRASHED", "text": f"exit status {code}: {tail}"})
        if began < start:
            return
        start = began + 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.hardware.bits")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--budget", type=float, default=100.0, metavar="SECONDS")
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--num-sms", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--parts", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.worker is not None:
        return worker(options)
    available, reason = torchext.is_available("sm90" if options.device == "cuda" else "sim")
    if not available:
        print(f"bits: {reason}")
        return 2
    begin = time.time()
    options.until = begin + options.budget
    if options.num_sms is None:
        options.num_sms = 132
        if options.device == "cuda":
            options.num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    options.out.mkdir(parents=True, exist_ok=True)
    answers: list[dict[str, str]] = []
    lock = threading.Lock()

    def say(answer: dict[str, str]) -> None:
        with lock:
            answers.append(answer)
            if answer["status"] not in ("ok", "not run") or answer["text"]:
                print(f"{answer['status']} {answer['name']}: {answer['text']}"[:600], flush=True)

    with tempfile.TemporaryDirectory(prefix="bits-") as folder:
        options.parts = Path(folder)
        threads = [threading.Thread(target=supervise, args=(options, share, say))
                   for share in range(options.jobs)]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        arrays: dict[str, np.ndarray] = {}
        size = 0
        for part in sorted(options.parts.glob("*.npz")):
            with np.load(part) as stored:
                size += sum(stored[key].nbytes for key in stored.files)
                if size < 14 << 20:
                    arrays |= {key: stored[key] for key in stored.files}
        if arrays:
            np.savez_compressed(options.out / "bits.npz", **arrays)  # type: ignore[arg-type]
    order = {"ok": 1, "not run": 2}
    answers.sort(key=lambda a: (order.get(a["status"], 0), a["name"]))
    counts = Counter(answer["status"] for answer in answers)
    summary = (
        f"{len(answers)} cases: " + ", ".join(f"{n} {status}" for status, n in counts.items())
        + f", {time.time() - begin:.0f} s, {options.num_sms} SMs"
    )  # fmt: skip
    lines = [
        f"{a['status']} {a['name']}" + (f": {a['text']}" if a["text"] else "")
        + (f" ({a['seconds']} s)" if "seconds" in a else "")
        for a in answers
    ]  # fmt: skip
    (options.out / "bits.txt").write_text("\n".join([summary, *lines]) + "\n")
    print(summary)
    return 0 if counts.keys() <= {"ok"} and answers else 1


if __name__ == "__main__":
    sys.exit(main())
