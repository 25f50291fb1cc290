"""The table of GPUs (csrc/runtime/architectures.inc): what C++ and Python read from it, the path of
each GPU, the documents, and that no other file states the table's facts."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

import architecture_tables
import architectures
import nvcc
from torchext import _architectures
from torchext._dispatch.c_api import c_function

ROOT = Path(__file__).resolve().parents[1]
ROWS = architectures.ARCHITECTURES


def test_the_library_and_the_build_read_one_table():
    assert _architectures.architectures() == ROWS
    assert _architectures.limits() == architectures.LIMITS
    assert list(_architectures.paths().items()) == list(architectures.PATHS.items())
    table = json.loads(c_function("torchext_architectures")())
    assert table.keys() == {"paths", "limits", "architectures"}


def test_rows_are_in_order_and_paths_latest_first():
    assert list(ROWS) == sorted(ROWS)
    numbers = list(architectures.PATHS.values())
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[-1] == min(ROWS)  # every GPU of the table has a path


# ---- the path of every GPU ----


@pytest.mark.parametrize(
    ("capability", "path"),
    [(75, "plain"), (80, "sm80"), (86, "sm80"), (87, "sm80"), (88, "sm80"), (89, "sm89"),
     (90, "sm90"), (100, "sm80"), (103, "sm80"), (110, "sm80"), (120, "sm89"), (121, "sm89")],
)  # fmt: skip
def test_path_of_every_row(capability, path):
    assert ROWS[capability].path == path
    assert _architectures.path_of(capability) == path


def test_every_row_has_its_path_tested():
    (mark,) = test_path_of_every_row.pytestmark
    assert {capability for capability, _ in mark.args[1]} == ROWS.keys()


@pytest.mark.parametrize(
    ("capability", "path"),
    [
        (82, "sm80"),  # the path of the last earlier row of the major version
        (101, "sm80"), (107, "sm80"), (115, "sm80"), (122, "sm89"),
        (95, "sm89"),  # 9.0's kernels run only on 9.0
        (130, "sm89"), (255, "sm89"), (256, "sm89"), (990, "sm89"),  # unknown major versions
        (74, None), (70, None), (0, None), (-10, None),  # before the first row
    ],
)  # fmt: skip
def test_path_of_a_gpu_without_a_row(capability, path):
    assert capability not in ROWS
    assert _architectures.path_of(capability) == path


def test_a_path_suits_the_instructions_of_its_gpus():
    for row in ROWS.values():
        needed = {"sm90": row.wgmma and row.tma, "sm89": row.fp8_mma, "sm80": row.bf16_mma}
        assert needed.get(row.path, True), row.capability
        better = [path for path in ("sm90", "sm89", "sm80") if needed[path]]
        assert row.path == (better[0] if better else "plain"), row.capability


# ---- numbers ----

# What NVIDIA's data sheets say, dense, in TFLOPS: (FP8, FP16 or BF16).
TERAFLOPS = {
    75: (None, 65), 80: (None, 312), 86: (None, 149.7), 87: (None, 43), 89: (733, 362),
    90: (1979, 989), 100: (4500, 2250), 103: (4500, 2250), 110: (2070 / 4, 2070 / 8),
    120: (419, 209.5),
}  # fmt: skip


@pytest.mark.parametrize("capability", TERAFLOPS)
def test_rates_are_the_data_sheets(capability):
    row = ROWS[capability]
    per_rate = 2 * row.sms * row.mhz * 1e6 / 1e12
    for rate, teraflops in zip((row.fp8_macs, row.fp16_macs), TERAFLOPS[capability], strict=True):
        assert rate * per_rate == pytest.approx(teraflops or 0, rel=0.02)


def test_shared_memory_and_clusters_are_consistent():
    for row in ROWS.values():
        reserved = row.shared_per_sm - row.shared_per_block
        assert reserved == (0 if row.capability < 80 else 1 << 10)  # the driver's share
        assert row.threads_per_sm % 32 == 0
        assert (row.ctas_per_cluster > 0) == row.tma  # both came with Hopper
        assert row.ctas_per_cluster <= row.ctas_per_cluster_max


# ---- the build ----


def test_paths_have_their_folder_and_target():
    for name, number in architectures.PATHS.items():
        folder = ROOT / "csrc" / "gemm" / f"sm{number}"
        assert list(folder.glob("*.cu")), name
        assert nvcc.architectures(folder / "x.cu") == {ROWS[number].target: (ROWS[number].target,)}
    assert nvcc.gencodes(Path("csrc/gemm/sm100/x.cu")) == [
        "-gencode=arch=compute_100f,code=sm_100f"  # no PTX, which no later generation could run
    ]


# ---- documents ----


def test_the_documents_table_is_current():
    document = architecture_tables.DOCUMENT.read_text()
    assert document == architecture_tables.with_table(document)
    stale = document.replace("| `sm80` |", "| `sm89` |", 1)
    assert stale != architecture_tables.with_table(stale)


def test_the_document_says_which_gpus_take_a_path():
    document = architecture_tables.DOCUMENT.read_text()
    for path in architectures.PATHS:
        takers = [f"{n // 10}.{n % 10}" for n, row in ROWS.items() if row.path == path]
        assert re.search(rf"^\| `{path}` \(.*\) \| {', '.join(takers)} \|", document, re.MULTILINE)


def test_the_document_says_what_is_compiled():
    document = architecture_tables.DOCUMENT.read_text()
    folders = [f"csrc/gemm/sm{number}" for number in architectures.PATHS.values()]
    for folder in [*folders, "csrc/quantize/cuda"]:
        (cells,) = re.findall(rf"^\| `{folder}` \| (.*?) \| (.*?) \|", document, re.MULTILINE)
        options = nvcc.gencodes(ROOT / folder / "x.cu")
        codes = " ".join(option.partition(",code=")[2] for option in options)
        assert re.findall(r"sm_\w+", cells[0]) == re.findall(r"sm_\w+", codes)
        assert re.findall(r"compute_\w+", cells[1]) == re.findall(r"compute_\w+", codes)


# ---- each fact stands once ----

# Left out: Turing's 64 KiB, a number that has other uses in too many files.
SHARED = {n for row in ROWS.values() for n in (row.shared_per_sm, row.shared_per_block)} - {65536}
SIZES = "|".join(str(size >> 10) for size in SHARED)
BYTES = "|".join(map(str, SHARED))
NUMBERS = "|".join(map(str, ROWS))
PATHS = "|".join(path for path in architectures.PATHS if path != "plain")
COPIES = {
    "shared memory of an SM or a block": rf"\b(?:{SIZES})u? *(?:<< *10|\* *1024)\b|\b(?:{BYTES})\b",
    "a list of capabilities": rf"\b(?:{NUMBERS})\b(?:,\s*(?:{NUMBERS})\b){{2,}}",
    "capabilities compared one by one": rf"(?:== *(?:{NUMBERS})\b[^;\n]*\|\| *[^;\n]*){{2,}}",
    "a tensor core's peak": r"(?i)(?:peak|tensor_?macs|macs_?per)\w*\b[^\n=()]*= *\{?[^\n;]*"
    r"\b(?:512|1024|2048|4096|8192)\b",
    "the numbers of the paths": rf"[\"'](?:{PATHS})[\"']: *(?:{NUMBERS})\b",
    "the order of the paths": r"Path::sm\d+,\s*Path::sm\d+",
}
# Files that may state the facts: the table, and tests whose expectations must not come from it.
INDEPENDENT = {
    "csrc/runtime/architectures.inc", "tests/test_architectures.py", "tests/sim/test_targets.py",
    "tests/packaging/test_sass_report.py",
}  # fmt: skip


def copies(text: str) -> list[str]:
    return [
        f"{what}: {match[0]!r}"
        for what, pattern in COPIES.items()
        for match in re.finditer(pattern, text)
    ]


def test_no_file_repeats_the_table():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "csrc", "ptx", "torchext", "tests",
         "tools", "benchmarks", "setup.py", "Makefile"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    suffixes = {".h", ".cpp", ".cu", ".cuh", ".inc", ".py", ""}
    files = [ROOT / line for line in listed.stdout.splitlines()]
    files = [path for path in files if path.suffix in suffixes and path.is_file()]
    assert len(files) > 200
    found = [
        f"{path.relative_to(ROOT)}: {copy}"
        for path in files
        if str(path.relative_to(ROOT)) not in INDEPENDENT
        for copy in copies(path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "227 << 10", "227 * 1024", "99u << 10", "232448", "(75, 80, 86)", "[80, 86, 87, 89]",
        "target == 80 || target == 86 || target == 87", "kTensorMacs = 4096",
        'PEAK = {("90", "QGMMA"): 4096}', '{"sm90": 90}', "{Path::sm90, Path::sm89}",
    ],
)  # fmt: skip
def test_a_second_copy_is_found(text):
    assert copies(text)


@pytest.mark.parametrize(
    "text", ["48 << 10", "x == 80", "(80, 86)", "1024 * 1024", "(75, 25, 0)", "peak = rate(x)"]
)
def test_other_numbers_are_no_copies(text):
    assert not copies(text)
