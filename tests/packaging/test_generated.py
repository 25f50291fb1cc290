"""Generated sources are committed as their generators write them."""

from __future__ import annotations

import generate_wgmma


def test_wgmma_shapes() -> None:
    assert generate_wgmma.HEADER.read_text() == generate_wgmma.text(), "run tools/generate_wgmma.py"
