"""The demonstration's final table and plot."""

from __future__ import annotations

from pathlib import Path

import torch

from ..convert import ConversionResult
from .train import Run


def gap(reference: Run, fp8: Run) -> float:
    """By what fraction the final held-out loss of `fp8` is higher; negative if it is lower."""
    last = max(reference.held_out)
    return fp8.held_out[last] / reference.held_out[last] - 1


def table(reference: Run, fp8: Run, conversion: ConversionResult, device: torch.device) -> str:
    """The comparison, as text."""
    rows = [("held-out loss after", reference.name, fp8.name, "difference")]
    for step, loss in reference.held_out.items():
        other = fp8.held_out[step]
        rows.append((f"{step} steps", f"{loss:.4f}", f"{other:.4f}", f"{other / loss - 1:+.2%}"))
    rows.append(("", "", "", ""))
    rows.append(
        (
            "saved for backward",
            f"{reference.saved_bytes / 2**20:.1f} MiB",
            f"{fp8.saved_bytes / 2**20:.1f} MiB",
            f"{fp8.saved_bytes / reference.saved_bytes - 1:+.1%}",
        )
    )
    rows.append(
        (
            "training time",
            f"{reference.seconds:.1f} s",
            f"{fp8.seconds:.1f} s",
            f"{fp8.seconds / reference.seconds:.2f} x",
        )
    )
    lines = [f"{a:<24}{b:>12}{c:>12}{d:>12}".rstrip() for a, b, c, d in rows]
    calls = ", ".join(f"{name} x {count}" for name, count in sorted(fp8.op_calls.items()))
    lines += ["", str(conversion), "", f"torchext kernels of one step, on {_where(device)}:"]
    return "\n".join([*lines, f"  {calls}"])


def _where(device: torch.device) -> str:
    if device.type == "cpu":
        return f"the CPU ({torch.get_num_threads()} threads)"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} (sm_{properties.major}{properties.minor})"


def draw(reference: Run, fp8: Run, path: Path) -> None:
    """Draws both runs' losses and, below, their gap, which is too small to see in the losses.

    Writes a PNG. Raises ModuleNotFoundError without matplotlib.
    """
    from matplotlib.figure import Figure  # not pyplot: no display is needed

    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    losses, gaps = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = list(reference.held_out)
    for run, color, style in ((reference, "tab:blue", "-"), (fp8, "tab:orange", "--")):
        losses.plot(_smooth(run.losses), style, color=color, alpha=0.4, linewidth=1)
        held_out = list(run.held_out.values())
        label = f"{run.name}: {held_out[-1]:.4f} at the end"
        losses.plot(steps, held_out, style, color=color, marker="o", markersize=4, label=label)
    losses.set(ylabel="loss, nats per byte", title="One byte-level transformer, trained twice")
    losses.legend(title="held out (faint: training)")
    percent = [100 * (fp8.held_out[step] / reference.held_out[step] - 1) for step in steps]
    gaps.plot(steps, percent, color="tab:orange", marker="o", markersize=4)
    gaps.axhline(0, color="tab:blue")
    gaps.set(xlabel="step", ylabel=f"{fp8.name} against {reference.name}, %")
    for axes in (losses, gaps):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _smooth(losses: list[float], window: int = 10) -> list[float]:
    recent = [losses[max(0, i - window + 1) : i + 1] for i in range(len(losses))]
    return [sum(values) / len(values) for values in recent]
