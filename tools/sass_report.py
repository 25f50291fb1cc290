"""Writes docs/sass_report.md, figures of the kernels' machine code, and checks that none got worse.

    python tools/sass_report.py            writes the table
    python tools/sass_report.py --check    compares the build with it

Needs no GPU: the script extracts the machine code from the op library with cuobjdump and nvdisasm.
HEADER explains the table's columns.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc" / "build"))

import sass  # noqa: E402
from architectures import ARCHITECTURES, LIMITS  # noqa: E402
from elf import Elf, KernelAttributes, dynamic_shared_bytes, kernel_attributes  # noqa: E402
from toolchain import find_toolkit, installed_site_packages  # noqa: E402

TABLE = ROOT / "docs" / "sass_report.md"
LIBRARY = ROOT / "torchext" / "_C.so"

HEADER = """\
# What the compiler made of every kernel

`make sass-report` writes this file; do not edit it by hand. `make test` compares the build with it.
A kernel fails if it needs more registers, spills, local memory or issue cycles than the table says,
or if fewer of its CTAs fit on an SM. Then improve the kernel, or write this table again and commit
it with the change.

Compiler: ptxas {compiler}

All figures are read from machine code; nothing was run.

- **regs**: registers per thread at launch. **spills**: accesses to local memory (LDL, STL).
  **local**: bytes of local memory per thread. **shared**: bytes of shared memory, static + dynamic.
  The static bytes include 1,024 of the system; the dynamic ones are in the launcher's table.
- **CTAs**: how many fit on an SM by registers, shared memory, threads and the limit of CTAs (CUDA
  C++ Programming Guide, compute capabilities). GEMM kernels that reallocate registers (setmaxnreg)
  are made for one.
- GEMMs: figures are for one consumer warp and one K block (128 of K) of the CTA's tile, which is in
  the kernel's name. The main loop is the innermost loop with tensor-core instructions; if there are
  several, the one with the most issue cycles per multiply-add. If a K block takes several
  iterations, the loop around the main loop counts once. **instr**: instructions that a warp issues
  if all waits succeed at once and the K block is no special case. **aside**: the loop's other
  instructions (waiting, edges of groups along K). Included in instr: **mma**, tensor-core
  instructions; **fp32**, FFMA, FMUL and FADD (promotion); **loads**, LDS, LDSM and LDG;
  **barriers**, waits, arrivals and fences.
- **issue**: cycles that a scheduler needs to issue a K block: instr x consumer warps of the CTA / 4
  schedulers, at one instruction per cycle. **tensor**: cycles that the tensor cores need for the
  same K block at their peak. **issue/tensor**: below 1, warps that take turns can hide the
  promotion behind the tensor cores; above 1 they cannot.
- Peak multiply-adds per cycle per SM, from NVIDIA's data sheets (dense rate / SMs / boost clock /
  2): sm_90 4,096 in FP8 (H100 SXM: 1,979 TFLOPS, 132 SMs, 1.83 GHz); sm_89 1,024 in FP8 (L40S: 733
  TFLOPS, 142 SMs, 2.52 GHz); sm_80 1,024 in BF16 (A100: 312 TFLOPS, 108 SMs, 1.41 GHz).
- Other kernels: **loads** and **stores** are instructions that access global memory, by width in
  bits.
"""

PRODUCTS = ("kernel", "sm", "threads", "regs", "spills", "local", "shared", "CTAs", "mma shape",
            "instr", "aside", "mma", "fp32", "loads", "barriers", "issue", "tensor",
            "issue/tensor")  # fmt: skip
OTHERS = ("kernel", "sm", "threads", "regs", "spills", "local", "shared", "CTAs", "instr", "loads",
          "stores", "LDS", "barriers", "TMA")  # fmt: skip
# Columns whose figures must not grow, and those whose figures must not shrink.
COSTS, GAINS = ("regs", "spills", "local", "issue"), ("CTAs",)

Row = dict[str, str]  # column -> cell
Key = tuple[str, str]  # kernel, architecture


class ReportError(Exception):
    """The report cannot be made; the message gives the reason and a remedy."""


def ctas_per_sm(architecture: str, threads: int, registers: int, shared_bytes: int) -> int | None:
    """The number of CTAs that fit on an SM; None for an unknown architecture.

    registers: per thread. shared_bytes: per CTA, including the system's.
    """
    gpu = ARCHITECTURES.get(int(architecture))
    if gpu is None:
        return None
    warps = -(-threads // 32)
    unit = LIMITS["registers_per_warp_unit"]
    of_warp = -(-registers * 32 // unit) * unit
    by = [gpu.threads_per_sm // (32 * warps), gpu.ctas_per_sm]
    by.append(LIMITS["registers_per_sm"] // of_warp // warps)
    if shared_bytes:
        by.append(gpu.shared_per_sm // shared_bytes)
    return min(by)


def peak(architecture: str, unit: str) -> int:
    """Peak multiply-adds per cycle per SM for instructions of `unit` (QGMMA, ...); 0 if unknown.

    Also 0 for mma.sync on GPUs with wgmma or tcgen05, where it does not reach the peak.
    """
    gpu = ARCHITECTURES.get(int(architecture))
    if gpu is None or (unit in ("QMMA", "HMMA") and (gpu.wgmma or gpu.tcgen05)):
        return 0
    if unit in ("QGMMA", "QMMA"):
        return gpu.fp8_macs
    return gpu.fp16_macs if unit in ("HGMMA", "HMMA") else 0


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(int(value)) if value == int(value) else f"{value:.1f}"


def describe(
    name: str,
    architecture: str,
    code: list[sass.Instruction],
    attributes: KernelAttributes,
    dynamic: int | None,
) -> Row:
    """A kernel's row, with the columns PRODUCTS if it has tensor-core instructions, else OTHERS.

    dynamic: bytes of dynamic shared memory; None if the launchers' tables lack the kernel.
    """
    number_only = architecture.rstrip("af")
    whole = sass.count(code)
    gpu = ARCHITECTURES.get(int(number_only))
    reserved = gpu.shared_per_sm - gpu.shared_per_block if gpu else 0
    shared = max(attributes.shared_bytes, reserved) + (dynamic or 0)
    threads = attributes.max_threads
    ctas = ctas_per_sm(number_only, threads, attributes.registers, shared) if threads else None
    row = {
        "kernel": name,
        "sm": architecture,
        "threads": number(threads),
        "regs": str(attributes.registers),
        "spills": str(whole["spills"]),
        "local": str(attributes.frame_bytes),
        "shared": str(attributes.shared_bytes) + (f"+{dynamic}" if dynamic is not None else ""),
        "CTAs": number(ctas),
    }
    loop = sass.main_loop(name, code, threads or 1024)
    if loop is None:

        def widths(access: str) -> str:
            kinds = sorted((k for k in whole if k.startswith(f"{access}.")), reverse=True)
            return " ".join(f"{kind.partition('.')[2]}:{whole[kind]}" for kind in kinds) or "-"

        return row | {
            "instr": str(whole["all"]),
            "loads": widths("LDG"),
            "stores": widths("STG"),
            "LDS": str(whole["LDS"]),
            "barriers": str(whole["barriers"]),
            "TMA": str(whole["tma"]),
        }
    rate = peak(number_only, loop.mma.unit)
    tensor = loop.macs / rate if rate else None
    row["mma shape"] = f"{loop.mma.unit} {'x'.join(map(str, loop.mma.shape))}"
    row["instr"], row["aside"] = number(loop.counts["all"]), number(loop.aside)
    for column in ("mma", "fp32", "loads", "barriers"):
        row[column] = number(loop.counts.get(column, 0))
    return row | {
        "issue": number(loop.issue_cycles),
        "tensor": number(tensor),
        "issue/tensor": f"{loop.issue_cycles / tensor:.2f}" if tensor else "-",
    }


def find_tool(name: str) -> Path:
    """The path of CUDA's program `name`: on PATH, in a toolkit, or in PyPI's packages."""
    toolkit = find_toolkit()
    folders = [toolkit.home / "bin"] if toolkit else []
    folders += [
        folder for site in installed_site_packages() for folder in site.glob("nvidia/cu*/bin")
    ]
    on_path = shutil.which(name)
    found = [Path(on_path)] if on_path else [f / name for f in folders if (f / name).exists()]
    if not found:
        raise ReportError(
            f"{name}: not on PATH, in the CUDA toolkit or among PyPI's packages; `make` installs it"
            f" (pip install nvidia-cuda-{name})"
        )
    return found[0]


def extract(library: Path, folder: Path) -> list[Path]:
    """Extracts the library's cubins into `folder`. Their names include the architecture."""
    done = subprocess.run(
        [str(find_tool("cuobjdump")), "-xelf", "all", str(library.resolve())],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    cubins = sorted(folder.glob("*.cubin"))
    if not cubins and "does not contain device code" not in done.stdout + done.stderr:
        raise ReportError(f"cuobjdump {library.name}: {(done.stdout + done.stderr).strip()}")
    return cubins


def measure(library: Path) -> tuple[str, dict[Key, Row]]:
    """The compiler's version, and a row for each kernel and architecture in `library`."""
    if not library.is_file():
        raise ReportError(
            f"sass_report: --library must be a built library (got {library}); run `make`"
        )
    nvdisasm = find_tool("nvdisasm")
    with tempfile.TemporaryDirectory() as name:
        cubins = extract(library, Path(name))
        attributes = {cubin: kernel_attributes(Elf(cubin.read_bytes())) for cubin in cubins}
        threads = {k: a.max_threads for found in attributes.values() for k, a in found.items()}
        dynamic = dynamic_shared_bytes(
            Elf(library.read_bytes()), {k: t for k, t in threads.items() if t}
        )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            listings = list(pool.map(lambda cubin: sass.disassemble(nvdisasm, cubin), cubins))
    rows: dict[Key, Row] = {}
    for cubin, (_, functions) in zip(cubins, listings, strict=True):
        architecture = cubin.name.split(".")[-2].removeprefix("sm_")
        for kernel, known in attributes[cubin].items():
            rows[kernel, architecture] = describe(
                kernel, architecture, functions[kernel], known, dynamic.get(kernel)
            )
    return " and ".join(sorted({version for version, _ in listings})), rows


def render(compiler: str, rows: dict[Key, Row]) -> str:
    parts = [HEADER.format(compiler=compiler)]
    ordered = [rows[key] for key in sorted(rows)]
    for title, columns in (("GEMMs", PRODUCTS), ("Other kernels", OTHERS)):
        mine = [row for row in ordered if ("mma shape" in row) == (columns is PRODUCTS)]
        if mine:
            rule = [":--" if c in ("kernel", "mma shape") else "--:" for c in columns]
            lines = [columns, rule, *([row[c] for c in columns] for row in mine)]
            parts.append(
                f"## {title}\n\n" + "\n".join(f"| {' | '.join(x)} |" for x in lines) + "\n"
            )
    return "\n".join(parts)


def parse(text: str) -> tuple[str, dict[Key, Row]]:
    """The compiler and rows of a text that `render` wrote."""
    compiler, rows, columns = "", {}, []
    for line in text.splitlines():
        if line.startswith("Compiler: ptxas "):
            compiler = line.removeprefix("Compiler: ptxas ").strip()
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "kernel":
            columns = cells
        elif not cells[0].startswith(":--"):
            row = dict(zip(columns, cells, strict=True))
            rows[row["kernel"], row["sm"]] = row
    return compiler, rows


def compare(table: dict[Key, Row], build: dict[Key, Row]) -> tuple[list[str], list[str]]:
    """(faults, other changes), a line each. A fault is a figure that got worse, or a kernel that
    only one side has."""
    faults = [
        f"{kernel} (sm_{sm}): is not in the table"
        for kernel, sm in sorted(build.keys() - table.keys())
    ]
    faults += [
        f"{kernel} (sm_{sm}): is in the table, but not in the build"
        for kernel, sm in sorted(table.keys() - build.keys())
    ]
    changes: list[str] = []
    for key in sorted(table.keys() & build.keys()):
        old, new = table[key], build[key]
        where = f"{key[0]} (sm_{key[1]})"
        for column in dict.fromkeys([*old, *new]):
            before, after = old.get(column, "-"), new.get(column, "-")
            if before == after:
                continue
            line = f"{where}: {column} {before} -> {after}"
            (faults if is_worse(column, before, after) else changes).append(line)
    return faults, changes


def is_worse(column: str, before: str, after: str) -> bool:
    if column not in COSTS + GAINS:
        return False
    if "-" in (before, after):
        return True  # the figure appeared or disappeared: a person must look
    growth = float(after) - float(before)
    return growth > 0 if column in COSTS else growth < 0


REMEDY = "make sass-report"


def check(library: Path, table: Path) -> int:
    """Exit status 0: no kernel got worse, or there is nothing to compare. 1: a kernel got worse."""
    if not table.exists():
        print(f"{table.name} is missing: run `{REMEDY}` and commit it", file=sys.stderr)
        return 1
    expected, old = parse(table.read_text())
    compiler, new = measure(library)
    if not new:
        print("static report: skipped, the build has no CUDA kernels")
        return 0
    if compiler != expected:
        print(
            f"static report: skipped, this build was compiled by ptxas {compiler} and {table.name}"
            f" is of {expected}"
        )
        return 0
    faults, changes = compare(old, new)
    _list("worse than docs/sass_report.md says", faults, sys.stderr)
    _list("changed", changes, sys.stdout)
    if faults:
        print(
            f"if the change is worth it, run `{REMEDY}` and commit the table with the change",
            file=sys.stderr,
        )
        return 1
    print(
        f"static report: {len(new)} kernels, none worse"
        + (f"; run `{REMEDY}`" if changes else " or changed")
    )
    return 0


def _list(title: str, lines: Iterable[str], stream: TextIO, most: int = 60) -> None:
    lines = list(lines)
    if lines:
        print(f"{title}:", *lines[:most], sep="\n  ", file=stream)
    if len(lines) > most:
        print(f"  and {len(lines) - most} more", file=stream)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--library", type=Path, default=LIBRARY)
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args(arguments)
    try:
        if options.check:
            return check(options.library, options.table)
        compiler, rows = measure(options.library)
        if not rows:
            raise ReportError("the build has no CUDA kernels: install nvcc and build again")
    except ReportError as error:
        print(error, file=sys.stderr)
        return 1
    options.table.write_text(render(compiler, rows))
    print(f"{options.table}: {len(rows)} kernels, ptxas {compiler}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
