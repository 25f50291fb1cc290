"""Calls every op once or so, on small ragged inputs, and compares with torchext.reference.

Run under compute-sanitizer, which slows kernels a hundredfold. Inputs are made and results compared
on the CPU, so that the kernels launched on the GPU are torchext's and few others. Prints "calling
NAME" and "ok NAME" or "WRONG NAME: why".
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import torchext
from benchmarks import plain
from benchmarks.problems import WrongResultError, difference, require
from benchmarks.selection import Configuration, Product, Selection
from torchext import ops, reference

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


def m_grouped(op: str, n: int, k: int, **options: object) -> Call:
    """options: the op's; lists are what tells the groups."""
    (index,) = (name for name, value in options.items() if isinstance(value, list))
    values = torch.tensor(options.pop(index), dtype=torch.int32)
    groups = 4 if index == "group_ids" else len(values)
    size = {"offsets": (333,), "group_ids": values.shape, "masked_m": (groups, 150)}[index]
    a, a_scale = reference.quantize_1x128(random(math.prod(size), k))
    weights = random(groups * n, k).unflatten(0, (groups, n))
    b, b_scale = (
        torch.stack(x) for x in zip(*map(reference.quantize_128x128, weights), strict=True)
    )
    operands = (a.unflatten(0, size), a_scale.unflatten(0, size), b, b_scale)

    def call(module: object, device: str) -> object:
        dtype = torch.bfloat16 if module is ops else torch.float64
        out = torch.zeros(*size, n, dtype=dtype, device=device)  # rows of no group stay
        return getattr(module, op)(
            *(x.to(device) for x in operands),
            **{index: values.to(device)},
            out=out,
            **options,
        )

    return call


def k_grouped(m: int, n: int, k: int, ends: list[int]) -> Call:
    operands = (*reference.quantize_1x128(random(m, k)), *reference.quantize_1x128(random(n, k)))
    offsets = torch.tensor(ends, dtype=torch.int32)

    def call(module: object, device: str) -> object:
        function = module.k_grouped_fp8_gemm_nt  # type: ignore[attr-defined]
        return function(*(x.to(device) for x in operands), offsets.to(device))

    return call


def fused(op: str, m: int, n: int, k: int, **options: object) -> Call:
    operands = (*reference.quantize_1x128(random(m, k)), *reference.quantize_128x128(random(n, k)))
    return lambda module, device: getattr(module, op)(*(x.to(device) for x in operands), **options)


def every_tile() -> dict[str, Call]:
    """A ragged product in each configuration of the Hopper kernel."""
    selection = Selection(132)
    product = Product(200, 272, 1040, "1d2d")

    def in_configuration(configuration: Configuration) -> Call:
        call = gemm("1x128 128x128", product.m, product.n, product.k)

        def forced(module: object, device: str) -> object:
            with selection.forced(configuration):
                return call(module, device)

        return forced

    return {
        f"fp8_gemm_nt in {configuration}": in_configuration(configuration)
        for configuration in sorted(selection.expected_cycles(product), key=str)
    }


QUANTIZERS = [name for name in ops.OPS if name.startswith("quantize_")]
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
    "m_grouped_fp8_gemm_nt_contiguous offsets": m_grouped(
        "m_grouped_fp8_gemm_nt_contiguous", 272, 400, offsets=[70, 70, 201, 330]
    ),
    "m_grouped_fp8_gemm_nt_contiguous ids": m_grouped(
        "m_grouped_fp8_gemm_nt_contiguous",
        144,
        272,
        group_ids=[*[2] * 60, *[-1] * 5, *[0] * 90, *[3] * 33, *[2] * 3],
    ),
    "m_grouped_fp8_gemm_nt_masked": m_grouped(
        "m_grouped_fp8_gemm_nt_masked", 272, 400, masked_m=[17, 0, 150], expected_m=60
    ),
    "k_grouped_fp8_gemm_nt": k_grouped(136, 144, 400, [130, 130, 390]),
    "fp8_gemm_nt_swiglu_quantize": fused("fp8_gemm_nt_swiglu_quantize", 200, 544, 400),
    "fp8_gemm_nt_gelu_quantize": fused("fp8_gemm_nt_gelu_quantize", 200, 272, 400),
    "fp8_gemm_nt_relu2_quantize": fused("fp8_gemm_nt_relu2_quantize", 200, 272, 400),
}


def check(name: str, got: object, want: object) -> None:
    """Quantized bits must be equal, products within benchmarks.problems' bounds."""
    if name.endswith("_quantize") and "gemm" in name:
        (data, scale), (wanted, wanted_scale) = _tensors(got), _tensors(want)
        back = plain.dequantize(data.cpu(), scale.cpu())
        require(difference(back, plain.dequantize(wanted, wanted_scale)), 0.02)
        return
    for result, expected in zip(_tensors(got), _tensors(want), strict=True):
        if "gemm" in name:
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
    uncovered = set(ops.OPS) - {name.split()[0] for name in CALLS}
    if uncovered:
        print(f"WRONG coverage: no call of {', '.join(sorted(uncovered))}", flush=True)
        return 1
    if options.device == "cuda" and torchext.is_available("sm90")[0]:
        CALLS.update(every_tile())
    print(f"torchext {torchext.__version__} on {options.device}: {len(CALLS)} calls", flush=True)
    wrong = 0
    for name, call in CALLS.items():
        if name in options.skip:
            continue
        print(f"calling {name}", flush=True)
        try:
            got = call(ops, options.device)
            if options.device == "cuda":
                torch.cuda.synchronize()
            check(name, got, call(reference, "cpu"))
        except (WrongResultError, RuntimeError, ValueError) as error:
            wrong += 1
            print(f"WRONG {name}: {error}", flush=True)
        else:
            print(f"ok {name}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
