"""`python -m torchext.demo` trains a transformer in FP32, in BF16 and in FP8, and compares.

It exits with 1 if the final held-out losses of FP8 and FP32 differ by more than 1 % after 300 steps
or more.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch

from ..availability import is_available
from ..convert import convert_to_fp8_training
from .data import batches, standard_library
from .model import ByteTransformer
from .report import draw, gap, table
from .train import measure_one_step, train

LARGEST_GAP = 0.01
LEAST_STEPS = 300  # with fewer, any rounding, even to BF16, moves the loss by percents
BATCH, LENGTH, HELD_OUT_BATCHES = 16, 128, 8


def main(arguments: list[str] | None = None) -> int:
    """Runs the demonstration; returns the exit code."""
    options = _parse(arguments)
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    model = ByteTransformer().to(device)
    bf16_model, fp8_model = copy.deepcopy(model), copy.deepcopy(model)
    conversion = convert_to_fp8_training(fp8_model)
    unfused_model = copy.deepcopy(model)
    convert_to_fp8_training(unfused_model, fuse=False)

    text = standard_library()
    train_batches = batches(text.train, options.steps, BATCH, LENGTH, options.seed)
    held_out = batches(text.held_out, HELD_OUT_BATCHES, BATCH, LENGTH, options.seed)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"A byte-level transformer of {parameters / 1e6:.2f}M parameters learns Python's standard "
        f"library ({text.num_files} files,\n{len(text.train) / 1e6:.1f} MB to train on and "
        f"{len(text.held_out) / 1e6:.1f} MB held out), three times from the same start, on the "
        f"same {options.steps}\nbatches of {BATCH} x {LENGTH} bytes: in FP32, under BF16 autocast, "
        "and so again with FP8 layers.\n"
    )
    if device.type == "cpu" and torch.get_num_threads() > 1:
        print("If other programs keep this machine busy, OMP_NUM_THREADS=1 is much faster.\n")
    fp32 = train("fp32", model, train_batches, held_out)
    bf16 = train("bf16", bf16_model, train_batches, held_out, torch.bfloat16)
    fp8 = train("fp8", fp8_model, train_batches, held_out, torch.bfloat16)

    first_batch = train_batches[0].to(device)
    *_, kernels = measure_one_step(unfused_model, first_batch, torch.bfloat16)
    comparison = table(fp32, bf16, fp8, conversion, device, kernels_before_fusing=kernels)
    print(f"\n{comparison}\n")
    try:
        draw(fp32, bf16, fp8, options.plot)
        print(f"curves: {options.plot}")
    except ModuleNotFoundError as error:
        print(f"no curves drawn: {error}; pip install 'torchext[demo]'")
    final_gap = gap(fp32, fp8)
    if options.steps < LEAST_STEPS:
        print(
            f"final gap: {final_gap:+.2%}; no verdict on fewer than {LEAST_STEPS} steps: so early, "
            "any rounding moves the loss by percents"
        )
        return 0
    verdict = "within" if abs(final_gap) <= LARGEST_GAP else "NOT within"
    print(f"final gap: {final_gap:+.2%}, {verdict} {LARGEST_GAP:.0%}")
    return 0 if abs(final_gap) <= LARGEST_GAP else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m torchext.demo", description=__doc__)
    on_gpu, reason = is_available("cuda")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each run (400)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if on_gpu else "cpu",
        help=f"default on this machine: %(default)s ({reason})",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (0)")
    parser.add_argument(
        "--plot",
        type=Path,
        default=Path("demo/loss.png"),
        help="where to draw the curves (%(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1 (got {options.steps})")
    return options


if __name__ == "__main__":
    sys.exit(main())
