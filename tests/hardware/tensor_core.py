"""Single wgmma and mma.sync instructions on a GPU, compared bit for bit with the simulator's model.

    python -m tests.hardware.tensor_core --out FOLDER [--device cpu]

FOLDER gets tensor_core.txt and tensor_core-*.npz: inputs, results of the GPU and of the model for
each instruction and kind of input, so that the model can be corrected without a GPU. `--device cpu`
takes the simulator for the GPU, which checks the kernels of this program.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.hardware.shadow.driver import Driver, Launch
from torchext import _sim, sim

Array = np.ndarray
SIZE = {"e4m3": 1, "e5m2": 1, "f16": 2, "bf16": 2, "tf32": 4}
CODES = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@dataclass(frozen=True)
class Instruction:
    """One instruction, or `steps` of a chain. k: elements of K of one instruction."""

    unit: str  # "wgmma" or "mma.sync"
    a: str
    b: str
    accumulator: str
    k: int
    steps: int = 1

    @property
    def rows(self) -> int:
        return 64 if self.unit == "wgmma" else 16

    @property
    def row_bytes(self) -> int:  # of one instruction
        return self.k * SIZE[self.a]

    @property
    def name(self) -> str:
        shape = f"m{self.rows}n8k{self.k}"
        chain = f" x{self.steps}" if self.steps > 1 else ""
        return f"{self.unit} {shape} {self.accumulator}.{self.a}.{self.b}{chain}"


FP8 = ("e4m3", "e5m2")
INSTRUCTIONS = [
    *(Instruction("wgmma", a, b, "f32", 32, n) for a in FP8 for b in FP8 for n in (1, 4)),
    *(Instruction("wgmma", a, b, "f16", 32) for a in FP8 for b in FP8),
    Instruction("wgmma", "f16", "f16", "f32", 16),
    Instruction("wgmma", "f16", "f16", "f16", 16),
    Instruction("wgmma", "bf16", "bf16", "f32", 16),
    Instruction("wgmma", "tf32", "tf32", "f32", 8),
    *(Instruction("mma.sync", a, b, acc, 32) for a in FP8 for b in FP8 for acc in ("f32", "f16")),
    *(Instruction("mma.sync", t, t, "f32", k) for t in ("f16", "bf16") for k in (8, 16)),
    *(Instruction("mma.sync", "f16", "f16", "f16", k) for k in (8, 16)),
    *(Instruction("mma.sync", "tf32", "tf32", "f32", k) for k in (4, 8)),
]


# ---- kernels ----

HEADER = """.version 8.8
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u64 pd)
{
.reg .pred %p; .reg .b32 %r<16>; .reg .b64 %a<8>; .reg .b32 %x<4>; .reg .b32 %y<2>;
.reg .b32 %c<4>; .reg .b64 %desc;
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
and.b32 %r2, %r0, 31;
shr.u32 %r3, %r0, 5;
shr.u32 %r4, %r2, 2;        // lane / 4: row of the fragment
and.b32 %r5, %r2, 3;        // lane % 4: word of the row
mad.lo.u32 %r6, %r3, 16, %r4; // row of A, C, D
"""


def kernel(i: Instruction) -> str:
    """PTX of a kernel that computes D = A * B + C, one instruction (or chain) for each CTA.

    a: [CTAs, steps, rows, row bytes], b: [CTAs, steps, 8, row bytes], c and d: [CTAs, rows, 8] of
    the accumulator's type.
    """
    size_c = 4 if i.accumulator == "f32" else 2
    pair = 2 * size_c  # bytes of the two neighbors in a row of C that a thread has
    lines = [
        "ld.param.u64 %a0, [pa];", "ld.param.u64 %a1, [pb];",
        "ld.param.u64 %a2, [pc];", "ld.param.u64 %a3, [pd];",
        # addresses of this thread's words
        f"mad.wide.u32 %a0, %r1, {i.steps * i.rows * i.row_bytes}, %a0;",
        f"mad.wide.u32 %a0, %r6, {i.row_bytes}, %a0;",
        "mad.wide.u32 %a0, %r5, 4, %a0;",
        f"mad.wide.u32 %a1, %r1, {i.steps * 8 * i.row_bytes}, %a1;",
        f"mad.wide.u32 %a2, %r1, {i.rows * 8 * size_c}, %a2;",
        f"mad.wide.u32 %a3, %r1, {i.rows * 8 * size_c}, %a3;",
        *(f"mad.wide.u32 %a{n}, %r6, {8 * size_c}, %a{n};" for n in (2, 3)),
        *(f"mad.wide.u32 %a{n}, %r5, {pair}, %a{n};" for n in (2, 3)),
    ]  # fmt: skip
    below = 8 * 8 * size_c  # eight rows further in C
    if i.accumulator == "f32":
        count = 4
        lines += [f"ld.global.v2.b32 {{%c0, %c1}}, [%a2];",  # noqa: F541
                  f"ld.global.v2.b32 {{%c2, %c3}}, [%a2+{below}];"]  # fmt: skip
    else:
        count = 2
        lines += ["ld.global.b32 %c0, [%a2];", f"ld.global.b32 %c1, [%a2+{below}];"]
    d = ", ".join(f"%c{n}" for n in range(count))
    words = 4 if i.row_bytes == 32 else 2
    a = ", ".join(f"%x{n}" for n in range(words))
    for step in range(i.steps):
        at = step * i.rows * i.row_bytes
        lines += [
            f"ld.global.b32 %x0, [%a0+{at}];",
            f"ld.global.b32 %x1, [%a0+{at + 8 * i.row_bytes}];",
        ]
        if words == 4:
            lines += [
                f"ld.global.b32 %x2, [%a0+{at + 16}];",
                f"ld.global.b32 %x3, [%a0+{at + 8 * i.row_bytes + 16}];",
            ]
        make = _wgmma if i.unit == "wgmma" else _mma_sync
        lines += make(i, step, a, d)
    if i.accumulator == "f32":
        lines += ["st.global.v2.b32 [%a3], {%c0, %c1};",
                  f"st.global.v2.b32 [%a3+{below}], {{%c2, %c3}};"]  # fmt: skip
    else:
        lines += ["st.global.b32 [%a3], %c0;", f"st.global.b32 [%a3+{below}], %c1;"]
    return HEADER + "\n".join(lines) + "\nret;\n}\n"


def _mma_sync(i: Instruction, step: int, a: str, d: str) -> list[str]:
    at = step * 8 * i.row_bytes
    lines = [
        f"mad.wide.u32 %a4, %r4, {i.row_bytes}, %a1;",
        "mad.wide.u32 %a4, %r5, 4, %a4;",
        f"ld.global.b32 %y0, [%a4+{at}];",
    ]
    b = "%y0"
    if i.row_bytes == 32:
        lines.append(f"ld.global.b32 %y1, [%a4+{at + 16}];")
        b = "%y0, %y1"
    acc = i.accumulator
    lines.append(
        f"mma.sync.aligned.m16n8k{i.k}.row.col.{acc}.{i.a}.{i.b}.{acc} "
        f"{{{d}}}, {{{a}}}, {{{b}}}, {{{d}}};"
    )
    return lines


def _wgmma(i: Instruction, step: int, a: str, d: str) -> list[str]:
    """B lies in shared memory as two core matrices of 8 rows of 16 bytes, without swizzle."""
    shared = ".shared .align 128 .b8 tile[256];" if step == 0 else ""
    scales = "1, 1, 0" if SIZE[i.a] == 2 else "1, 1"
    return [
        shared,
        # Threads 0-63 copy the 64 words of B: thread = row * 8 + word.
        f"setp.lt.u32 %p, %r0, 64;\n@!%p bra COPIED{step};",
        f"mad.wide.u32 %a4, %r0, 4, %a1;\nld.global.b32 %r7, [%a4+{step * 8 * i.row_bytes}];",
        "shr.u32 %r8, %r0, 3;\nand.b32 %r9, %r0, 7;",  # row, word
        "shr.u32 %r10, %r9, 2;\nand.b32 %r11, %r9, 3;",  # core matrix, word of its row
        "mov.u32 %r12, tile;\nmad.lo.u32 %r12, %r10, 128, %r12;",
        "mad.lo.u32 %r12, %r8, 16, %r12;\nmad.lo.u32 %r12, %r11, 4, %r12;",
        f"st.shared.b32 [%r12], %r7;\nCOPIED{step}:",
        "fence.proxy.async.shared::cta;\nbar.sync 0;",
        "mov.u32 %r13, tile;\nshr.u32 %r13, %r13, 4;\nand.b32 %r13, %r13, 0x3fff;",
        "or.b32 %r13, %r13, 0x80000;",  # leading byte offset 128 >> 4, at bit 16
        "mov.b64 %desc, {%r13, 8};",  # stride byte offset 128 >> 4, at bit 32
        "setp.eq.u32 %p, 0, 0;",
        "wgmma.fence.sync.aligned;",
        f"wgmma.mma_async.sync.aligned.m64n8k{i.k}.{i.accumulator}.{i.a}.{i.b} "
        f"{{{d}}}, {{{a}}}, %desc, %p, {scales};",
        "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;",
        "bar.sync 0;",
    ]


# ---- inputs ----


def encoded(values: Array, name: str) -> Array:
    """The codes of `values`, rounded to nearest, in the smallest integer type. TF32 takes FP32 bits
    whose low 13 bits are zero."""
    flat = np.ascontiguousarray(values, np.float64).reshape(-1)
    codes = _sim.encode(name, flat, "rn" if name != "tf32" else "rna")
    return codes.astype(CODES[SIZE[name]]).reshape(values.shape)


def any_codes(rng: np.random.Generator, shape: tuple[int, ...], name: str, finite: bool) -> Array:
    """Random bits; NaN and Inf become 0 if `finite`."""
    bits = rng.integers(0, 256, (*shape, SIZE[name]), np.uint8).view(CODES[SIZE[name]])[..., 0]
    if name == "tf32":
        bits = bits & np.uint32(0xFFFFE000)
    mask, least = {
        "e4m3": (0x7F, 0x7F), "e5m2": (0x7F, 0x7C), "f16": (0x7FFF, 0x7C00),
        "bf16": (0x7FFF, 0x7F80), "tf32": (0x7FFFFFFF, 0x7F800000),
    }[name]  # fmt: skip
    if finite:
        bits = np.where((bits & bits.dtype.type(mask)) >= least, bits.dtype.type(0), bits)
    return bits


Make = Callable[[np.random.Generator, tuple[int, ...], tuple[int, ...], str, str],
                tuple[Array, Array]]  # fmt: skip
RANGE = {"e4m3": 8, "e5m2": 15, "f16": 14, "bf16": 30, "tf32": 30}


def _normal(rng, a, b, an, bn):
    return encoded(rng.standard_normal(a), an), encoded(rng.standard_normal(b), bn)


def _positive(rng, a, b, an, bn):
    return (encoded(np.abs(rng.standard_normal(a)), an),
            encoded(np.abs(rng.standard_normal(b)), bn))  # fmt: skip


def _spread(rng, a, b, an, bn):
    def one(shape, name):
        return encoded(rng.standard_normal(shape) * 2.0 ** rng.integers(
            -RANGE[name], RANGE[name] - 1, shape), name)  # fmt: skip

    return one(a, an), one(b, bn)


def _sparse(rng, a, b, an, bn):
    x, y = _spread(rng, a, b, an, bn)
    return np.where(rng.random(a) < 0.15, x, x.dtype.type(0)), y


def _any(rng, a, b, an, bn):
    return any_codes(rng, a, an, True), any_codes(rng, b, bn, True)


def _special(rng, a, b, an, bn):
    x, y = _any(rng, a, b, an, bn)
    return (np.where(rng.random(a) < 0.02, any_codes(rng, a, an, False), x),
            np.where(rng.random(b) < 0.02, any_codes(rng, b, bn, False), y))  # fmt: skip


def _subnormal(rng, a, b, an, bn):
    bits = {"e4m3": 3, "e5m2": 2, "f16": 10, "bf16": 7, "tf32": 23}

    def one(shape, name):
        fraction = rng.integers(0, 1 << bits[name], shape)
        sign = rng.integers(0, 2, shape) << 8 * SIZE[name] - 1
        codes = (fraction | sign).astype(CODES[SIZE[name]])
        return codes & np.uint32(0xFFFFE000) if name == "tf32" else codes

    return one(a, an), one(b, bn) if SIZE[bn] == 1 else encoded(rng.standard_normal(b), bn)


def _cancel(rng, a, b, an, bn):
    """A large product, its negative, and small ones: the sum is what alignment leaves of these.

    b is a power of two for each column, so that a row of a decides the products.
    """
    x = rng.standard_normal(a) * 2.0 ** rng.integers(-RANGE[an], 2, (*a[:-1], 1))
    big = 2.0 ** rng.integers(0, RANGE[an] - 1, a[:-1])
    count = a[-1]
    first = rng.integers(0, count, a[:-1])
    second = (first + rng.integers(1, count, a[:-1])) % count
    np.put_along_axis(x, first[..., None], big[..., None], -1)
    np.put_along_axis(x, second[..., None], -big[..., None], -1)
    y = np.broadcast_to(2.0 ** rng.integers(-4, 5, (*b[:-1], 1)), b)
    return encoded(x, an), encoded(y, bn)


def _pair(rng, a, b, an, bn):
    """Two products of different exponents in each row; all others are zero."""
    x = np.zeros(a)
    count = a[-1]
    first = rng.integers(0, count, a[:-1])
    second = (first + rng.integers(1, count, a[:-1])) % count
    for at in (first, second):
        value = (1 + rng.integers(0, 8, a[:-1]) / 8) * 2.0 ** rng.integers(
            -RANGE[an], RANGE[an] - 1, a[:-1]
        )
        value *= rng.choice([-1, 1], a[:-1])
        np.put_along_axis(x, at[..., None], value[..., None], -1)
    y = np.broadcast_to(2.0 ** rng.integers(-4, 5, (*b[:-1], 1)), b)
    return encoded(x, an), encoded(y, bn)


def _permuted(rng, a, b, an, bn):
    """The rows of a are permutations of one row, and b is constant along K: a sum that depends on
    the order of K shows in results of a column that are not equal."""
    row = rng.standard_normal(a[-1]) * 2.0 ** rng.integers(-RANGE[an] // 2, RANGE[an] // 2, a[-1])
    x = rng.permuted(np.broadcast_to(row, a), axis=-1)
    y = np.broadcast_to(rng.standard_normal((*b[:-1], 1)), b)
    return encoded(x, an), encoded(y, bn)


KINDS: dict[str, Make] = {
    "normal": _normal, "positive": _positive, "spread": _spread, "sparse": _sparse, "any": _any,
    "special": _special, "subnormal": _subnormal, "cancel": _cancel, "pair": _pair,
    "permuted": _permuted,
}  # fmt: skip


def addends(rng: np.random.Generator, shape: tuple[int, ...], kind: str, acc: str) -> Array:
    """C as float32 whose values the accumulator has."""
    if kind in ("permuted", "positive"):
        c = np.zeros(shape)
    else:
        c = rng.standard_normal(shape) * 2.0 ** rng.integers(-24, 12, shape)
        c *= rng.random(shape) < 0.6
        if acc == "f32":
            c = np.where(rng.random(shape) < 0.03, c * 2.0**-126, c)
        if kind == "special":
            c = np.where(rng.random(shape) < 0.02, rng.choice([np.nan, np.inf, -np.inf], shape), c)
    return c.astype(np.float16 if acc == "f16" else np.float32).astype(np.float32)


# ---- runs ----


def on_gpu(driver: Driver, text: str, ctas: int, block: int, arrays: list[Array]) -> Array:
    """Runs the kernel; the last array is the output's shape and type."""
    module = driver.load([("tensor_core.ptx", text)])
    addresses = [driver.allocate(array.nbytes) for array in arrays]
    for address, array in zip(addresses, arrays, strict=True):
        driver.write(address, array.tobytes())
    parameters = [address.to_bytes(8, "little") for address in addresses]
    launch = Launch((ctas, 1, 1), (block, 1, 1))
    driver.launch(driver.function(module, "kernel"), launch, parameters, 10.0)
    out = driver.read(addresses[-1], arrays[-1].nbytes)
    for address in addresses:
        driver.free(address)
    driver.unload(module)
    return np.frombuffer(out, arrays[-1].dtype).reshape(arrays[-1].shape)


def on_simulator(text: str, ctas: int, block: int, arrays: list[Array]) -> Array:
    out = arrays[-1].copy()
    report = sim.Module(text).launch(
        "kernel", grid=ctas, block=block, args=[*map(sim.read_only, arrays[:-1]), sim.output(out)]
    )
    report.raise_for_findings()
    return out


def model(i: Instruction, a: Array, b: Array, c: Array) -> Array:
    """float32 [CTAs, rows, 8] by torchext's model; arguments as the kernel's, c as float32."""
    results = []
    for x, y, z in zip(a, b, c, strict=True):
        whole_x, whole_y = (
            np.ascontiguousarray(np.concatenate(list(part.view(np.uint8)), -1)) for part in (x, y)
        )
        results.append(_sim.mma(i.unit, 90, i.accumulator, whole_x, i.a, whole_y, i.b, z, i.k))
    return np.stack(results)


def examples(i: Instruction, a: Array, b: Array, c: Array, *, gpu: Array, ours: Array) -> list[str]:
    """The first differing elements with their non-zero products, in order of K."""
    lines = []
    differs = np.argwhere(gpu.view(np.uint32) != ours.view(np.uint32))
    for cta, row, column in differs[:3]:
        x, y = (
            np.concatenate([
                _sim.decode(name, np.ascontiguousarray(step, np.uint32).reshape(-1))
                for step in part
            ]).astype(np.float64)
            for part, name in ((a[cta, :, row], i.a), (b[cta, :, column], i.b))
        )  # fmt: skip
        products = ", ".join(f"{k}:{p.hex()}" for k, p in enumerate(x * y) if p != 0)
        g, s, z = (float(v[cta, row, column]) for v in (gpu, ours, c))
        lines.append(
            f"    [{cta},{row},{column}] gpu {g.hex()} model {s.hex()} c {z.hex()} "
            f"exact {(float((x * y).sum()) + z).hex()} products {products}"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hardware.tensor_core")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ctas", type=int, default=32, help="CTAs for each case of wgmma")
    parser.add_argument("--only", default="", help="part of an instruction's name")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    driver = Driver() if options.device == "cuda" else None
    saved: dict[str, dict[str, Array]] = {}
    lines: list[str] = []
    wrong = elements = 0
    start = time.monotonic()
    for number, i in enumerate(INSTRUCTIONS):
        if options.only not in i.name:
            continue
        text = kernel(i)
        ctas = options.ctas * (1 if i.unit == "wgmma" else 4)
        for kind, make in KINDS.items():
            rng = np.random.default_rng([number, list(KINDS).index(kind)])
            a, b = make(rng, (ctas, i.steps, i.rows, i.k), (ctas, i.steps, 8, i.k), i.a, i.b)
            a, b = (np.ascontiguousarray(x) for x in (a, b))
            c = addends(rng, (ctas, i.rows, 8), kind, i.accumulator)
            kept = np.float16 if i.accumulator == "f16" else np.float32
            arrays = [a, b, c.astype(kept), np.full(c.shape, -1, kept)]
            block = 128 if i.unit == "wgmma" else 32
            try:
                raw = (on_simulator(text, ctas, block, arrays) if driver is None
                       else on_gpu(driver, text, ctas, block, arrays))  # fmt: skip
            except (RuntimeError, ValueError) as error:
                wrong += 1
                lines.append(f"FAILED {i.name} {kind}: {error}")
                print(lines[-1], flush=True)
                break
            ours = model(i, a, b, c)
            kept_ours = ours.astype(kept)
            bits = np.uint16 if kept == np.float16 else np.uint32
            differs = raw.view(bits) != kept_ours.view(bits)
            nans = differs & np.isnan(raw) & np.isnan(kept_ours)
            count = int((differs & ~nans).sum())
            wrong += bool(count)
            elements += differs.size
            said = "ok" if not count else f"DIFFERS: {count} of {differs.size}"
            if nans.any():
                said += f" ({int(nans.sum())} NaNs have other bits, such as " \
                        f"gpu 0x{int(raw.view(bits)[nans][0]):x})"  # fmt: skip
            lines.append(f"{i.name} {kind}: {said}")
            if count:
                shown_ours = np.where(nans, raw, kept_ours).astype(np.float32)
                lines += examples(i, a, b, c, gpu=raw.astype(np.float32), ours=shown_ours)
            print(lines[-1] if not count else "\n".join(lines[-4:]), flush=True)
            few = slice(0, (3 * ctas // 8) if count else 2)  # where all agree, a sample is enough
            key = i.name.replace(" ", "_")
            group = f"{i.unit.replace('.', '_')}-{i.accumulator}"
            for what, array in (("a", a), ("b", b), ("c", c), ("gpu", raw), ("model", kept_ours)):
                saved.setdefault(group, {})[f"{key}|{kind}|{what}"] = array[few]
    for group, data in saved.items():
        np.savez_compressed(options.out / f"tensor_core-{group}.npz", **data)  # type: ignore[arg-type]
    lines.append(
        f"{wrong} of {len([x for x in lines if not x.startswith(' ')])} cases differ, "
        f"{elements} elements, {time.monotonic() - start:.0f} s"
    )
    print(lines[-1])
    (options.out / "tensor_core.txt").write_text("\n".join(lines) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
