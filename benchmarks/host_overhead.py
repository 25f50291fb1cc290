"""Host time of a call, for every op and for a Linear forward, beside torch's addmm and Linear.

    python -m benchmarks.host_overhead [--device cuda] [--rows 0]

`measure(device)` returns the figures as a dictionary. On a CPU the operands have no rows: a call
checks, allocates and dispatches as usual, and its kernel returns at once. On a GPU the operands
have rows, so that the time includes tensor maps and launches; the GPU's own work runs
asynchronously and does not count. On a GPU, the difference to `--rows 0` is the time of tensor maps
and launches (but weights always have rows).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import torchext
from torchext import ops
from torchext._catalog import CATALOG

from . import cases

FEATURES = 128
ROWS = {"cpu": 0, "cuda": 16}
CALLS_IN_A_BATCH = 100  # fits into a stream's queue, so that the host never waits for the GPU


def measure(device: str = "cpu", rounds: int = 50, rows: int | None = None) -> dict[str, float]:
    """Name of a call -> host time in microseconds: the median over `rounds` interleaved batches.

    `rows` of the input; None for ROWS[device].
    Time is CPU time of the calling thread, so that other work on the machine does not count.

    Keys: "torch.*" for comparison; "ops.NAME" for the functions of torchext.ops, followed by a word
    for variants; "op NAME" for torch.ops.torchext.NAME.default; "Linear forward, training" and so
    on for torchext.nn.Linear.
    """
    calls = _calls(device, ROWS[device] if rows is None else rows)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        _batch(call, device)
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(_batch(call, device))
    return {name: statistics.median(batches) for name, batches in samples.items()}


def _batch(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.thread_time()
    for _ in range(CALLS_IN_A_BATCH):
        call()
    return 1e6 * (time.thread_time() - start) / CALLS_IN_A_BATCH


def _calls(device: str, rows: int) -> dict[str, Callable[[], object]]:
    new = partial(torch.randn, device=device, dtype=torch.bfloat16)
    x, weight, bias = new(rows, FEATURES), new(FEATURES, FEATURES), new(FEATURES)
    return (
        _calls_of_torch(x, weight, bias)
        | _calls_of_ops(x, weight, bias)
        | _calls_of_linear(x, torchext.nn.Linear, "Linear forward")
    )


def _calls_of_torch(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Callable[[], object]]:
    addmm = torch.ops.aten.addmm.default
    return {
        "torch.ops.aten.addmm": partial(addmm, bias, x, weight.t()),
        **_calls_of_linear(x, torch.nn.Linear, "torch.nn.Linear forward"),
    }


def _calls_of_ops(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Callable[[], object]]:
    quantizers = {name: getattr(ops, name) for name in ops.OPS if name.startswith("quantize_")}
    calls = {f"ops.{name}": partial(quantize, x) for name, quantize in quantizers.items()}
    activations = {
        name: getattr(ops, name)
        for name in ops.OPS
        if name.startswith(("silu_mul", "gelu", "relu2"))
    }
    for name, function in activations.items():
        operands = torch.cat((x, x), dim=-1) if "_mul_" in name else x
        tensors = (x, operands) if "_backward_" in name else (operands,)
        calls[f"ops.{name}"] = partial(function, *tensors)
    for name in (*cases.NORMS, *cases.MOE):
        given = next(iter(CATALOG[name].sized.values()))(len(x), FEATURES).to(x.device)
        calls[f"ops.{name}"] = partial(getattr(ops, name), *given.args, **given.kwargs)
    a, b = ops.quantize_1x128(x), ops.quantize_128x128(weight)
    trained_bias, out = bias.clone().requires_grad_(), torch.empty_like(x)
    gemm = torch.ops.torchext.fp8_gemm_nt.default
    tokens, experts = (a[0][None], a[1][None]), (b[0][None], b[1][None])
    rows = torch.full((1,), len(x), dtype=torch.int32, device=x.device)
    columns = torch.full_like(rows, FEATURES)
    return calls | {
        "ops.dequantize": partial(ops.dequantize, *a, out_dtype=torch.bfloat16),
        "ops.fp8_gemm_nt": partial(ops.fp8_gemm_nt, *a, *b),
        "ops.fp8_gemm_nt bias": partial(ops.fp8_gemm_nt, *a, *b, bias=bias),
        "ops.fp8_gemm_nt trained bias": partial(ops.fp8_gemm_nt, *a, *b, bias=trained_bias),
        "ops.fp8_gemm_nt out": partial(ops.fp8_gemm_nt, *a, *b, out=out),
        **{
            f"ops.{name}": partial(getattr(ops, name), *a, *b)
            for name in ops.OPS
            if name.startswith("fp8_gemm_nt_")
        },
        "ops.fp8_linear": partial(ops.fp8_linear, x, *b),
        "ops.m_grouped_fp8_gemm_nt_contiguous": partial(
            ops.m_grouped_fp8_gemm_nt_contiguous, *a, *experts, rows
        ),
        "ops.m_grouped_fp8_gemm_nt_masked": partial(
            ops.m_grouped_fp8_gemm_nt_masked, *tokens, *experts, rows
        ),
        "ops.k_grouped_fp8_gemm_nt": partial(
            ops.k_grouped_fp8_gemm_nt, *a, *ops.quantize_1x128(weight), columns
        ),
        "op quantize_1x128": partial(torch.ops.torchext.quantize_1x128.default, x),
        "op fp8_gemm_nt": partial(gemm, *a, *b),
    }


def _calls_of_linear(
    x: Tensor, kind: type[torch.nn.Linear], name: str
) -> dict[str, Callable[[], object]]:
    def layer() -> torch.nn.Linear:
        return kind(FEATURES, FEATURES, device=x.device, dtype=x.dtype)

    first, hidden, frozen = layer(), layer(), layer().requires_grad_(False)
    return {
        f"{name}, training": partial(hidden, x.detach().requires_grad_()),
        f"{name}, training, first layer": partial(first, x),
        f"{name}, frozen": partial(frozen, x),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_overhead")
    parser.add_argument("--device", choices=tuple(ROWS), default="cpu")
    parser.add_argument("--rows", type=int, help="rows of the input; default: 0 on cpu, 16 on cuda")
    options = parser.parse_args()
    for name, microseconds in measure(options.device, rows=options.rows).items():
        print(f"{microseconds:7.2f} us  {name}")


if __name__ == "__main__":
    main()
