from __future__ import annotations

import pytest


@pytest.fixture
def tensor_core(request: pytest.FixtureRequest) -> bool:
    """Whether FP8 products are summed by a tensor core, or one that is simulated."""
    return request.config.getoption("--device") != "cpu"
