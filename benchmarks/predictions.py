"""Times that the simulator's clock predicts for torchext's ops and for DeepGEMM's kernels.

A prediction takes seconds, so predictions.csv keeps them. A row is valid while the machine code's
source is the same: the PTX of torchext's kernels, by a hash, or the version of DeepGEMM's wheel. If
the clock itself has changed, the whole table is stale; `Predictor.drifted` finds out by predicting
some rows anew.
"""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import cases, deep_gemm_grouped, deep_gemm_kernel
from .cases import Case
from .problems import GROUP, round_up
from .selection import Configuration

if TYPE_CHECKING:
    from torchext import sim
    from torchext.gemm_selection import Candidate

TABLE = Path(__file__).parent / "timing_data" / "predictions.csv"
TORCHEXT, DEEP_GEMM, UNFUSED = "torchext", "deepgemm", "torchext, unfused"
FP8 = torch.float8_e4m3fn
SAME = 1e-3  # predictions that differ by less are the same


@dataclass(frozen=True)
class Key:
    """The kernel launches that a prediction is about.

    Attributes:
        gpu: a GPU of the clock.
        contender: TORCHEXT, DEEP_GEMM or UNFUSED, whose kernels run.
        op, shape: the case's op, and its shape as MxNxK.
        configuration: the tile of a GEMM; "" for other ops.
    """

    gpu: str
    contender: str
    op: str
    shape: str
    configuration: str = ""


@dataclass(frozen=True)
class Prediction:
    """A row of the table. For several launches, times are sums, and `tensor` and `waits` are those
    of the longest launch.

    Attributes:
        key: the launches.
        kernels: the kernels' names, with " + " between them.
        code: a hash of the kernels' PTX, or the version of the wheel that has their source.
        microseconds: the predicted time, launch included.
        launch_microseconds: the part of this time that the launch's ramp and drain take.
        tensor: the share of the time in which the tensor cores are busy.
        waits: for each role of the longest kernel, its longest wait.
    """

    key: Key
    kernels: str
    code: str
    microseconds: float
    launch_microseconds: float
    tensor: float
    waits: str


class OutOfTimeError(Exception):
    """A prediction is not in the table, and there is no time left for it."""


class Table:
    """The predictions of a CSV file. Every change is written at once."""

    def __init__(self, path: Path = TABLE) -> None:
        self.path = path
        self.rows: dict[Key, Prediction] = {}
        if path.exists():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    key = Key(*(row[f.name] for f in fields(Key)))
                    values: list[Any] = [
                        float(row[name]) if name in _NUMBERS else row[name] for name in _REST
                    ]
                    self.rows[key] = Prediction(key, *values)

    def add(self, prediction: Prediction) -> None:
        self.rows[prediction.key] = prediction
        self.write()

    def clear(self) -> None:
        self.rows.clear()

    def write(self) -> None:
        with self.path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*(f.name for f in fields(Key)), *_REST])
            for key, row in sorted(self.rows.items(), key=lambda pair: str(pair[0])):
                values = [getattr(row, name) for name in _REST]
                texts = [f"{v:.5g}" if isinstance(v, float) else v for v in values]
                writer.writerow([*asdict(key).values(), *texts])


_REST = [f.name for f in fields(Prediction) if f.name != "key"]
_NUMBERS = ("microseconds", "launch_microseconds", "tensor")


# ---- whose code ----


@functools.cache
def _hashes() -> dict[str, str]:
    """Kernel -> hash of its PTX, without line numbers and comments, as a Hopper GPU takes it."""
    import torchext

    folders = [p for p in (Path(torchext.__file__).parent / "_ptx").iterdir() if p.is_dir()]
    usable = [p for p in folders if p.name == "90a" or (p.name.isdecimal() and int(p.name) <= 90)]
    hashes: dict[str, str] = {}
    for folder in sorted(usable, key=lambda p: -int(p.name.rstrip("a"))):
        for file in sorted(folder.glob("*.ptx.gz")):
            text = gzip.decompress(file.read_bytes()).decode()
            lines = [s for s in map(str.strip, text.splitlines()) if not _UNSEEN.match(s)]
            for part in re.split(r"(?m)^(?=\.visible \.entry )", "\n".join(lines))[1:]:
                name = part.split("(", 1)[0].split()[-1]
                hashes.setdefault(name, hashlib.sha256(part.encode()).hexdigest()[:12])
    return hashes


_UNSEEN = re.compile(r"//|\.loc\b|\.file\b|$")


def code_of(contender: str, kernels: str) -> str:
    """The `code` of a row. Raises KeyError if a kernel no longer exists."""
    if contender == DEEP_GEMM:
        return f"{deep_gemm_kernel.WHEEL} {deep_gemm_kernel.VERSION}"
    whole = " ".join(_hashes()[name] for name in kernels.split(" + "))
    return hashlib.sha256(whole.encode()).hexdigest()[:12]


# ---- operands: the clock does not look at their values ----


def _data(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=FP8)


def _group_scales(rows: int, k: int) -> torch.Tensor:
    """Scales of 1x128 groups, M-major."""
    return torch.empty(-(-k // GROUP), round_up(rows, 4)).t()[:rows]


def _block_scales(n: int, k: int) -> torch.Tensor:
    return torch.empty(-(-n // GROUP), -(-k // GROUP))


def lengths(groups: int, expected: int, step: int) -> list[int]:
    """Rows of each group: spread evenly from 0.7 to 1.3 of what is expected, in mixed order."""
    mixed = sorted(range(groups), key=lambda g: g * 0.618034 % 1)
    spread = [(rank + 0.5) / groups for rank in mixed]
    return [max(step, round(expected * (0.7 + 0.6 * s) / step) * step) for s in spread]


def _room(expected: int) -> int:
    """The rows that a masked GEMM has for a group of which `expected` rows are expected."""
    return round_up(expected * 3 // 2, GROUP)


def _index(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _ends(values: Sequence[int]) -> torch.Tensor:
    return _index(values).cumsum(0, dtype=torch.int32)


def our_calls(case: Case) -> dict[str, Callable[[], object]]:
    """Contender -> a call of torchext's ops."""
    from torchext import ops
    from torchext._catalog import CATALOG

    if case.suite in ("quantize", "activation", "norm"):
        make = next(iter(CATALOG[case.op].sized.values()))
        given, op = make(*case.shape), getattr(ops, case.op)
        if case.op == "dequantize":  # Entry.bytes counts a BF16 result
            return {TORCHEXT: lambda: op(*given.args, out_dtype=torch.bfloat16)}
        return {TORCHEXT: lambda: op(*given.args, **given.kwargs)}
    if case.suite == "grouped":
        return {TORCHEXT: _our_grouped(case)}
    m, n, k = case.shape
    if case.op == cases.WGRAD_ACCUMULATE:
        m, n, k = n, k, m
        a, b = (_data(m, k), _group_scales(m, k)), (_data(n, k), _group_scales(n, k))
        out = torch.empty(m, n)
        return {TORCHEXT: lambda: ops.fp8_gemm_nt(*a, *b, out=out, accumulate=True)}
    a, b = (_data(m, k), _group_scales(m, k)), (_data(n, k), _block_scales(n, k))
    if case.op == cases.SWIGLU:
        return {
            TORCHEXT: lambda: ops.fp8_gemm_nt_swiglu_quantize(*a, *b),
            UNFUSED: lambda: ops.silu_mul_quantize_1x128(ops.fp8_gemm_nt(*a, *b)),
        }
    if case.op != cases.FPROP:
        raise ValueError(f"predictions: no operands for {case.name}")
    return {TORCHEXT: lambda: ops.fp8_gemm_nt(*a, *b)}


def _our_grouped(case: Case) -> Callable[[], object]:
    from torchext import ops

    groups, m, n, k = case.shape
    if case.op == cases.ALONG_K:
        sizes = lengths(groups, k, GROUP)
        ends, k = _ends(sizes), sum(sizes)
        a, b = (_data(m, k), _group_scales(m, k)), (_data(n, k), _group_scales(n, k))
        out = torch.empty(groups, m, n)
        return lambda: ops.k_grouped_fp8_gemm_nt(*a, *b, ends, out=out, accumulate=True)
    b = _data(groups, n, k), torch.stack([_block_scales(n, k)] * groups)
    if case.op == cases.CONTIGUOUS:
        sizes = lengths(groups, m, GROUP)
        ends, rows = _ends(sizes), sum(sizes)
        a = _data(rows, k), _group_scales(rows, k)
        return lambda: ops.m_grouped_fp8_gemm_nt_contiguous(*a, *b, ends)
    room = _room(m)
    counts = _index(lengths(groups, m, 1))
    a = _data(groups, room, k), _group_scales(groups * room, k).unflatten(0, (groups, room))
    return lambda: ops.m_grouped_fp8_gemm_nt_masked(*a, *b, counts, expected_m=m)


def chosen(case: Case, gpu: str) -> str:
    """The configuration that torchext selects for a GEMM; "" for other ops."""
    from torchext import explain_gemm
    from torchext.sim.ops import rated_memory

    options: dict[str, Any] = {}
    if case.suite == "grouped":
        groups, m, n, k = case.shape
        if case.op == cases.ALONG_K:
            k = sum(lengths(groups, k, GROUP))
            options = {"granularity": "1d1d", "grouping": "along_k"}
        elif case.op == cases.CONTIGUOUS:
            m, options = sum(lengths(groups, m, GROUP)), {"grouping": "offsets"}
        else:
            options = {"grouping": "masked", "expected_m": m}
            m = groups * _room(m)
        options["groups"] = groups
    elif case.op in (cases.FPROP, cases.WGRAD_ACCUMULATE):
        m, n, k = case.shape
        if case.op == cases.WGRAD_ACCUMULATE:
            m, n, k = n, k, m
            options = {"granularity": "1d1d"}
    else:
        return ""
    if case.op in (cases.WGRAD_ACCUMULATE, cases.ALONG_K):
        options |= {"out_dtype": torch.float32, "accumulate": True}
    memory = rated_memory(gpu)
    answer = explain_gemm(m, n, k, **options, memory_gigabytes_per_second=memory)
    return configuration_of(answer.chosen)


def configuration_of(candidate: Candidate) -> str:
    """The configuration of a candidate of explain_gemm, as keys have it."""
    return str(Configuration(candidate.name, candidate.split_k, candidate.cluster))


# ---- DeepGEMM ----

DenseKernel = tuple[deep_gemm_kernel.Configuration, int, int]
DeepKernel = DenseKernel | deep_gemm_grouped.Kernel


def deep_kernel(case: Case) -> DeepKernel:
    """The kernel that DeepGEMM chooses. Raises ValueError if it has none for the op."""
    if case.op == cases.FPROP:
        m, n, k = case.shape
        return deep_gemm_kernel.configuration(m, n, k), n, k
    if case.op == cases.WGRAD_ACCUMULATE:
        m, n, k = case.shape
        return deep_gemm_grouped.kernel(deep_gemm_grouped.WGRAD, n, k, m)
    if case.suite != "grouped":
        raise ValueError(f"predictions: DeepGEMM has no {case.op}")
    groups, m, n, k = case.shape
    if case.op == cases.ALONG_K:
        longest = max(lengths(groups, k, GROUP))
        return deep_gemm_grouped.kernel(deep_gemm_grouped.ALONG_K, m, n, longest, groups)
    if case.op == cases.CONTIGUOUS:
        rows = sum(lengths(groups, m, GROUP))
        return deep_gemm_grouped.kernel(deep_gemm_grouped.CONTIGUOUS, rows, n, k, groups)
    return deep_gemm_grouped.kernel(deep_gemm_grouped.MASKED, m, n, k, groups)


def deep_configuration(kernel: DeepKernel) -> str:
    c = kernel[0] if isinstance(kernel, tuple) else kernel.configuration
    shared = {(1, False): "", (2, True): " A shared", (2, False): " B shared"}
    return f"{c.block_m}x{c.block_n} stages={c.stages}{shared[c.multicast, c.multicast_a]}"


def deep_launch(case: Case, kernel: DeepKernel) -> dict[str, Any]:
    """The options of the launch, beside the kernel's name."""

    def scales(rows: int, k: int) -> torch.Tensor:
        return torch.empty(-(-k // GROUP), round_up(rows, 4))

    if isinstance(kernel, tuple):
        m, n, k = case.shape
        a, b = (_data(m, k), scales(m, k)), (_data(n, k), _block_scales(n, k))
        d = torch.empty(m, n, dtype=torch.bfloat16)
        return deep_gemm_kernel.launch_options(kernel[0], a, b, d)
    launch = functools.partial(deep_gemm_grouped.launch_options, kernel)
    if case.op == cases.WGRAD_ACCUMULATE:
        k, m, n = case.shape
        a, b = ((_data(rows, k), scales(rows, k)) for rows in (m, n))
        return launch(a, b, torch.empty(m, n))
    groups, m, n, k = case.shape
    if case.op == cases.ALONG_K:
        sizes = lengths(groups, k, GROUP)
        a, b = ((_data(rows, sum(sizes)), scales(rows, sum(sizes))) for rows in (m, n))
        return launch(a, b, torch.empty(groups * m, n), _index(sizes))
    b = _data(groups * n, k), torch.empty(groups * -(-n // GROUP), -(-k // GROUP))
    if case.op == cases.CONTIGUOUS:
        sizes = lengths(groups, m, GROUP)
        rows = sum(sizes)
        layout = _index([g for g, size in enumerate(sizes) for _ in range(size)])
        a = _data(rows, k), scales(rows, k)
    else:
        room = _room(m)
        rows, layout = groups * room, _index(lengths(groups, m, 1))
        a = _data(rows, k), torch.empty(groups * -(-k // GROUP), room)
    return launch(a, b, torch.empty(rows, n, dtype=torch.bfloat16), layout)


# ---- predictions ----


def _prediction(key: Key, reports: Sequence[sim.Report]) -> Prediction:
    timings = []
    for report in reports:
        if report.timing is None:
            raise RuntimeError(f"predictions: {key}: the launch stopped: {report}")
        timings.append(report.timing)
    longest = max(timings, key=lambda timing: timing.microseconds)
    by_role: dict[str, str] = {}
    for wait in longest.waits:  # the longest first
        if wait.share >= 0.05:
            by_role.setdefault(wait.role, f"{wait.role} {wait.share:.0%} {wait.reason}")
    kernels = " + ".join(report.kernel for report in reports)
    return Prediction(
        key,
        kernels if key.contender != DEEP_GEMM else key.configuration,
        code_of(key.contender, kernels),
        sum(timing.microseconds for timing in timings),
        sum(timing.launch_microseconds for timing in timings),
        longest.utilization.get("tensor cores", 0.0),
        "; ".join(by_role.values()),
    )


@dataclass
class Predictor:
    """Predicts cases, or takes predictions from the table.

    say: called with a line for each new prediction.
    deadline: a value of time.monotonic(). Later, a prediction that the table lacks raises
        OutOfTimeError.
    """

    table: Table = field(default_factory=Table)
    say: Callable[[str], None] = print
    deadline: float = float("inf")
    _modules: dict[str, sim.Module] = field(default_factory=dict)

    def ours(self, case: Case, gpu: str, configuration: str | None = None) -> Prediction:
        """Predicts torchext's op, with the tile `configuration`; None for the library's choice."""
        key = Key(gpu, TORCHEXT, case.op, _shape(case), configuration or chosen(case, gpu))
        force = None if configuration is None else _parsed(configuration)
        return self._known(key) or self._run(key, case, force)

    def unfused(self, case: Case, gpu: str) -> Prediction:
        key = Key(gpu, UNFUSED, case.op, _shape(case))
        return self._known(key) or self._run(key, case, None)

    def deep_gemm(self, case: Case, gpu: str) -> Prediction:
        kernel = deep_kernel(case)
        key = Key(gpu, DEEP_GEMM, case.op, _shape(case), deep_configuration(kernel))
        known = self._known(key)
        if known is not None:
            return known
        self._check_time()
        self._compile([kernel])
        module = self._modules[repr(kernel)]
        if isinstance(kernel, tuple):
            name = deep_gemm_kernel.kernel_name(module, *kernel)
        else:
            name = deep_gemm_grouped.kernel_name(module, kernel)
        begin = time.monotonic()
        report = module.launch(
            name, timing=gpu, timing_only=True, num_threads=1, **deep_launch(case, kernel)
        )
        return self._kept(key, [report], begin)

    def compile_for(self, wanted: Iterable[Case], gpu: str) -> None:
        """Compiles together the DeepGEMM kernels that these cases need and the table lacks."""
        missing = []
        for case in wanted:
            kernel = deep_kernel(case)
            key = Key(gpu, DEEP_GEMM, case.op, _shape(case), deep_configuration(kernel))
            if self._known(key) is None:
                missing.append(kernel)
        if missing and time.monotonic() < self.deadline:
            self._compile(missing)

    def drifted(self, count: int = 4) -> list[str]:
        """Predicts some rows again, and returns a line for each that differs: then the clock has
        changed, or the host's part of an op. The rows are small GEMMs of this library, the same
        ones each time."""
        dense = [
            row
            for row in self.table.rows.values()
            if row.key.op == cases.FPROP and row.key.contender == TORCHEXT and self._known(row.key)
        ]
        dense.sort(key=lambda row: (row.microseconds, str(row.key)))
        changed = []
        for row in dense[: 3 * count : 3]:
            case = Case("gemm", cases.FPROP, "", "", _sizes(row.key.shape))
            again = self._run(row.key, case, _parsed(row.key.configuration), keep=False)
            if abs(again.microseconds / row.microseconds - 1) > SAME:
                changed.append(
                    f"{row.key.shape} on {row.key.gpu}: {row.microseconds:.5g} us, "
                    f"now {again.microseconds:.5g} us"
                )
        return changed

    def _check_time(self) -> None:
        if time.monotonic() >= self.deadline:
            raise OutOfTimeError

    def _known(self, key: Key) -> Prediction | None:
        row = self.table.rows.get(key)
        try:
            return row if row and row.code == code_of(key.contender, row.kernels) else None
        except KeyError:
            return None

    def _run(
        self, key: Key, case: Case, force: Configuration | None, keep: bool = True
    ) -> Prediction:
        from torchext import gemm_selection, sim

        if keep:
            self._check_time()

        call = our_calls(case)[key.contender]
        context: Any = nullcontext()
        if force is not None:
            context = gemm_selection.forced(
                force.name, split_k=force.split_k, cluster=force.cluster
            )
        begin = time.monotonic()
        with context, sim.simulate(timing=key.gpu, timing_only=True, num_threads=1) as simulation:
            call()
        reports = simulation.reports
        return self._kept(key, reports, begin) if keep else _prediction(key, reports)

    def _kept(self, key: Key, reports: Sequence[sim.Report], begin: float) -> Prediction:
        prediction = _prediction(key, reports)
        self.table.add(prediction)
        self.say(
            f"{key.gpu} {key.contender} {key.op} {key.shape} {key.configuration}: predicted "
            f"{prediction.microseconds:.1f} us, in {time.monotonic() - begin:.1f} s"
        )
        return prediction

    def _compile(self, kernels: Sequence[DeepKernel]) -> None:
        for dense in (True, False):
            missing = [
                k for k in kernels if isinstance(k, tuple) == dense and repr(k) not in self._modules
            ]
            missing = list(dict.fromkeys(missing))
            if not missing:
                continue
            self.say(f"nvcc compiles {len(missing)} of DeepGEMM's kernels")
            side: Any = deep_gemm_kernel if dense else deep_gemm_grouped
            module = side.compile_kernels(missing)
            self._modules |= {repr(kernel): module for kernel in missing}


def _shape(case: Case) -> str:
    return "x".join(map(str, case.shape))


def _sizes(shape: str) -> tuple[int, ...]:
    return tuple(map(int, shape.split("x")))


def _parsed(text: str) -> Configuration:
    name, split_k, cluster = text.split()
    return Configuration(name, int(split_k.partition("=")[2]), int(cluster.partition("=")[2]))
