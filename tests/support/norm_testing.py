"""The order of a norm's sums, written as recursions and loops in NumPy, and data for its tests."""

from __future__ import annotations

import numpy as np
import torch

UNIT = 2.0**-24  # half a unit in the last place of an FP32 number in [1, 2)


def in_pairs(rows: np.ndarray) -> np.ndarray:
    """The sum of each row of FP32 numbers [M, K] in the order of docs/numerics.md."""

    def tree(values: np.ndarray) -> np.ndarray:
        if values.shape[1] == 1:
            return values[:, 0]
        half = values.shape[1] // 2
        return tree(values[:, :half]) + tree(values[:, half:])

    total = np.zeros(len(rows), np.float32)
    for start in range(0, rows.shape[1], 512):
        segment = np.zeros((len(rows), 512), np.float32)
        part = rows[:, start : start + 512]
        segment[:, : part.shape[1]] = part
        total = total + tree(segment)
    return total


def down_columns(x: np.ndarray) -> np.ndarray:
    """The sum of each column of FP32 numbers [M, K] in the order of docs/numerics.md."""
    total = None
    for start in range(0, len(x), 128):
        block = np.zeros((128, x.shape[1]), np.float32)
        block[: len(x[start : start + 128])] = x[start : start + 128]
        runs = []
        for first in range(0, 128, 16):
            run = block[first]
            for row in block[first + 1 : first + 16]:
                run = run + row
            runs.append(run)
        left = (runs[0] + runs[1]) + (runs[2] + runs[3])
        right = (runs[4] + runs[5]) + (runs[6] + runs[7])
        total = left + right if total is None else total + (left + right)
    return np.zeros(x.shape[1], np.float32) if total is None else total


def random(*shape, dtype, device):
    """Normal data whose rows and columns have very different magnitudes."""
    x = torch.randn(shape, dtype=torch.float64)
    for dim in range(x.dim()):
        sizes = [1] * x.dim()
        sizes[dim] = x.shape[dim]
        x *= 2.0 ** torch.randint(-2, 3, sizes)
    return x.to(dtype).to(device)
