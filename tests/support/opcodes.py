"""Kernels around a few instructions, for tests of the simulator's opcodes."""

from __future__ import annotations

import re

import numpy as np

from torchext import sim

HEADER = ".version 8.8\n.target {target}\n.address_size 64\n"


def register_type(dtype: np.dtype) -> str:
    return {1: ".b16", 2: ".b16", 4: ".b32", 8: ".b64"}[np.dtype(dtype).itemsize]


def lanes(code: str, out, *inputs, block: int | None = None, target: str = "sm_90a", **options):
    """Runs `code` with one thread per element and returns the results; asserts no error is found.

    Inputs are in %a, %b, %c, ...; `code` leaves the result in %z. `out` is the result's dtype; a
    list of dtypes gives a list of results, from %z, %y, %x, ... Scratch registers: predicates %p
    and %q, 16-bit %h0-%h7, 32-bit %t0-%t7, 64-bit %u0-%u7. %tid_ is the thread's number.
    """
    report, results = lanes_report(code, out, *inputs, block=block, target=target, **options)
    assert report.ok, str(report)
    return results


def lanes_report(code, out, *arrays, block=None, target="sm_90a", **options):
    outs = out if isinstance(out, list) else [out]
    inputs = [np.ascontiguousarray(x) for x in arrays]
    count = block or max([len(x) for x in inputs], default=32)
    names_in, names_out = "abcdefg"[: len(inputs)], "zyxwv"[: len(outs)]
    results = [np.zeros(count, dtype) for dtype in outs]
    declare, load, store, params = [], [], [], []
    for name, x in zip(names_in, inputs, strict=True):
        params.append(f".param .u64 in_{name}")
        bits = 8 * x.itemsize
        declare.append(f".reg {register_type(x.dtype)} %{name};")
        load.append(
            f"ld.param.u64 %addr, [in_{name}];\nmad.wide.u32 %addr, %tid_, {x.itemsize}, %addr;\n"
            f"ld.global.b{bits} %{name}, [%addr];"
        )
    for name, x in zip(names_out, results, strict=True):
        params.append(f".param .u64 out_{name}")
        bits = 8 * x.itemsize
        declare.append(f".reg {register_type(x.dtype)} %{name};")
        store.append(
            f"ld.param.u64 %addr, [out_{name}];\nmad.wide.u32 %addr, %tid_, {x.itemsize}, %addr;\n"
            f"st.global.b{bits} [%addr], %{name};"
        )
    text = "\n".join(
        [
            HEADER.format(target=target),
            f".visible .entry kernel({', '.join(params)})\n{{",
            ".reg .b64 %addr;\n.reg .b32 %tid_;\n.reg .pred %p, %q, %r0;",
            ".reg .b32 %t<8>;\n.reg .b64 %u<8>;\n.reg .b16 %h<8>;",
            *declare,
            "mov.u32 %tid_, %tid.x;",
            *load,
            code,
            *store,
            "ret;\n}",
        ]
    )
    module = sim.Module(text + "\n")
    report = module.launch(
        "kernel",
        grid=1,
        block=count,
        args=[*map(sim.read_only, inputs), *map(sim.output, results)],
        **options,
    )
    return report, (results if isinstance(out, list) else results[0])


def kernel(body: str, params: str = ".param .u64 out", target: str = "sm_90a") -> sim.Module:
    """A module with one kernel named `kernel`, which declares registers %p, %h, %r, %f and %rd."""
    return sim.Module(
        HEADER.format(target=target)
        + f".visible .entry kernel({params})\n{{\n"
        + ".reg .pred %p<8>;\n.reg .b16 %h<8>;\n.reg .b32 %r<64>;\n.reg .f32 %f<160>;\n"
        + ".reg .b64 %rd<32>;\n"
        + body
        + "\nret;\n}\n"
    )


def kinds(report) -> set[str]:
    return {finding.kind for finding in report.findings}


def line_with(text: str, pattern: str) -> int:
    """The number of the first line that matches; the first line of the text is 1."""
    for number, line in enumerate(text.splitlines(), 1):
        if re.search(pattern, line):
            return number
    raise AssertionError(f"no line matches {pattern}")


def random_bits(dtype, count: int = 64, seed: int = 0) -> np.ndarray:
    """Random values of an integer type, corner cases first."""
    dtype = np.dtype(dtype)
    info = np.iinfo(dtype)
    corners = np.array([0, 1, 2, info.max, info.max - 1, info.min, info.min + 1, 31, 32], dtype)
    rest = np.random.default_rng(seed).integers(info.min, info.max, count, dtype, endpoint=True)
    return np.concatenate([corners, rest])[:count]
