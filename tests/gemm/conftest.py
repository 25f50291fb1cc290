from __future__ import annotations

import pytest

from support.gemm_testing import TensorCore, tensor_core_of


@pytest.fixture
def tensor_core(request: pytest.FixtureRequest) -> TensorCore | None:
    return tensor_core_of(request.config)
