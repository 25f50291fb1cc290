"""Fixtures that the tests of torchext.compat.deep_gemm share."""

import warnings

import pytest

from support.gemm_testing import TENSOR_CORES, TensorCore
from torchext.compat import deep_gemm
from torchext.compat.deep_gemm import _operands


@pytest.fixture
def tensor_core(gpu_path: str | None) -> TensorCore | None:
    return TENSOR_CORES.get(gpu_path or "")


@pytest.fixture(autouse=True)
def settings():
    """Each test starts with the settings of a new process."""
    yield
    deep_gemm.set_num_sms(deep_gemm._runtime._count_sms())
    deep_gemm.set_mk_alignment_for_contiguous_layout(128)


@pytest.fixture
def copies():
    """The warned copies of operands: pairs of function and argument."""
    _operands._warned.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield _operands._warned
