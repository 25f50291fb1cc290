from __future__ import annotations

import pytest

from support.gemm_testing import TENSOR_CORES, TensorCore


@pytest.fixture
def tensor_core(gpu_path: str | None) -> TensorCore | None:
    """The tensor core that sums FP8 products; None if FP32 arithmetic does."""
    return TENSOR_CORES.get(gpu_path or "")
