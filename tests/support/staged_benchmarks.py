"""A copy of the benchmarks and of tests/hardware beside a fake torchext. Needs no GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# A torchext of a few lines. Each op does one thing that the harness must cope with.
FAKE_TORCHEXT = '''
"""Right, wrong, fatal and endless stand-ins for ops."""
import collections, contextlib, os, sys, time, types
import torch
from benchmarks.contenders import plain_fp8 as plain
from benchmarks.contenders.plain_torch import Fp8Linear
__version__ = "0.0.fake"

class ops:
    quantize_1x128 = staticmethod(plain.quantize_1x128)
    quantize_1x128_t = staticmethod(plain.quantize_1x128_t)
    quantize_1x128_dual = staticmethod(plain.quantize_1x128_dual)
    quantize_1x128_dual_bias_grad = staticmethod(plain.quantize_1x128_dual_bias_grad)
    quantize_128x128 = staticmethod(plain.quantize_128x128)
    def quantize_rowwise(x):
        data, scale = plain.quantize_rowwise(x)
        data.view(torch.uint8)[0, 0] ^= 1
        return data, scale
    def quantize_tensorwise(x):
        os.abort()
    def quantize_128x128_dual(x):
        raise ValueError("no such kernel")
    def dequantize(data, scale, *, out_dtype):
        time.sleep(3600)
    def fp8_gemm_nt(a, sa, b, sb, *, out=None, accumulate=False):
        product = plain.dequantize(a, sa) @ plain.dequantize(b, sb).t()
        return product.bfloat16() if out is None else out.add_(product)
    def m_grouped_fp8_gemm_nt_contiguous(a, sa, b, sb, offsets):
        raise RuntimeError("no groups")

class reference:
    def dequantize(data, scale, *, out_dtype):
        return plain.dequantize(data, scale, out_dtype)

for name in vars(plain):
    if name.startswith("quantize_"):
        setattr(reference, name, staticmethod(getattr(plain, name)))

bound = types.SimpleNamespace(relative=5e-3, worst=5e-2)
entry = types.SimpleNamespace(bytes=lambda *shape, **options: 1e6, bound=bound)
_catalog = types.ModuleType("torchext._catalog")
_catalog.CATALOG = collections.defaultdict(lambda: entry)
sys.modules["torchext._catalog"] = _catalog  # `from torchext._catalog import CATALOG`

class nn:
    class Linear(Fp8Linear):
        def refresh_weight(self):
            pass

def fixed_weights(model):
    return contextlib.nullcontext()

def convert_to_fp8_training(model, module_filter_fn):
    model[0] = nn.Linear(model[0].weight.detach())
'''


@pytest.fixture
def staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the benchmarks and a fake torchext; it becomes the working directory."""
    ignore = shutil.ignore_patterns("__pycache__", "results")
    for folder in ("benchmarks", "tests/hardware"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=ignore)
    for test in (tmp_path / "tests" / "hardware").glob("test_*.py"):
        test.unlink()
    shutil.copy(REPOSITORY / "tests" / "__init__.py", tmp_path / "tests")
    (tmp_path / "torchext.py").write_text(FAKE_TORCHEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path
