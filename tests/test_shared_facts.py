"""Facts that C++ and Python must both state agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from torchext import gemm_selection, recipe
from torchext._dispatch import layout

ROOT = Path(__file__).resolve().parents[1]
CPP = {
    path: re.sub(r"//.*", "", path.read_text())
    for folder in ("csrc", "ptx/sim")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".h", ".cpp", ".cuh", ".cu")
}


def enumerators(name: str, file: str) -> dict[str, int]:
    """{enumerator: value} of the only `enum class NAME` in files called `file`."""
    pattern = rf"enum class {name}\b[^{{]*{{([^}}]*)}}"
    (body,) = (
        match
        for path, text in CPP.items()
        if path.name == file
        for match in re.findall(pattern, text)
    )
    values: dict[str, int] = {}
    for item in filter(None, map(str.strip, body.split(","))):
        enumerator, _, value = item.partition("=")
        values[enumerator.strip()] = int(value) if value else len(values)
    return values


def test_granularities_and_groupings_of_products():
    granularities = enumerators("Granularity", "gemm.h")
    assert [name[1:].lower() for name in granularities] == [*gemm_selection._GRANULARITIES]
    assert [*granularities.values()] == [0, 1, 2]
    words = {
        "kNone": "none", "kOffsets": "offsets", "kRowIds": "group_ids", "kCounts": "masked",
        "kAlongK": "along_k",
    }  # fmt: skip
    groupings = enumerators("Grouping", "gemm.h")
    assert [words[name] for name in groupings] == [*gemm_selection._GROUPINGS]
    assert [*groupings.values()] == [0, 1, 2, 3, 4]


def test_granularities_of_recipes():
    names = enumerators("Granularity", "linear.cpp")
    assert [name[1:].lower() for name in names] == [*recipe.GRANULARITIES]
    assert [*names.values()] == [0, 1, 2]


def test_access_codes_of_the_simulator():
    assert enumerators("Access", "device.h") == {"read": 0, "write": 1, "read_write": 2}
    interface = (ROOT / "ptx/sim/api/op_interface.h").read_text()
    assert "uint32_t access;  // 0 read, 1 write, 2 read and write" in interface


def test_tensor_map_codes():
    arguments = pytest.importorskip("torchext.sim.arguments")
    elements = enumerators("Element", "device.h")
    types = arguments._TENSOR_MAP_TYPES
    names = {"u8": "uint8", "f16": "float16", "f32": "float32", "bf16": "bfloat16"}
    assert elements == {short: types[name] for short, name in names.items()}
    cuda = next(iter(Path("/usr/local").glob("cuda*/include/cuda.h")), None)
    if cuda is not None:  # the source of both
        text = cuda.read_text()
        enum = re.search(r"typedef enum CUtensorMapDataType_enum \{(.*?)\}", text, re.DOTALL)
        assert enum is not None
        codes = re.findall(r"CU_TENSOR_MAP_DATA_TYPE_(\w+)", enum[1])
        official = {"u8": "UINT8", "f16": "FLOAT16", "f32": "FLOAT32", "bf16": "BFLOAT16"}
        assert elements == {short: codes.index(name) for short, name in official.items()}


def test_elements_that_share_a_scale():
    found = [
        int(value)
        for text in CPP.values()
        for value in re.findall(r"constexpr int64_t kScaleGroup = (\d+);", text)
    ]
    assert found == [layout.GROUP]


def test_largest_fp8_values():
    """C++ states the largest FP8 values as constants; each is one of PyTorch's two."""
    stated = [
        float(value)
        for path, text in CPP.items()
        if "csrc" in path.parts
        for value in re.findall(r"\bkMax = (\d+(?:\.\d+)?)f?;", text)
    ]
    largest = {torch.finfo(dtype).max for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
    assert set(stated) == largest
