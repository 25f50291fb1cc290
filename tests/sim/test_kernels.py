"""Every CUDA kernel that ships, under three schedules in each completion mode: no finding, and the
same bits every time. Quantisers must equal the CPU kernels; GEMMs, whose tensor cores round
otherwise, an exact product within the bound of docs/numerics.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import torchext
from torchext import ops

sim = pytest.importorskip("torchext.sim")

RUNS = [(seed, mode) for seed in (0, 1, 2) for mode in ("eager", "late", "random")]
WIDE = (torch.bfloat16, torch.float16, torch.float32)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
QUANTISERS = [
    ops.quantize_1x128,
    ops.quantize_1x128_t,
    ops.quantize_1x128_dual,
    ops.quantize_128x128,
    ops.quantize_128x128_dual,
    ops.quantize_rowwise,
    ops.quantize_tensorwise,
]
Outputs = tuple[torch.Tensor, ...]


def cases() -> dict[str, Callable[[], Outputs]]:
    """One call of an op for each kernel configuration, on ragged inputs of many magnitudes."""
    found: dict[str, Callable[[], Outputs]] = {}
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(140, 200, generator=generator)
    wide *= torch.logspace(-4, 2, 140)[:, None]
    for fp8 in FP8:
        for dtype in WIDE:
            x = wide.to(dtype)
            for op in QUANTISERS:
                found[f"{op.__name__} {dtype} {fp8}"] = lambda op=op, x=x, fp8=fp8: op(x, dtype=fp8)
    for fp8 in FP8:
        for dtype in WIDE:
            data, scale = ops.quantize_1x128(wide, dtype=fp8)
            found[f"dequantize {fp8} {dtype}"] = lambda d=data, s=scale, t=dtype: (
                ops.dequantize(d, s, out_dtype=t),
            )
    weight = torch.randn(136, 200, generator=generator)
    granularities = {
        "1d2d": (ops.quantize_1x128, ops.quantize_128x128),
        "1d1d": (ops.quantize_1x128, ops.quantize_1x128),
        "rowwise": (ops.quantize_rowwise, ops.quantize_rowwise),
    }
    for name, (quantize_a, quantize_b) in granularities.items():
        for a_dtype in FP8:
            for b_dtype in FP8:
                a, b = quantize_a(wide, dtype=a_dtype), quantize_b(weight, dtype=b_dtype)
                for out_dtype in WIDE:
                    found[f"fp8_gemm_nt {name} {a_dtype} {b_dtype} {out_dtype}"] = (
                        lambda a=a, b=b, t=out_dtype: (ops.fp8_gemm_nt(*a, *b, out_dtype=t),)
                    )
    return found


CASES = cases()
launched: set[str] = set()


def bits(outputs: Outputs) -> list[torch.Tensor]:
    return [t.contiguous().view(torch.uint8) for t in outputs]


@pytest.mark.parametrize("name", CASES)
def test_no_finding_and_the_same_bits(name: str) -> None:
    run = CASES[name]
    on_cpu = run()
    first: list[torch.Tensor] | None = None
    for seed, mode in RUNS:
        with sim.simulate(seed=seed, completion=mode) as simulation:
            outputs = run()
        assert all(report.ok for report in simulation.reports)
        launched.update(report.kernel for report in simulation.reports)
        if first is None:
            first = bits(outputs)
        assert all(map(torch.equal, bits(outputs), first)), f"{seed=} {mode=}: other bits"
    if name.startswith("fp8_gemm_nt"):
        error = (outputs[0].double() - on_cpu[0].double()).abs()
        row_size = on_cpu[0].double().abs().amax(1, keepdim=True)
        assert (error <= row_size / 64).all()  # coarse: tests/gemm has the bound
    else:
        assert first is not None and all(map(torch.equal, bits(on_cpu), first))


def test_every_kernel_was_launched() -> None:
    """Runs after the above, and with all of them."""
    package = Path(torchext.__file__).parent
    text = "".join(path.read_text() for path in (package / "_ptx").glob("*.ptx"))
    assert launched == set(re.findall(r"\.visible \.entry (\w+)\(", text))
