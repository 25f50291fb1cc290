"""Every CUDA kernel that ships, for every architecture, runs under three schedules in each
completion mode, without a finding and with the same bits every time. A kernel without asynchronous
instructions runs alike in all modes, so it runs in one. Quantizers must give the bits
of the CPU kernels. GEMMs, whose tensor cores round differently, must be near the CPU's result;
tests/gemm has the exact bound. Ops of the catalog without a case here run on their first sample."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

import torchext
from support.completion import MODES, is_asynchronous, modes_that_differ
from support.op_interface import recorded_launches
from tests.hardware.gpu_check.op_calls import check
from torchext import _architectures, gemm_selection, ops
from torchext._catalog import CATALOG, Entry
from torchext._catalog.moe import ids_of, slots_of, weights_of

available, reason = torchext.is_available("sim")
if not available:
    pytest.skip(reason, allow_module_level=True)
from torchext import _sim, sim  # noqa: E402
from torchext.sim.ptx_file import read_ptx  # noqa: E402

SEEDS = (0, 1, 2)
WIDE = (torch.bfloat16, torch.float16, torch.float32)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
QUANTIZERS = [getattr(ops, name) for name in CATALOG if name.startswith("quantize_")]
Outputs = tuple[torch.Tensor, ...]


# Simulated GPUs, one for each path, and the folders of _ptx of which each must launch all kernels:
# the folder of its path, and that of the portable kernels if these are compiled anew for this GPU.
FOLDERS = {
    number: sorted({row.target, *([str(number)] if row.portable_from == number else [])})
    for number in _architectures.paths().values()
    for row in [_architectures.architectures()[number]]
}
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    run: Callable[[], torch.Tensor | Outputs]
    num_sms: int = 132  # a small number gives large tiles
    tile: str | None = None  # forces this tile of Hopper's GEMMs
    split_k: int = 1
    cluster: int = 1
    check: Callable[[Outputs], None] | None = None  # replaces the comparison with the CPU kernel

    @contextmanager
    def forced(self) -> Iterator[None]:
        if self.tile is None:
            yield
        else:
            with gemm_selection.forced(self.tile, split_k=self.split_k, cluster=self.cluster):
                yield


def cases(capability: int) -> dict[str, Case]:
    """One call of an op for each kernel configuration, on ragged inputs of many magnitudes."""
    found: dict[str, Case] = {}
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(140, 200, generator=generator)
    wide *= torch.logspace(-4, 2, 140)[:, None]
    for fp8 in FP8 if capability != 80 else ():  # 8.0 runs the quantizers of 7.5
        for dtype in WIDE:
            x = wide.to(dtype)
            for op in QUANTIZERS:
                found[f"{op.__name__} {dtype} {fp8}"] = Case(partial(op, x, dtype=fp8))
    for fp8 in FP8 if capability != 80 else ():
        for dtype in WIDE:
            data, scale = ops.quantize_1x128(wide, dtype=fp8)
            found[f"dequantize {fp8} {dtype}"] = Case(
                partial(ops.dequantize, data, scale, out_dtype=dtype)
            )
    if capability != 80:
        found |= activations(wide) | norms(wide) | rows_of_experts(wide)
    weight = torch.randn(136, 200, generator=generator)
    granularities = {
        "1d2d": (ops.quantize_1x128, ops.quantize_128x128),
        "1d1d": (ops.quantize_1x128, ops.quantize_1x128),
        "rowwise": (ops.quantize_rowwise, ops.quantize_rowwise),
    }
    for name, (quantize_a, quantize_b) in granularities.items():
        for i, (a_dtype, b_dtype) in enumerate(itertools.product(FP8, FP8)):
            a, b = quantize_a(wide, dtype=a_dtype), quantize_b(weight, dtype=b_dtype)
            # One kernel serves all output dtypes, which tests/gemm runs. Hopper's take turns.
            out_dtype = WIDE[i % len(WIDE)] if capability == 90 else WIDE[0]
            for num_sms in (132,) if capability == 90 else (132, 2):
                label = f"fp8_gemm_nt {name} {a_dtype} {b_dtype} {out_dtype} {num_sms}"
                found[label] = Case(partial(ops.fp8_gemm_nt, *a, *b, out_dtype=out_dtype), num_sms)
            if capability == 90:
                found |= hopper_family(name, a, b)
        for b_dtype in FP8:
            b = quantize_b(weight, dtype=b_dtype)
            for x_dtype in WIDE:
                for num_sms in (132, 2):
                    found[f"fp8_linear {name} {b_dtype} {x_dtype} {num_sms}"] = Case(
                        partial(ops.fp8_linear, wide.to(x_dtype), *b), num_sms
                    )
            if name != "1d2d" or capability not in {80, 90}:
                break  # granularities share kernels, and sm_89 runs those of sm_80
    return found | (other_ops(found) if capability == 90 else {})


def activations(wide: torch.Tensor) -> dict[str, Case]:
    """Every kernel of activations and of their gradients; the function is an argument."""
    found: dict[str, Case] = {}
    x, scale = ops.quantize_1x128(wide)
    for dtype in WIDE:
        gate_up, grad = wide.to(dtype), wide[:, 100:].to(dtype)
        for op in (
            ops.silu_mul_quantize_1x128,
            ops.silu_mul_quantize_1x128_t,
            ops.silu_mul_quantize_1x128_dual,
        ):
            found[f"{op.__name__} {dtype}"] = Case(partial(op, gate_up))
        gradient: Callable[..., Any] = partial(
            ops.silu_mul_backward_quantize_1x128_dual,
            grad,
            bias_grad=True,
            activation_dtype=FP8[1],
        )
        name = ops.silu_mul_backward_quantize_1x128_dual.__name__
        found[f"{name} {dtype}"] = Case(partial(gradient, gate_up))
        found[f"{name} {dtype} fp8"] = Case(partial(gradient, x, gate_up_scale=scale))
    return found


def norms(wide: torch.Tensor) -> dict[str, Case]:
    """Every kernel of norms and of their gradients. RMSNorm's ops run the same kernels."""
    found: dict[str, Case] = {}
    weight, bias = wide[:2].abs()
    mean, rstd = wide[:, 0].contiguous(), wide[:, 1].abs()
    for dtype in WIDE:
        x = wide.to(dtype)
        for op in (ops.layer_norm_quantize_1x128, ops.layer_norm_quantize_1x128_dual):
            call: Callable[..., Any] = partial(
                op, x, weight, bias, 1e-6, residual=x, return_normed=True
            )
            found[f"{op.__name__} {dtype}"] = Case(call)
        gradient = ops.layer_norm_backward_quantize_1x128_dual
        found[f"{gradient.__name__} {dtype}"] = Case(
            partial(gradient, x, x, weight, mean, rstd, residual_grad=x)
        )
    return found


def rows_of_experts(wide: torch.Tensor) -> dict[str, Case]:
    """Every kernel that gives experts their rows; routes of one CTA and of several."""
    found: dict[str, Case] = {}
    for tokens in (40, 1200):
        ids = ids_of(tokens, 4, 37)
        found[f"moe_route {tokens}"] = Case(partial(ops.moe_route, ids, 37))
    slots, few, weights = slots_of(140, 2), slots_of(70, 2), weights_of(70, 2)
    for dtype in WIDE:
        x = wide.to(dtype)
        quantize: Callable[..., Any] = partial(ops.moe_permute_quantize_1x128, x, slots)
        for num_sms in (0, 2):  # as many CTAs as there is work for, or as many as SMs
            label = f"moe_permute_quantize_1x128 {dtype} {num_sms}"
            found[label] = Case(partial(quantize, num_sms=num_sms))
        found[f"moe_permute {dtype}"] = Case(partial(ops.moe_permute, x[:70], few, weights))
        combine: Callable[..., Any] = partial(ops.moe_combine, x, few, weights, residual=x[:70])
        found[f"moe_combine {dtype}"] = Case(combine)
        header = ids_of(70, 4, 37), weights_of(70, 4)
        pack: Callable[..., Any] = partial(ops.moe_pack_1x128, x[:70], few, *header)
        for num_sms in (0, 2):
            found[f"moe_pack_1x128 {dtype} {num_sms}"] = Case(partial(pack, num_sms=num_sms))
    given = CATALOG["moe_unpack_1x128"].sample("ragged")
    unpack: Callable[..., Any] = partial(ops.moe_unpack_1x128, *given.args)
    for num_sms in (0, 2):
        found[f"moe_unpack_1x128 {num_sms}"] = Case(partial(unpack, num_sms=num_sms))
    return found


def other_ops(found: dict[str, Case]) -> dict[str, Case]:
    """Cases for the ops of the catalog that no case in `found` calls, each on its first sample."""

    def call(entry: Entry, label: str) -> Outputs:
        given = entry.sample(label)
        return outputs_of(getattr(ops, entry.name)(*given.args, **given.kwargs))

    def holds(entry: Entry, label: str, outputs: Outputs) -> None:
        check(entry, outputs, outputs_of(entry.expected(label)))

    called = {case.split()[0] for case in found}
    more = {}
    for name, entry in CATALOG.items():
        if name not in called:
            label = next(iter(entry.samples))
            more[f"{name} {label}"] = Case(
                partial(call, entry, label), 2, check=partial(holds, entry, label)
            )
    return more


def outputs_of(result: torch.Tensor | Outputs) -> Outputs:
    return result if isinstance(result, tuple) else (result,)


def hopper_family(granularity: str, a: Outputs, b: Outputs) -> dict[str, Case]:
    """Every tile of Hopper's GEMM, alone and in clusters, on so few SMs that each CTA computes
    several tiles and reuses its ring; and every tile of the fused activations."""
    found: dict[str, Case] = {}
    formats = (a[0].dtype, b[0].dtype)
    label = f"{granularity} {formats[0]} {formats[1]}"
    for tile in gemm_selection.configurations(granularity, *formats):
        for cluster in (1, 4) if tile.startswith("swap") else (1, 2):
            split_k = cluster if tile.startswith("swap") else 1
            found[f"fp8_gemm_nt {label} {tile} {cluster}"] = Case(
                partial(ops.fp8_gemm_nt, *a, *b), max(2, cluster), tile, split_k, cluster
            )
    for tile in ("64x128", "128x128"):
        for cluster in (1, 2):
            for op in (ops.fp8_gemm_nt_swiglu_quantize, ops.fp8_gemm_nt_gelu_quantize):
                found[f"{op.__name__} {label} {tile} {cluster}"] = Case(
                    partial(op, *a, *b), 2, tile, 1, cluster
                )
    return found


CASES = {
    (capability, name): case for capability in FOLDERS for name, case in cases(capability).items()
}


def kernels_of(capability: int, case: Case) -> list[str]:
    """The kernels that a case launches, in order; none runs."""
    with recorded_launches(capability, case.num_sms) as names, case.forced():
        case.run()
    return names


PTX = Path(torchext.__file__).parent / "_ptx"


@cache
def kernels_in(file: Path) -> list[str]:
    return re.findall(r"\.visible \.entry (\w+)\(", read_ptx(file))


@cache
def files_by_kernel(capability: int) -> dict[str, Path]:
    """The kernels that this GPU can run, and the PTX file from which it takes each."""
    best_first = map(Path, sim.ops._kernels(capability))
    return {kernel: file for file in reversed([*best_first]) for kernel in kernels_in(file)}


@cache
def module_of(file: Path) -> _sim.Module:
    return _sim.Module([(file.name, read_ptx(file))])


@cache
def runs_asynchronously(capability: int, kernel: str) -> bool:
    return is_asynchronous(module_of(files_by_kernel(capability)[kernel]), kernel)


@cache
def code_of(file: Path) -> str:
    """The PTX without the GPU that it is for."""
    return re.sub(r"^\.target .*", "", read_ptx(file), flags=re.MULTILINE)


@cache
def earlier_gpu_with(kernel: str, capability: int) -> int | None:
    """An earlier GPU that has the same PTX in a file of its own, if there is one."""
    file = files_by_kernel(capability)[kernel]
    for earlier in sorted(number for number in FOLDERS if number < capability):
        other = files_by_kernel(earlier).get(kernel)
        if other is not None and other != file and code_of(other) == code_of(file):
            return earlier
    return None


def bits(outputs: Outputs) -> list[torch.Tensor]:
    return [t.contiguous().reshape(-1).view(torch.uint8) for t in outputs]


@pytest.mark.parametrize(("capability", "name"), CASES)
def test_no_finding_and_the_same_bits(capability: int, name: str) -> None:
    case = CASES[capability, name]
    num_sms = case.num_sms
    on_cpu = outputs_of(case.run())
    kernels = kernels_of(capability, case)
    if all(earlier_gpu_with(kernel, capability) for kernel in kernels):
        pytest.skip(f"an earlier GPU has the same PTX as sm_{capability}: tested there")
    first: list[torch.Tensor] | None = None
    modes = modes_that_differ(runs_asynchronously(capability, kernel) for kernel in kernels)
    for seed, mode in itertools.product(SEEDS, modes):
        options: dict[str, Any] = {"seed": seed, "completion": mode, "num_sms": num_sms}
        with sim.simulate(compute_capability=capability, **options) as simulation, case.forced():
            outputs = outputs_of(case.run())
        assert all(report.ok for report in simulation.reports)
        assert [report.kernel for report in simulation.reports] == kernels
        if first is None:
            first = bits(outputs)
        assert all(map(torch.equal, bits(outputs), first)), f"{seed=} {mode=}: other bits"
    if case.check is not None:
        case.check(outputs)
        return
    if "_quantize " in name and name.startswith("fp8_gemm_nt"):
        outputs, on_cpu = (
            (ops.dequantize(*o, out_dtype=torch.float32),) for o in (outputs, on_cpu)
        )
    if name.startswith(("fp8_gemm_nt", "fp8_linear")):
        error = (outputs[0].double() - on_cpu[0].double()).abs()
        row_size = on_cpu[0].double().abs().amax(1, keepdim=True)
        # A coarse limit; tests/gemm has the exact bound. Quantized outputs may be one step of e4m3
        # off.
        assert (error <= row_size / (7 if "_quantize " in name else 64)).all()
    else:
        assert first is not None and all(map(torch.equal, bits(on_cpu), first))


def test_without_asynchronous_instructions_modes_run_alike() -> None:
    """The same instructions in the same schedules: the counts depend on the seed alone."""
    case = CASES[75, "fp8_gemm_nt rowwise torch.float8_e4m3fn torch.float8_e4m3fn torch.bfloat16 2"]
    assert not any(runs_asynchronously(75, kernel) for kernel in kernels_of(75, case))
    for seed in SEEDS:
        runs = set()
        for mode in MODES:
            options: dict[str, Any] = {"seed": seed, "completion": mode, "num_threads": 1}
            with sim.simulate(compute_capability=75, num_sms=2, **options) as simulation:
                case.run()
            runs.add(tuple((r.ok, *sorted(r.instructions.items())) for r in simulation.reports))
        assert len(runs) == 1


@pytest.mark.parametrize(("capability", "case", "expected"), [
    (90, "fp8_gemm_nt 1d2d torch.float8_e4m3fn torch.float8_e4m3fn torch.bfloat16 132", True),
    (89, "fp8_gemm_nt 1d2d torch.float8_e4m3fn torch.float8_e4m3fn torch.bfloat16 132", True),
    (90, "quantize_1x128 torch.bfloat16 torch.float8_e4m3fn", False),
])  # fmt: skip
def test_which_kernels_are_asynchronous(capability: int, case: str, expected: bool) -> None:
    (kernel,) = kernels_of(capability, CASES[capability, case])
    assert runs_asynchronously(capability, kernel) == expected


def test_a_new_op_of_the_catalog_gets_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name.split()[0] for _, name in CASES} == set(ops.OPS)
    monkeypatch.setitem(CATALOG, "new_op", replace(CATALOG["dequantize"], name="new_op"))
    found = {name: case for (capability, name), case in CASES.items() if capability == 90}
    assert [name.split()[0] for name in other_ops(found)] == ["new_op"]


@pytest.mark.parametrize("capability", FOLDERS)
def test_some_case_launches_each_kernel(capability: int) -> None:
    launched = {
        kernel
        for (number, _), case in CASES.items()
        if number == capability
        for kernel in kernels_of(capability, case)
    }
    files = [file for folder in FOLDERS[capability] for file in (PTX / folder).glob("*")]
    assert launched >= {kernel for file in files for kernel in kernels_in(file)} != set()


def test_every_folder_belongs_to_a_gpu() -> None:
    folders = {path.name for path in PTX.iterdir()}
    assert folders == {name for names in FOLDERS.values() for name in names}
