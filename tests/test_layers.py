"""The layers of the C++ sources point one way, and `asm` has one home (CONTRIBUTING.md)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("csrc", "ptx/isa")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".h", ".cuh", ".inc", ".cpp", ".cu"}
)

# Layer -> the layers that its files may include, beside their own. `linear` runs the host entries
# of quantizers and products as one op, and so stands on both; ops.cpp is above all.
ON_HOST = {"runtime", "csrc/cpu", "csrc/device", "ptx/isa", "ptx/sim/api"}
MAY_INCLUDE = {
    "ptx/isa": set(),
    "runtime": {"ptx/sim/api"},
    "csrc/cpu": {"runtime"},
    "csrc/device": {"runtime", "ptx/isa"},
    "activation": ON_HOST,
    "quantize": ON_HOST,
    "gemm": ON_HOST,
    "norm": ON_HOST,
    "moe": ON_HOST,
    "linear": ON_HOST | {"quantize", "gemm"},
    "ops.cpp": {"runtime", "activation", "quantize", "gemm", "norm", "linear", "moe"},
}


def layer_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] == "ptx":
        return "/".join(parts[:-1]) if parts[1] == "sim" else "ptx/isa"
    return f"csrc/{parts[1]}" if parts[1] in {"cpu", "device"} else parts[1]


def included(path: Path) -> list[Path]:
    """The files of this repository that a file includes, as the compiler finds them."""
    found = []
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
        candidates = [(path.parent / name).resolve(), ROOT / name]
        found.append(next((c for c in candidates if c.is_file()), candidates[0]))
    return found


def violations(path: Path) -> list[str]:
    layer = layer_of(path)
    allowed = MAY_INCLUDE[layer] | {layer}
    return [
        f"{path.relative_to(ROOT)} ({layer}) includes {target} ({layer_of(target)})"
        for target in included(path)
        if layer_of(target) not in allowed
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_includes_only_layers_below(path: Path) -> None:
    assert layer_of(path) in MAY_INCLUDE, "a new capability: add its row to MAY_INCLUDE"
    missing = [target for target in included(path) if not target.is_file()]
    assert not missing
    assert violations(path) == []


def test_a_sideways_include_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for name in ("csrc/gemm/gemm.h", "csrc/quantize/layout.h"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    source = tmp_path / "csrc/gemm/gemm.cpp"
    source.write_text('#include "gemm.h"\n#include "../quantize/layout.h"\n')
    (fault,) = violations(source)
    assert (
        fault == f"csrc/gemm/gemm.cpp (gemm) includes {tmp_path}/csrc/quantize/layout.h (quantize)"
    )


def test_asm_is_in_ptx_isa_alone() -> None:
    pattern = re.compile(r"\basm\s*(volatile)?\s*\(")
    with_asm = {layer_of(path) for path in SOURCES if pattern.search(path.read_text())}
    assert with_asm == {"ptx/isa"}


@pytest.mark.parametrize(
    "header",
    [
        p
        for p in SOURCES
        if p.suffix in {".h", ".cuh"} and layer_of(p) in {"ptx/isa", "csrc/device"}
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_shared_headers_open_with_what_they_offer(header: Path) -> None:
    first, *rest = header.read_text().splitlines()
    assert first.startswith("// ") and len(first) > 40, "say in the first line what it offers"
    assert "#pragma once" in rest
