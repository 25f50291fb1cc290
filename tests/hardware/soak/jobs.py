"""Random jobs: what to call, and the results to expect.

Where the design promises equal bits, a job computes its expected result in another way: a GEMM in
the simplest configuration, each group as a GEMM of its own, quantizers in plain PyTorch. Each GEMM
must also lie within the documented bound of the float64 product, which shows errors that all
kernels share. Outputs lie between guard rows. The file is long because every op has its maker of
jobs here, where their checks can be compared.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems import dequantize as dequantized
from benchmarks.problems import difference, require
from tests.hardware.gpu_check.op_calls import check
from torchext import ops, reference
from torchext._catalog import CATALOG, Bound

from .operands import (
    E4M3,
    E5M2,
    GROUP,
    Guarded,
    Lab,
    Operands,
    Outputs,
    describe,
    draw_granularity,
    kinds,
    m_major,
    operands,
    pitched,
    shape,
    short,
    size,
    sms,
)

Place = int | Tensor | tuple[int, Tensor]  # index of a part of an output
OUT_DTYPES = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Job:
    """An op with its operands.

    call: runs the op, any number of times. expect: computes the expected bits; None if no bits are
    promised. bound: raises WrongResultError if a result is too inaccurate.
    """

    name: str
    call: Callable[[], Outputs]
    expect: Callable[[], Outputs] | None
    bound: Callable[[Outputs], None] = field(default=lambda outputs: None)


def draw(lab: Lab, rng: random.Random) -> Job:
    """Draws a job. All of its randomness comes from `rng`."""
    torch.manual_seed(rng.getrandbits(63))
    makers = [maker for maker in MAKERS if maker.__name__ not in lab.without]
    makers += [sampled] * math.ceil(len(ops_without_a_maker()) / 3)  # a maker draws several ops
    return rng.choice(makers)(lab, rng)


# ---- GEMMs ----


def near(want: Tensor, got: Tensor) -> None:
    if want.numel() and want.abs().max() > 0:
        bound = CATALOG["fp8_gemm_nt"].bound
        assert isinstance(bound, Bound)
        require(difference(got, want), bound.relative, bound.worst)


def dense(lab: Lab, rng: random.Random) -> Job:
    m, n, k = shape(lab, rng)
    granularity = draw_granularity(rng)
    given = operands(lab, rng, (m, n, k), granularity)
    num_sms, out_dtype = sms(lab, rng), rng.choice(OUT_DTYPES)
    bias = torch.randn(n, device=lab.torch_device) if rng.random() < 0.3 else None
    into, accumulate = rng.random() < 0.5, rng.random() < 0.5
    product = given.product_of(num_sms, out_dtype, into and accumulate)
    chosen, plainest = lab.selection.draw(product, rng)
    guarded = Guarded(lab, rng, (m, n), out_dtype)
    start = torch.randn(m, n, device=lab.torch_device).to(out_dtype)

    def plain_call() -> Tensor:
        if into and accumulate:
            out = start.clone()
            ops.fp8_gemm_nt(*given.tensors, out=out, accumulate=True, bias=bias)
            return out
        return ops.fp8_gemm_nt(*given.tensors, bias=bias, out_dtype=out_dtype)

    def call() -> Outputs:
        with lab.selection.forced(chosen):
            if not into:
                return (
                    ops.fp8_gemm_nt(
                        *given.tensors, bias=bias, out_dtype=out_dtype, num_sms=num_sms
                    ),
                )
            out, memory = guarded.fresh()
            if accumulate:
                out.copy_(start)
            ops.fp8_gemm_nt(
                *given.tensors, out=out, accumulate=accumulate, bias=bias, num_sms=num_sms
            )
            return out, memory

    def expect() -> Outputs:
        with lab.selection.forced(plainest):
            result = plain_call()
        return (result, guarded.filled(result)) if into else (result,)

    def bound(outputs: Outputs) -> None:
        want = given.product()
        if bias is not None:
            want = want + bias
        near(want + start if into and accumulate else want, outputs[0])

    kind = "accumulate" if into and accumulate else "out" if into else "new"
    name = f"fp8_gemm_nt {m}x{n}x{k} {kinds(given)} {granularity} to {short(out_dtype)} {kind}"
    name += f" bias={bias is not None} num_sms={num_sms}"
    return Job(f"{name} [{chosen} against {plainest}]", call, expect, bound)


def runs(rng: random.Random, total: int, groups: int) -> list[int]:
    """The ends of `groups` consecutive groups of any length, zero included, within `total`."""
    ends = sorted(rng.randint(0, total) for _ in range(groups))
    if rng.random() < 0.5:
        ends[-1] = total
    for i in range(1, groups):
        if rng.random() < 0.2:
            ends[i] = ends[i - 1]
    return ends


def index(lab: Lab, values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=lab.torch_device)


def by_parts(
    lab: Lab,
    guarded: Guarded,
    parts: Callable[[], list[tuple[Place, Tensor]]],
    start: Tensor | None,
) -> Callable[[], Outputs]:
    """A Job.expect for an output made of parts (where, values). Elements in no part keep `start`,
    or the guard bytes if `start` is None."""

    def expect() -> Outputs:
        out, memory = guarded.fresh()
        if start is not None:
            out.copy_(start)
        for where, values in parts():
            out[where] = values
        return out, memory

    return expect


def m_grouped(
    lab: Lab,
    rng: random.Random,
    given: Operands,
    *,
    rows_of: list[Tensor],
    size: tuple[int, ...],
    call_op: Callable[..., object],
    grouping: str,
    expected_m: int = 0,
    name: str,
) -> Job:
    """A job for a GEMM grouped by rows. rows_of: for each group, the indices of its rows of `a`."""
    n, out_dtype = given.b.shape[1], rng.choice(OUT_DTYPES)
    num_sms, accumulate = sms(lab, rng), rng.random() < 0.3
    bias = torch.randn(len(rows_of), n, device=lab.torch_device) if rng.random() < 0.3 else None
    guarded = Guarded(lab, rng, size, out_dtype)
    start = torch.randn(size, device=lab.torch_device).to(out_dtype) if accumulate else None
    product = given.product_of(num_sms, out_dtype, accumulate)
    product = replace(product, grouping=grouping, groups=len(rows_of), expected_m=expected_m)
    chosen, plainest = lab.selection.draw(product, rng)

    def call() -> Outputs:
        out, memory = guarded.fresh()
        if start is not None:
            out.copy_(start)
        with lab.selection.forced(chosen):
            call_op(out=out, accumulate=accumulate, bias=bias, num_sms=num_sms)
        return out, memory

    def parts() -> list[tuple[Place, Tensor]]:
        found: list[tuple[Place, Tensor]] = []
        for group, rows in enumerate(rows_of):
            if not len(rows):
                continue
            own = given.of_rows(rows, group)
            out = torch.empty(len(rows), n, dtype=out_dtype, device=lab.torch_device)
            where: Place = rows if len(size) == 2 else (group, rows - group * size[1])
            if start is not None:
                out.copy_(start[where])
            with lab.selection.forced(plainest):
                ops.fp8_gemm_nt(
                    *own.tensors, out=out, accumulate=accumulate,
                    bias=None if bias is None else bias[group],
                )  # fmt: skip
            found.append((where, out))
        return found

    def bound(outputs: Outputs) -> None:
        for group, rows in enumerate(rows_of):
            if len(rows):
                where = rows if len(size) == 2 else (group, rows - group * size[1])
                want = given.of_rows(rows, group).product()
                if bias is not None:
                    want = want + bias[group]
                near(want if start is None else want + start[where], outputs[0][where])

    lengths = [len(rows) for rows in rows_of]
    text = f"{name} groups of {lengths} rows, of {given.a.shape[0]}, N {n} K {given.a.shape[1]}"
    text += f" {kinds(given)} to {short(out_dtype)} accumulate={accumulate}"
    text += f" bias={bias is not None} num_sms={num_sms} [{chosen} against {plainest}]"
    expect = by_parts(lab, guarded, parts, start) if lab.exact else None
    return Job(text, call, expect, bound)


def contiguous(lab: Lab, rng: random.Random) -> Job:
    m, n, k = shape(lab, rng)
    groups = rng.randint(1, 9)
    n = max(1, n // rng.choice((1, groups)))
    granularity = draw_granularity(rng)
    given = operands(lab, rng, (m, n, k), granularity, groups)
    offsets: Tensor | None
    group_ids: Tensor | None
    if rng.random() < 0.5:
        ends = runs(rng, m, groups)
        rows_of = [
            torch.arange(first, last, device=lab.torch_device)
            for first, last in zip([0, *ends], ends, strict=False)
        ]
        grouping, offsets, group_ids = "offsets", index(lab, ends), None
    else:
        ids = [rng.randint(-1, groups - 1) for _ in range(rng.randint(1, 12))]
        per_row = [
            rng.choice(ids) if rng.random() < 0.1 else ids[r * len(ids) // m] for r in range(m)
        ]
        grouping, offsets, group_ids = "group_ids", None, index(lab, per_row)
        rows_of = [(group_ids == group).nonzero().flatten() for group in range(groups)]

    def call_op(**options: Any) -> object:
        return ops.m_grouped_fp8_gemm_nt_contiguous(
            *given.tensors, offsets, group_ids=group_ids, **options
        )

    name = f"m_grouped_fp8_gemm_nt_contiguous by {grouping} {granularity}"
    return m_grouped(
        lab,
        rng,
        given,
        rows_of=rows_of,
        size=(m, n),
        call_op=call_op,
        grouping=grouping,
        name=name,
    )


def masked(lab: Lab, rng: random.Random) -> Job:
    rows, n, k = shape(lab, rng)
    groups = rng.randint(1, 9)
    rows = max(1, rows // groups)
    granularity = draw_granularity(rng)
    given = operands(lab, rng, (groups * rows, n, k), granularity, groups)
    counts = [rng.choice((0, rows, rng.randint(0, rows))) for _ in range(groups)]
    rows_of = [
        torch.arange(g * rows, g * rows + count, device=lab.torch_device)
        for g, count in enumerate(counts)
    ]
    a = given.a.unflatten(0, (groups, rows))
    a_scale = given.a_scale.unflatten(0, (groups, rows))
    masked_m, expected_m = index(lab, counts), rng.choice((0, rows, rng.randint(0, rows)))

    def call_op(**options: Any) -> object:
        return ops.m_grouped_fp8_gemm_nt_masked(
            a, a_scale, given.b, given.b_scale, masked_m, expected_m=expected_m, **options
        )

    name = f"m_grouped_fp8_gemm_nt_masked expected_m={expected_m} {granularity}"
    return m_grouped(
        lab,
        rng,
        given,
        rows_of=rows_of,
        size=(groups, rows, n),
        call_op=call_op,
        grouping="masked",
        expected_m=expected_m,
        name=name,
    )


def k_grouped(lab: Lab, rng: random.Random) -> Job:
    m, n, k = shape(lab, rng)
    given = operands(lab, rng, (m, n, k), "1d1d")
    groups = rng.randint(1, 6)
    ends = runs(rng, k, groups)
    offsets = index(lab, ends)
    num_sms, accumulate = sms(lab, rng), rng.random() < 0.5
    out_dtype = rng.choice(OUT_DTYPES)
    product = given.product_of(num_sms, out_dtype, accumulate)
    chosen, plainest = lab.selection.draw(replace(product, grouping="along_k", groups=groups), rng)
    guarded = Guarded(lab, rng, (groups, m, n), out_dtype)
    start = torch.randn(groups, m, n, device=lab.torch_device).to(out_dtype)

    def call() -> Outputs:
        out, memory = guarded.fresh()
        if accumulate:
            out.copy_(start)
        with lab.selection.forced(chosen):
            ops.k_grouped_fp8_gemm_nt(
                *given.tensors, offsets, out=out, accumulate=accumulate, num_sms=num_sms
            )
        return out, memory

    def own(first: int, last: int) -> Operands:
        """The K blocks that contain the group's columns, with other columns zeroed. Whole K blocks,
        since one promotion sums a K block."""
        left, right = first // GROUP, -(-last // GROUP)

        def cut(data: Tensor) -> Tensor:
            fresh = pitched(data[:, left * GROUP : min(right * GROUP, k)])
            fresh[:, : first - left * GROUP] = 0
            fresh[:, last - left * GROUP :] = 0
            return fresh

        return Operands(
            "1d1d", cut(given.a), m_major(given.a_scale[:, left:right]),
            cut(given.b), m_major(given.b_scale[:, left:right]),
        )  # fmt: skip

    def parts() -> list[tuple[Place, Tensor]]:
        found: list[tuple[Place, Tensor]] = []
        for group, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
            out = start[group].clone() if accumulate else torch.zeros_like(start[group])
            if last > first:
                product = own(first, last)
                with lab.selection.forced(plainest):
                    ops.fp8_gemm_nt(*product.tensors, out=out, accumulate=accumulate)
            found.append((group, out))
        return found

    def bound(outputs: Outputs) -> None:
        for group, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
            want = own(first, last).product() if last > first else torch.zeros_like(start[group])
            near(want + start[group] if accumulate else want, outputs[0][group])

    name = f"k_grouped_fp8_gemm_nt {m}x{n} K up to {ends} of {k} {kinds(given)}"
    name += f" to {short(out_dtype)} accumulate={accumulate} num_sms={num_sms}"
    name += f" [{chosen} against {plainest}]"
    expect = by_parts(lab, guarded, parts, None) if lab.exact else None
    return Job(name, call, expect, bound)


ACTIVATIONS = ("swiglu", "gelu", "relu2")


def fused(lab: Lab, rng: random.Random) -> Job:
    op = rng.choice(ACTIVATIONS)
    m, n, k = shape(lab, rng, even_n=op == "swiglu")
    granularity = draw_granularity(rng)
    given = operands(lab, rng, (m, n, k), granularity)
    options: dict = {"dtype": rng.choice((E4M3, E5M2)), "pow2_scale": rng.random() < 0.5}
    bias = torch.randn(n, device=lab.torch_device) if rng.random() < 0.3 else None
    extra: dict = {"tanh_approximation": rng.random() < 0.5} if op == "gelu" else {}
    num_sms = sms(lab, rng)
    product = given.product_of(num_sms, torch.float32, False)
    split = any(c.split_k > 1 for c in lab.selection.expected_cycles(product))

    def call() -> Outputs:
        function = getattr(ops, f"fp8_gemm_nt_{op}_quantize")
        return function(*given.tensors, bias=bias, num_sms=num_sms, **options, **extra)

    def unfused() -> Tensor:
        """The activation in FP32, by PyTorch, of the GEMM in the simplest configuration."""
        with lab.selection.forced(lab.selection.plainest(product)):
            x = ops.fp8_gemm_nt(*given.tensors, bias=bias, out_dtype=torch.float32)
        if op == "relu2":
            return x.relu().square()
        if op == "gelu":
            kind = "tanh" if extra["tanh_approximation"] else "none"
            return torch.nn.functional.gelu(x, approximate=kind)
        gate, up = x.chunk(2, 1)
        return torch.nn.functional.silu(gate) * up

    def expect() -> Outputs:
        return ops.quantize_1x128(unfused(), **options)

    def bound(outputs: Outputs) -> None:
        # Half an FP8 step, doubled by pow2_scale.
        relative = 0.1 if options["dtype"] == E5M2 else 0.05
        want = unfused().double()
        if want.numel() and want.abs().max() > 0:
            data, scale = outputs
            require(difference(dequantized(data, scale, torch.float64), want), relative)

    name = f"fp8_gemm_nt_{op}_quantize {m}x{n}x{k} {kinds(given)} {granularity} {options} {extra}"
    name += f" bias={bias is not None} num_sms={num_sms}"
    # Other activations depend on how exp, erf and tanh are rounded, and results of split K on the
    # order of sums. Their bits must only be the same in every launch.
    exact = op == "relu2" and lab.exact and not split
    return Job(name, call, expect if exact else None, bound)


# ---- quantizers ----

QUANTIZERS = tuple(name for name in CATALOG if name.startswith("quantize_"))


def matrix(lab: Lab, rng: random.Random) -> Tensor:
    """A random matrix, dtype and row pitch: spread magnitudes, zeros and, rarely, NaN or Inf."""
    rows, columns = (size(rng, most) for most in (lab.largest[0], lab.largest[2]))
    dtype = rng.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32))
    x = torch.randn(rows, columns + rng.choice((0, 0, 8, 3)), device=lab.torch_device)
    x *= torch.exp2(torch.randint(-12, 5, (rows, 1), device=lab.torch_device))
    x[torch.rand(rows, device=lab.torch_device) < 0.1] = 0
    if rng.random() < 0.1:
        x.view(-1)[rng.randrange(x.numel())] = rng.choice((float("nan"), float("inf")))
    return x.to(dtype)[:, :columns]


def quantizer(lab: Lab, rng: random.Random) -> Job:
    op, x = rng.choice(QUANTIZERS), matrix(lab, rng)
    options: dict = {"dtype": rng.choice((E4M3, E5M2)), "pow2_scale": rng.random() < 0.5}

    def call() -> Outputs:
        return getattr(ops, op)(x, **options)

    def expect() -> Outputs:
        outputs = getattr(reference, op)(x.cpu(), **options)
        return tuple(output.to(x.device) for output in outputs)

    return Job(f"{op} {describe(x)} {options}", call, expect)


def dequantize(lab: Lab, rng: random.Random) -> Job:
    op, x = rng.choice(("quantize_1x128", "quantize_128x128", "quantize_rowwise")), matrix(lab, rng)
    dtype = rng.choice((torch.bfloat16, torch.float16, torch.float32))
    data, scale = getattr(reference, op)(torch.nan_to_num(x.float(), posinf=1.0))

    def call() -> Outputs:
        return (ops.dequantize(data, scale, out_dtype=dtype),)

    def expect() -> Outputs:
        return (reference.dequantize(data.cpu(), scale.cpu(), out_dtype=dtype).to(x.device),)

    return Job(f"dequantize of {op} {describe(x)} to {short(dtype)}", call, expect)


# ---- ops without a maker of their own ----


def sampled(lab: Lab, rng: random.Random) -> Job:
    """A job for a sample of an op's catalog entry, checked within the entry's bound."""
    entry = CATALOG[rng.choice(ops_without_a_maker())]
    labels = [label for label, given in entry.each_sample() if "out" not in given.kwargs]
    label = rng.choice(labels)
    given = entry.sample(label, lab.torch_device)

    def call() -> Outputs:
        outputs = getattr(ops, entry.name)(*given.args, **given.kwargs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def bound(outputs: Outputs) -> None:
        expected = entry.expected(label)
        check(entry, outputs, expected if isinstance(expected, tuple) else (expected,))

    return Job(f"{entry.name} {label}", call, None, bound)


# Each maker is drawn as often as it is listed.
MAKERS = (dense, dense, dense, dense, contiguous, contiguous, masked, k_grouped, fused, fused,
          quantizer, quantizer, dequantize)  # fmt: skip

# The ops whose calls each maker draws.
OPS_OF: dict[Callable[[Lab, random.Random], Job], tuple[str, ...]] = {
    dense: ("fp8_gemm_nt",),
    contiguous: ("m_grouped_fp8_gemm_nt_contiguous",),
    masked: ("m_grouped_fp8_gemm_nt_masked",),
    k_grouped: ("k_grouped_fp8_gemm_nt",),
    fused: tuple(f"fp8_gemm_nt_{activation}_quantize" for activation in ACTIVATIONS),
    quantizer: QUANTIZERS,
    dequantize: ("dequantize",),
}


def ops_without_a_maker() -> list[str]:
    return sorted(set(CATALOG) - {op for maker in MAKERS for op in OPS_OF[maker]})


def ops_without_a_job() -> list[str]:
    """Ops that no maker draws and that have no catalog entry."""
    return sorted(set(ops.OPS) - {op for maker in MAKERS for op in OPS_OF[maker]} - set(CATALOG))
