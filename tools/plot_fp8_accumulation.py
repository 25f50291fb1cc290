"""Draws docs/images/fp8_accumulation.svg: error of FP8 GEMMs against K, with and without promotion.

    python tools/plot_fp8_accumulation.py

Needs no GPU: torchext.sim.tensor_core_matmul is a model of the arithmetic of Hopper's wgmma that
agrees bit for bit with published models. Results are compared with the float64 product of the same
e4m3 operands, so that all error is from accumulation. 64 x 64 outputs; seeds are fixed.
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from torchext import sim

SIZES = [128 * 2**i for i in range(8)]
ROWS = 64
# (label, promote_every, color, marker)
CURVES = [
    ("tensor core alone", None, "#b5332e", "o"),
    ("promoted to FP32 every 128 of K", 128, "#1f6f8b", "s"),
]
TITLES = {
    "signed": "signed data, N(0, 1): relative RMS error",
    "positive": "positive data, |N(0, 1)|: mean relative shortfall",
}


def error(values: str, k: int, promote_every: int | None) -> float:
    """The error that TITLES names, for the product of two e4m3 matrices."""
    rng = np.random.default_rng(k)
    a, b = (rng.standard_normal((ROWS, k)) for _ in range(2))
    if values == "positive":
        a, b = np.abs(a), np.abs(b)
    fp8_a, fp8_b = (torch.from_numpy(x).to(torch.float8_e4m3fn) for x in (a, b))
    exact = fp8_a.double().numpy() @ fp8_b.double().numpy().T
    got = sim.tensor_core_matmul(fp8_a, fp8_b, promote_every=promote_every).astype(np.float64)
    if values == "positive":
        return float(np.mean((exact - got) / exact))
    return float(np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2)))


def main() -> None:
    plt.rcParams.update({"font.size": 10, "svg.hashsalt": "torchext", "svg.fonttype": "none"})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, sharey=True)
    for axis, (values, title) in zip(axes, TITLES.items(), strict=True):
        for label, promote_every, color, marker in CURVES:
            measured = [error(values, k, promote_every) for k in SIZES]
            axis.plot(SIZES, measured, marker=marker, color=color, label=label, markersize=4.5)
            print(f"{values:8}  {label:32}", " ".join(f"{e:.1e}" for e in measured))
            axis.annotate(
                f"{measured[5]:.1e}", (SIZES[5], measured[5]), color=color, fontsize=9,
                xytext=(0, 7), textcoords="offset points", ha="center",
            )  # fmt: skip
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_ylim(3e-5, 1)
        axis.set_xticks(SIZES, [f"{k // 1024}K" if k >= 1024 else str(k) for k in SIZES])
        axis.set_xlabel("K")
        axis.grid(visible=True, color="#e4e4e4", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("error against float64")
    axes[0].legend(frameon=False, loc="upper left")
    figure.tight_layout()
    target = Path(__file__).parents[1] / "docs" / "images" / "fp8_accumulation.svg"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
