"""Calls every op once or so, on small ragged inputs, and compares with torchext.reference.

Run under compute-sanitizer, which slows kernels a hundredfold. Inputs are made and results compared
on the CPU, so that the kernels launched on the GPU are torchext's and few others. Prints "calling
NAME" and "ok NAME" or "WRONG NAME: why".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import torchext
from torchext import ops, reference

from ..problems import WrongResultError, difference, require

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Call = Callable[[object, str], object]  # (module with the ops, device) -> outputs


def random(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 10007 + columns)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def quantize(name: str, x: Tensor, **options: object) -> Call:
    return lambda module, device: getattr(module, name)(x.to(device), **options)


def dequantize(quantizer: str) -> Call:
    data, scale = getattr(reference, quantizer)(random(130, 300))
    return lambda module, device: module.dequantize(  # type: ignore[attr-defined]
        data.to(device), scale.to(device), out_dtype=torch.bfloat16
    )


def gemm(quantizers: str, m: int, n: int, k: int, **options: object) -> Call:
    """options: those of fp8_gemm_nt; bias and accumulate as flags. num_sms is the kernel's affair,
    and nothing the reference knows of."""
    left, right = quantizers.split()
    a = getattr(reference, f"quantize_{left}")(random(m, k))
    b = getattr(reference, f"quantize_{right}")(random(n, k))
    bias = random(1, n)[0] if options.pop("bias", False) else None
    accumulate = bool(options.pop("accumulate", False))
    start = random(m, n, torch.float32) if accumulate else None
    budget = {"num_sms": options.pop("num_sms")} if "num_sms" in options else {}

    def call(module: object, device: str) -> object:
        place = {
            "bias": None if bias is None else bias.to(device),
            "out": None if start is None else start.to(device, copy=True),
        }
        operands = (tensor.to(device) for tensor in (*a, *b))
        sms = budget if module is ops else {}
        fp8_gemm_nt = module.fp8_gemm_nt  # type: ignore[attr-defined]
        return fp8_gemm_nt(*operands, **place, **sms, accumulate=accumulate, **options)

    return call


QUANTIZERS = [name for name in ops.__all__ if name.startswith("quantize_")]
CALLS: dict[str, Call] = {
    **{name: quantize(name, random(200, 400)) for name in QUANTIZERS},
    **{
        f"{name} e5m2 pow2": quantize(
            name, random(67, 129, torch.float32), dtype=E5M2, pow2_scale=True
        )
        for name in QUANTIZERS
    },
    "dequantize 1x128": dequantize("quantize_1x128"),
    "dequantize 128x128": dequantize("quantize_128x128"),
    "fp8_gemm_nt 1d2d": gemm("1x128 128x128", 200, 272, 400),
    "fp8_gemm_nt 1d2d one row": gemm("1x128 128x128", 1, 130, 129, bias=True),
    "fp8_gemm_nt 1d2d 2 SMs": gemm("1x128 128x128", 300, 400, 256, num_sms=2),
    "fp8_gemm_nt 1d2d fp16": gemm("1x128 128x128", 128, 128, 512, out_dtype=torch.float16),
    "fp8_gemm_nt 1d1d": gemm("1x128 1x128", 200, 272, 400),
    "fp8_gemm_nt 1d1d accumulate": gemm("1x128 1x128", 136, 264, 384, accumulate=True),
    "fp8_gemm_nt rowwise": gemm("rowwise rowwise", 200, 272, 400, bias=True),
    "fp8_gemm_nt tensorwise": gemm("tensorwise tensorwise", 200, 272, 400),
}


def check(name: str, got: object, want: object) -> None:
    """Quantised bits must be equal, products within benchmarks.problems' bounds."""
    for result, expected in zip(_tensors(got), _tensors(want), strict=True):
        if name.startswith("fp8_gemm_nt"):
            require(difference(result.cpu(), expected), 5e-3, 5e-2)
            continue
        if (result.dtype, result.shape) != (expected.dtype, expected.shape):
            raise WrongResultError(f"expected {expected.dtype} {tuple(expected.shape)}", {})
        unequal = (result.cpu().float() != expected.float()).sum().item()
        if unequal:
            raise WrongResultError(f"{unequal} of {expected.numel()} elements differ", {})


def _tensors(outputs: object) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)  # type: ignore[return-value]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--skip", nargs="*", default=[], help="names of calls to leave out")
    options = parser.parse_args()
    uncovered = set(ops.__all__) - {name.split()[0] for name in CALLS}
    if uncovered:
        print(f"WRONG coverage: no call of {', '.join(sorted(uncovered))}", flush=True)
        return 1
    print(f"torchext {torchext.__version__} on {options.device}: {len(CALLS)} calls", flush=True)
    wrong = 0
    for name, call in CALLS.items():
        if name in options.skip:
            continue
        print(f"calling {name}", flush=True)
        got = call(ops, options.device)
        if options.device == "cuda":
            torch.cuda.synchronize()
        try:
            check(name, got, call(reference, "cpu"))
        except WrongResultError as error:
            wrong += 1
            print(f"WRONG {name}: {error}", flush=True)
        else:
            print(f"ok {name}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
