"""tools/sass_report.py: loops and counts from machine code, and what the check accepts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import sass
import sass_report
import toolchain
from elf import KernelAttributes

ROOT = Path(__file__).parents[2]

# A persistent kernel as ptxas lays it out. A loop over tiles (1 to 12) contains a main loop (2 to
# 9). If the first try of its wait fails, the wait spins out of line (14, 15) and jumps back (16).
PERSISTENT = """\
    S2R R0,SR_TID.X
    MOV R24,RZ
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0,[UR4],R2
@!P0 BRA 0xe0
    QGMMA.64x128x32.F32.E4M3.E4M3 R24,gdesc[UR20],RZ,!UPT
    QGMMA.64x128x32.F32.E4M3.E4M3 R24,gdesc[UR20],R24,gsb0
    WARPGROUP.DEPBAR.LE gsb0,0x0
    LDS R3,[R4]
    FFMA R5,R24,R3,R5
@P1 BRA 0x20
    STG.E.128 [R6],R8
    LDG.E.U16 R7,[R6]
@P2 BRA 0x10
    EXIT
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0,[UR4],R2
@!P0 BRA 0xe0
    BRA 0x40
"""
TILE_64 = "sm90_fp8_gemm_nt_1d2d_e4m3_e4m3_64x128x64"  # one warpgroup computes: K block = 2 QGMMA


def code(text: str) -> list[sass.Instruction]:
    found = []
    for line in text.splitlines():
        words = line.split()
        predicate = words.pop(0) if words[0].startswith("@") else ""
        found.append(sass.Instruction(predicate, words[0], "".join(words[1:])))
    return found


def test_the_main_loop_is_the_innermost_and_a_spinning_wait_is_no_work():
    loops = sass.Flow(code(PERSISTENT)).loops()
    assert len(loops) == 3
    loop = sass.main_loop(TILE_64, code(PERSISTENT), threads=256)
    assert loop is not None and loop.blocks == 1 and loop.warps == 4
    expected = {"all": 8, "mma": 2, "fp32": 1, "loads": 1, "LDS": 1, "barriers": 2}
    assert {key: loop.counts[key] for key in expected} == expected
    assert loop.aside == 3
    assert loop.issue_cycles == 8
    assert loop.macs == 64 * 128 * 64


def test_an_unrolled_loop_counts_for_as_many_k_blocks_as_it_multiplies():
    lines = PERSISTENT.splitlines()
    twice = lines[:9] + [line for line in lines[4:9]] + lines[9:]
    twice = [line.replace("0xe0", "0x130") for line in twice]  # 5 instructions further down
    loop = sass.main_loop(TILE_64, code("\n".join(twice)), threads=256)
    assert loop is not None and loop.blocks == 2
    assert loop.counts["mma"] == 2 and loop.counts["all"] == 6.5 and loop.aside == 1.5
    two_warpgroups = sass.main_loop(TILE_64.replace("_64x", "_128x"), code(PERSISTENT), threads=384)
    assert two_warpgroups is not None and two_warpgroups.blocks == 1
    assert two_warpgroups.issue_cycles == 16  # two warps per scheduler


def test_the_way_through_a_loop_has_all_arithmetic_and_nothing_special():
    text = """\
    QGMMA.64x128x32.F32.E4M3.E4M3 R24,gdesc[UR20],R24
@!P1 BRA 0x50
    LOP3.LUT R1,R1,R2,RZ
    LOP3.LUT R1,R1,R2,RZ
    LOP3.LUT R1,R1,R2,RZ
@!P2 BRA 0x70
    FFMA R5,R24,R3,R5
@P3 BRA 0x0
    EXIT
"""
    loop = sass.main_loop("a_64x128x32", code(text), threads=256)
    assert loop is not None and loop.counts["fp32"] == 1  # skipped only for the first block
    assert loop.counts["all"] == 5 and loop.aside == 3


def test_of_several_main_loops_the_costliest_is_shown():
    short = "QGMMA.64x128x32.F32.E4M3.E4M3 R24,gdesc[UR20],R24\n@P0 BRA 0x0\n"
    long = "QGMMA.64x128x32.F32.E4M3.E4M3 R24,gdesc[UR20],R24\nFADD R1,R1,R1\n@P0 BRA 0x20\nEXIT\n"
    loop = sass.main_loop("a_64x128x32", code(short + long), threads=256)
    assert loop is not None and loop.counts["all"] == 3


def test_mma_sync_is_counted_by_warps():
    text = "HMMA.16816.F32.BF16 R4,R8,R12,R4\nHMMA.16816.F32.BF16 R4,R8,R12,R4\n@P0 BRA 0x0\nEXIT\n"
    loop = sass.main_loop("mma80_fp8_gemm_nt_16x16x32", code(text), threads=64)
    assert loop is not None and loop.warps == 2 and loop.mma.shape == (16, 8, 16)
    assert loop.blocks == 1 and loop.macs == 16 * 16 * 32
    split = sass.main_loop("mma80_fp8_linear_f32_e4m3_16x16x32", code(text), threads=64)
    assert split is not None and split.blocks == 1 / 3 and split.macs == 3 * 16 * 16 * 32
    nameless = sass.main_loop("mma80", code(text), threads=64)
    assert nameless is not None and nameless.blocks is None and nameless.counts["mma"] == 2
    with pytest.raises(RuntimeError, match="no loop around any"):
        sass.main_loop("x", code(text.replace("@P0 BRA 0x0\n", "")), threads=64)


def test_steps_of_a_k_block_in_a_loop_of_their_own_count_as_often_as_they_run():
    text = """\
    LDSM.16.M88.4 R8,[R2]
    HMMA.16816.F32.BF16 R4,R8,R12,R4
@P0 BRA 0x10
    FFMA R1,R4,R2,R1
@P1 BRA 0x0
    EXIT
"""
    loop = sass.main_loop("mma80_fp8_gemm_nt_16x8x128", code(text), threads=32)
    assert loop is not None and loop.blocks == 1 / 8
    assert loop.counts["mma"] == 8 and loop.counts["fp32"] == 1 and loop.counts["loads"] == 1
    assert loop.counts["all"] == 8 * 2 + 3


def test_an_indirect_branch_may_go_where_nothing_else_does():
    text = "BRX R2-0x10\nHMMA.16816.F32 R4,R8,R12,R4\n@P0 BRA 0x10\nEXIT\n"
    assert sass.main_loop("x", code(text), threads=32) is not None


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "ctas"),
    [
        ("90", 384, 168, 1024, 1),
        ("90", 256, 64, 1024, 4),
        ("90", 128, 32, 1024, 16),
        ("90", 32, 16, 1024, 32),
        ("90", 128, 32, 100 * 1024, 2),
        ("80", 128, 32, 100 * 1024, 1),
        ("89", 1024, 32, 1024, 1),
        ("75", 256, 64, 0, 4),
        ("100", 128, 32, 0, 16),
        ("95", 128, 32, 0, None),
    ],
)
def test_occupancy(architecture, threads, registers, shared, ctas):
    assert sass_report.ctas_per_sm(architecture, threads, registers, shared) == ctas


@pytest.mark.parametrize(
    ("architecture", "unit", "multiply_adds"),
    [
        ("90", "QGMMA", 4096), ("90", "HGMMA", 2048), ("89", "QMMA", 1024), ("80", "HMMA", 1024),
        ("90", "HMMA", 0), ("80", "QMMA", 0), ("80", "IMMA", 0), ("95", "HMMA", 0),
    ],
)  # fmt: skip
def test_peak_rates(architecture, unit, multiply_adds):
    assert sass_report.peak(architecture, unit) == multiply_adds


def report(text: str = PERSISTENT, registers: int = 168, name: str = TILE_64) -> dict:
    attributes = KernelAttributes(registers, 0, 1024, 256)
    return {(name, "90a"): sass_report.describe(name, "90a", code(text), attributes, 4096)}


def test_a_row_says_what_the_issue_must_hide_behind_and_survives_the_table():
    rows = report() | {
        ("copy", "80"): sass_report.describe(
            "copy", "80", code("LDG.E.128 R1,[R2]\nSTG.E R1,[R2]\nEXIT\n"),
            KernelAttributes(32, 0, 0, 128), None,
        )
    }  # fmt: skip
    row = rows[TILE_64, "90a"]
    assert row["shared"] == "1024+4096" and row["CTAs"] == "1" and row["spills"] == "0"
    assert (row["issue"], row["tensor"]) == ("8", str(64 * 128 * 64 // 4096))
    assert row["issue/tensor"] == "0.06"
    assert rows["copy", "80"]["loads"] == "128:1" and rows["copy", "80"]["stores"] == "32:1"
    assert sass_report.parse(sass_report.render("13.0.88", rows)) == ("13.0.88", rows)


def test_worse_is_a_fault_and_better_is_a_change():
    base = report()
    assert sass_report.compare(base, base) == ([], [])
    longer = PERSISTENT.replace("    FFMA R5,R24,R3,R5\n", "    FFMA R5,R24,R3,R5\n    NOP\n")
    longer = longer.replace("0xe0", "0xf0")
    faults, changes = sass_report.compare(base, report(longer))
    assert faults == [f"{TILE_64} (sm_90a): issue 8 -> 9"]
    assert any("instr 8 -> 9" in change for change in changes)
    faults, changes = sass_report.compare(report(longer), base)
    assert not faults and any("issue 9 -> 8" in change for change in changes)
    faults, _ = sass_report.compare(report(registers=128), base)
    assert faults == [
        f"{TILE_64} (sm_90a): regs 128 -> 168",
        f"{TILE_64} (sm_90a): CTAs 2 -> 1",
    ]
    spilling = PERSISTENT.replace("LDG.E.U16 R7,[R6]", "LDL R7,[R1]")
    faults, _ = sass_report.compare(base, report(spilling))
    assert faults == [f"{TILE_64} (sm_90a): spills 0 -> 1"]
    faults, _ = sass_report.compare(base, report(name="other_64x128x64"))
    assert len(faults) == 2 and "not in the table" in faults[0] and "not in the build" in faults[1]


# Two kernels, and a launcher's table that has one of them.
SOURCE = """
extern "C" __global__ void __launch_bounds__(64) copy_kernel(const float4* x, float4* y) {
  extern __shared__ float4 staged[];
  staged[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = staged[63 - threadIdx.x];
}
extern "C" __global__ void fill(float* y) { y[threadIdx.x] = 1; }
struct Kernel {
  const char* name;
  int rows;
  unsigned threads, shared_bytes;
};
extern "C" {
extern const Kernel kernels[];
const Kernel kernels[] = {{"copy_kernel", 7, 64, 5120}};
}
"""


@pytest.mark.skipif(toolchain.find_toolkit() is None, reason="no nvcc")
@pytest.mark.slow
def test_report_and_check_of_a_compiled_library(tmp_path: Path, capsys: pytest.CaptureFixture):
    toolkit = toolchain.find_toolkit()
    assert toolkit is not None
    source, library, table = tmp_path / "k.cu", tmp_path / "k.so", tmp_path / "report.md"
    source.write_text(SOURCE)
    command = [toolkit.nvcc, "-shared", "-Xcompiler=-fPIC", f"-L{toolkit.library_dir}"]
    gencode = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]
    subprocess.run([*command, *gencode, "-o", library, source], check=True)
    options = ["--library", str(library), "--table", str(table)]

    assert sass_report.main([*options, "--check"]) == 1
    assert "is missing: run `make sass-report`" in capsys.readouterr().err
    assert sass_report.main(options) == 0
    compiler, rows = sass_report.parse(table.read_text())
    assert set(rows) == {(k, sm) for k in ("copy_kernel", "fill") for sm in ("80", "90a")}
    row = rows["copy_kernel", "90a"]
    assert (row["threads"], row["loads"], row["stores"]) == ("64", "128:1", "128:1")
    assert row["shared"].endswith("+5120") and row["CTAs"] == "32"
    assert rows["fill", "80"]["CTAs"] == "-"  # launch bounds do not give the number of threads

    assert sass_report.main([*options, "--check"]) == 0
    assert "4 kernels, none worse or changed" in capsys.readouterr().out
    written = table.read_text()
    line = next(x for x in written.splitlines() if x.startswith("| copy_kernel | 90a"))
    registers = int(row["regs"])
    for regs, status, message in (
        (registers - 1, 1, f"regs {registers - 1} -> {registers}"),
        (registers + 1, 0, "none worse; run `make sass-report`"),
    ):
        doctored = line.replace(f"| 64 | {registers} |", f"| 64 | {regs} |")
        table.write_text(written.replace(line, doctored))
        assert sass_report.main([*options, "--check"]) == status
        output = capsys.readouterr()
        assert message in output.out + output.err
    table.write_text(written.replace(line + "\n", ""))
    assert sass_report.main([*options, "--check"]) == 1
    assert "copy_kernel (sm_90a): is not in the table" in capsys.readouterr().err
    table.write_text(written.replace(f"ptxas {compiler}", "ptxas 12.0.1"))
    assert sass_report.main([*options, "--check"]) == 0
    assert f"skipped, this build was compiled by ptxas {compiler}" in capsys.readouterr().out
