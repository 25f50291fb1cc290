"""Writes deep_gemm_sglang.csv and deep_gemm_vllm.csv from the wheel of `aiconfigurator-core`.

    pip download --no-deps aiconfigurator-core==0.12.0
    pip install pyarrow
    python -m benchmarks.timing_data.extract aiconfigurator_core-0.12.0-*.whl

One line of a table holds all M of one GPU, N and K, in microseconds with four digits.
"""

from __future__ import annotations

import argparse
import csv
import io
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from . import FOLDER, GPUS

VERSIONS = {"sglang": "0.5.14", "vllm": "0.24.0"}
KERNELS = {
    "sglang": "sglang_deepgemm_gemm_nt_f8f8bf16",
    "vllm": "DeepGemmFp8BlockScaledMMKernel",
}
LEAST_ROWS, LEAST_SIZE = 16, 512
LEAST_VLLM_FLOPS = 4e11  # vLLM runs without CUDA graphs: smaller products measure the host


def records(wheel: zipfile.ZipFile, gpu: str, framework: str) -> list[dict]:
    """The rows of the wheel's table of one GPU and framework."""
    import pyarrow.parquet

    folder = f"aiconfigurator_core/systems/data/{gpu}_sxm/gemm/{framework}/{VERSIONS[framework]}"
    data = wheel.read(f"{folder}/gemm_perf.parquet")
    return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()


def four_digits(value: float) -> str:
    return f"{float(f'{value:.4g}'):g}"


def table(framework: str, rows: Mapping[str, Iterable[dict]]) -> list[list[str]]:
    """The header and the lines of one framework's table, from the records of each GPU."""
    times: dict[tuple[str, int, int], dict[int, str]] = defaultdict(dict)
    for gpu, records_of_gpu in rows.items():
        for row in records_of_gpu:
            m, n, k = row["m"], row["n"], row["k"]
            if row["kernel_source"] != KERNELS[framework] or m < LEAST_ROWS:
                continue
            if min(n, k) < LEAST_SIZE:
                continue
            if framework == "vllm" and 2 * m * n * k <= LEAST_VLLM_FLOPS:
                continue
            times[gpu, n, k][m] = four_digits(row["latency"] * 1000)
    all_m = sorted({m for by_m in times.values() for m in by_m})
    lines = [
        [gpu, str(n), str(k), *(by_m.get(m, "") for m in all_m)]
        for (gpu, n, k), by_m in sorted(times.items())
    ]
    return [["gpu", "n", "k", *map(str, all_m)], *lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("wheel", type=Path, help="the file that `pip download` left")
    wheel = zipfile.ZipFile(parser.parse_args().wheel)
    for framework in VERSIONS:
        lines = table(framework, {gpu: records(wheel, gpu, framework) for gpu in GPUS})
        path = FOLDER / f"deep_gemm_{framework}.csv"
        with path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)
        print(f"{path.name}: {sum(bool(x) for line in lines[1:] for x in line[3:])} times")


if __name__ == "__main__":
    main()
