"""Runs tile_gemm.cu under the simulator: checks the numbers, and the kernel itself.

python docs/examples/tile_gemm.py             # without the fence
python docs/examples/tile_gemm.py -DMENDED    # with the fence
"""

import sys
from pathlib import Path

import numpy as np
import torch

from torchext import sim

HERE = Path(__file__).resolve().parent
K = 512


def main() -> None:
    options = [f"-I{HERE.parents[1]}", *sys.argv[1:]]
    module = sim.compile_cuda(HERE / "tile_gemm.cu", options=options)
    a, b = (torch.randn(rows, K).to(torch.float8_e4m3fn) for rows in (64, 128))
    expected = sim.tensor_core_matmul(a, b)

    right, faulty, shown = 0, 0, False
    for completion in ("late", "eager", "random"):
        for seed in range(3):
            d = torch.zeros(64, 128)
            report = module.launch(
                "tile_gemm",
                grid=1,
                block=128,
                smem=58368,
                seed=seed,
                completion=completion,
                args=[
                    sim.tensor_map(sim.read_only(a, "a"), box=(64, 128), swizzle=128),
                    sim.tensor_map(sim.read_only(b, "b"), box=(128, 128), swizzle=128),
                    sim.tensor_map(sim.output(d, "d"), box=(64, 128)),
                    np.int32(K // 128),
                ],
            )
            right += np.array_equal(d.numpy(), expected)
            faulty += not report.ok
            if not report.ok and not shown:
                print(report, end="\n\n")
                shown = True
    print(f"9 runs: {right} with the tensor core's bits, {faulty} with findings")


if __name__ == "__main__":
    main()
