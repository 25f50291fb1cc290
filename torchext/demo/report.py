"""The demonstration's final table and plot."""

from __future__ import annotations

from pathlib import Path

import torch

from ..convert import ConversionResult
from .train import Run


def gap(reference: Run, other: Run) -> float:
    """By what fraction the final held-out loss of `other` is higher; negative if it is lower."""
    last = max(reference.held_out)
    return other.held_out[last] / reference.held_out[last] - 1


def table(
    fp32: Run,
    bf16: Run,
    fp8: Run,
    conversion: ConversionResult,
    device: torch.device,
    *,
    kernels_before_fusing: int,
) -> str:
    """The comparison, as text.

    kernels_before_fusing: the number of kernels of a step if nothing in the FP8 model runs fused.
    """
    runs = (fp32, bf16, fp8)
    rows = [("held-out loss after", *(run.name for run in runs), "fp8 to fp32", "fp8 to bf16")]

    def add(label: str, values: list[float], form: str, change: str) -> None:
        *others, mine = values
        differences = (f"{mine / value - 1:{change}}" for value in others)
        rows.append((label, *(form.format(value) for value in values), *differences))

    for step in fp32.held_out:
        add(f"{step} steps", [run.held_out[step] for run in runs], "{:.4f}", "+.2%")
    rows.append(("",) * 6)
    saved = [run.saved_bytes / 2**20 for run in runs]
    add("saved for backward", saved, "{:.1f} MiB", "+.1%")
    add("kernels of one step", [run.kernels for run in runs], "{:.0f}", "+.1%")
    rows.append(("  before fusing", "", "", str(kernels_before_fusing), "", ""))
    steps = [1000 * run.seconds / len(run.losses) for run in runs]
    add("time of one step", steps, "{:.1f} ms", "+.1%")
    lines = [
        (f"{row[0]:<20}" + "".join(f"{cell:>13}" for cell in row[1:])).rstrip() for row in rows
    ]
    calls = ", ".join(f"{name} x {count}" for name, count in sorted(fp8.op_calls.items()))
    lines += ["", str(conversion), "", f"torchext kernels of one step, on {_where(device)}:"]
    return "\n".join([*lines, f"  {calls}"])


def _where(device: torch.device) -> str:
    if device.type == "cpu":
        return f"the CPU ({torch.get_num_threads()} threads)"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} (sm_{properties.major}{properties.minor})"


def draw(fp32: Run, bf16: Run, fp8: Run, path: Path) -> None:
    """Draws the runs' losses and, below, the gaps to FP32, which are too small to see in the
    losses.

    Writes a PNG. Raises ModuleNotFoundError without matplotlib.
    """
    from matplotlib.figure import Figure  # not pyplot: no display is needed

    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    losses, gaps = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = list(fp32.held_out)
    styles = ("tab:blue", "-"), ("tab:green", "-."), ("tab:orange", "--")
    for run, (color, style) in zip((fp32, bf16, fp8), styles, strict=True):
        losses.plot(_smooth(run.losses), style, color=color, alpha=0.4, linewidth=1)
        held_out = list(run.held_out.values())
        label = f"{run.name}: {held_out[-1]:.4f} at the end"
        losses.plot(steps, held_out, style, color=color, marker="o", markersize=4, label=label)
        percent = [100 * (run.held_out[step] / fp32.held_out[step] - 1) for step in steps]
        gaps.plot(steps, percent, style, color=color, marker="o", markersize=4)
    losses.set(
        ylabel="loss, nats per byte", title="One byte-level transformer, trained three times"
    )
    losses.legend(title="held out (faint: training)")
    gaps.set(xlabel="step", ylabel="against fp32, %")
    for axes in (losses, gaps):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _smooth(losses: list[float], window: int = 10) -> list[float]:
    recent = [losses[max(0, i - window + 1) : i + 1] for i in range(len(losses))]
    return [sum(values) / len(values) for values in recent]
