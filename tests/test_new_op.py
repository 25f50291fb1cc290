"""CONTRIBUTING.md's list "A new op" holds for every op: each place names the op, or runs it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import torchext
from torchext import ops
from torchext._catalog import CATALOG

ROOT = Path(__file__).resolve().parents[1]
MOST = 9
ITEM = re.compile(r"^(\d+)\. \*\*(.+?)\*\* \(((?:`[^`]+`(?:, )?)+)\): ", re.MULTILINE)


def places() -> dict[str, list[str]]:
    """A place's title in the list -> the patterns of its files."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    _, _, section = text.partition("## A new op\n")
    section = section.partition("\n## ")[0]
    items = ITEM.findall(section)
    assert [int(number) for number, _, _ in items] == list(range(1, len(items) + 1))
    assert len(items) == len(re.findall(r"^\d+\. ", section, re.MULTILINE)), "an item has no place"
    return {title: re.findall("`(.+?)`", globs) for _, title, globs in items}


PLACES = places()
KERNELS = ("CPU kernel", "CUDA kernel")  # shared by ops, so files do not name each op


def files(pattern: str) -> list[Path]:
    found = sorted(ROOT.glob(pattern))
    assert found, f"CONTRIBUTING.md: {pattern} must match a file"
    return found


def names(op: str, text: str) -> bool:
    """Whether `text` names `op`, in full or by its ending: `quantize_1x128`, `_t`."""
    if re.search(rf"\b{op}\b", text):
        return True
    for item in re.split(r"\n- ", text):
        words = re.findall(r"`(\w+)`", item)
        for ending in (word for word in words if word.startswith("_") and op.endswith(word)):
            stem = op.removesuffix(ending)
            if any(word.startswith(stem) for word in words):
                return True
    return False


def test_an_op_has_at_most_nine_places():
    assert 0 < len(PLACES) <= MOST
    assert set(KERNELS) < set(PLACES)


@pytest.mark.parametrize("place", [place for place in PLACES if place not in KERNELS])
@pytest.mark.parametrize("op", ops.OPS)
def test_each_place_names_the_op(op, place):
    for pattern in PLACES[place]:
        assert any(names(op, file.read_text()) for file in files(pattern)), (
            f"{place}: no file of {pattern} names {op}"
        )


@pytest.mark.parametrize("op", ops.OPS)
def test_it_has_kernels(op):
    for kernel in KERNELS:
        for pattern in PLACES[kernel]:
            files(pattern)
    entry = CATALOG[op]
    label = min(entry.samples, key=lambda label: work(entry.sample(label)))
    given = entry.sample(label)
    getattr(ops, op)(*given.args, **given.kwargs)
    available, reason = torchext.is_available("sim")
    if not available:
        pytest.skip(f"CUDA kernel: {reason}")
    with torchext.sim.simulate() as simulation:
        getattr(ops, op)(*given.args, **given.kwargs)
    assert simulation.reports, f"CUDA kernel: {op} launches none"


def work(sample) -> float:
    """A sample's number of elements, to find the smallest; infinite if a tensor is empty."""
    sizes = [t.numel() for t in sample.args if isinstance(t, torch.Tensor)]
    return sum(sizes) if all(sizes) else float("inf")


@pytest.mark.parametrize(
    "op, text, named",
    [
        ("quantize_1x128", "uses `quantize_1x128_t`", False),
        ("quantize_1x128_t", "`quantize_1x128`, `_t`, `_dual`", True),
        ("quantize_1x128_t", "`quantize_1x128`\n- `fp8_gemm`, `_t`", False),
        ("fp8_gemm_nt_gelu_quantize", "`fp8_gemm_nt_swiglu_quantize`, `_gelu_quantize`", True),
        ("fp8_gemm_nt_gelu_quantize", "`fp8_gemm_nt_swiglu_quantize`", False),
    ],
)
def test_a_place_that_does_not_name_an_op_is_found(op, text, named):
    assert names(op, text) is named
