from __future__ import annotations

import pytest
import torch
from gemm_testing import TENSOR_CORES, TensorCore


@pytest.fixture
def tensor_core(request: pytest.FixtureRequest) -> TensorCore | None:
    """What sums FP8 products: a TensorCore, maybe simulated; None where FP32 arithmetic does."""
    where = request.config.getoption("--device")
    if where == "cpu":
        return None
    capability = request.config.getoption("--sim-arch")
    if where == "cuda":
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    path = "sm90" if capability == 90 else "sm89" if capability >= 89 else "sm80"
    return TENSOR_CORES[path] if capability >= 80 else None
