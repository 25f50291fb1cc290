"""Generated sources are committed as their generators write them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_wgmma_shapes() -> None:
    path = ROOT / "tools" / "generate_wgmma.py"
    spec = importlib.util.spec_from_file_location("generate_wgmma", path)
    assert spec is not None and spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert generator.HEADER.read_text() == generator.text(), "run tools/generate_wgmma.py"
