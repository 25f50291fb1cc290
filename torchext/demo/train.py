"""The demonstration's training loop and its measurements."""

from __future__ import annotations

import collections
import dataclasses
import math
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_EVALUATIONS = 8  # evaluations of the held-out loss, not counting the one before training


@dataclasses.dataclass
class Run:
    """The measurements of one training run.

    Attributes:
        name: "fp32", "bf16" or "fp8".
        losses: training loss of every step, in nats per byte.
        held_out: {number of steps done: mean loss on the held-out batches, in nats per byte}.
        saved_bytes: bytes that autograd keeps from forward to backward, without parameters.
        op_calls: {torchext op: number of calls in one step, forward and backward}.
        kernels: ops of one step that compute or copy something.
        seconds: wall time of training, without evaluations.
    """

    name: str
    losses: list[float]
    held_out: dict[int, float]
    saved_bytes: int
    op_calls: dict[str, int]
    kernels: int
    seconds: float


def train(
    name: str,
    model: nn.Module,
    train_batches: Tensor,
    held_out_batches: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Run:
    """Trains `model` with AdamW on train_batches, int64 [steps, batch, length + 1], one per step.

    It trains under autocast to `dtype`, unless that is torch.float32. The learning rate rises for
    the first twentieth of the steps, and then falls to a tenth along a cosine.
    """
    device = next(model.parameters()).device
    train_batches, held_out_batches = train_batches.to(device), held_out_batches.to(device)
    saved_bytes, op_calls, kernels = measure_one_step(model, train_batches[0], dtype)
    steps = len(train_batches)
    optimizer = new_optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _learning_rate_factor(step, steps)
    )
    evaluations = max(1, min(_EVALUATIONS, steps // 10))
    evaluate_at = {round(steps * i / evaluations) for i in range(1, evaluations + 1)}
    held_out = {0: _held_out_loss(model, held_out_batches, dtype)}
    run = Run(name, [], held_out, saved_bytes, op_calls, kernels, 0.0)
    progress = Progress(name, steps)
    start = time.perf_counter()
    for step, tokens in enumerate(train_batches, start=1):
        loss = training_step(model, optimizer, tokens, dtype)
        schedule.step()
        run.losses.append(loss.item())
        if step in evaluate_at:
            evaluation_start = time.perf_counter()
            run.held_out[step] = _held_out_loss(model, held_out_batches, dtype)
            start += time.perf_counter() - evaluation_start
        progress.update(step, run.losses[-1])
    run.seconds = time.perf_counter() - start
    progress.close()
    return run


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Forward, backward and the optimizer's step on int64 tokens [batch, length + 1]; the loss.

    dtype: of autocast; torch.float32 for none.
    """
    loss = _loss(model, tokens, dtype)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _learning_rate_factor(step: int, steps: int) -> float:
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))


def _loss(model: nn.Module, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean cross-entropy of the next byte, in nats."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def _held_out_loss(model: nn.Module, batches: Tensor, dtype: torch.dtype) -> float:
    return torch.stack([_loss(model, tokens, dtype) for tokens in batches]).mean().item()


def measure_one_step(
    model: nn.Module, tokens: Tensor, dtype: torch.dtype
) -> tuple[int, dict[str, int], int]:
    """Bytes kept for backward, with each storage counted once; calls of torchext ops; ops of all
    libraries that compute or copy something, which are about as many as kernels."""
    storages: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with _OpCalls() as ops:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = _loss(model, tokens, dtype)
        loss.backward()
    model.zero_grad()
    return sum(storages.values()), dict(ops.calls), ops.kernels


# Ops that are no views, and still compute nothing.
_WITHOUT_KERNEL = ("empty", "empty_strided", "empty_like", "new_empty", "_reshape_alias", "detach")


class _OpCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()
        self.kernels = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "torchext":
            self.calls[name] += 1
        self.kernels += not (func.is_view or name in _WITHOUT_KERNEL)
        return func(*args, **(kwargs or {}))


class Progress:
    """A progress bar on a terminal; otherwise a line for each tenth of the steps."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps = name, steps
        self.start = time.perf_counter()
        self.on_terminal = sys.stdout.isatty()

    def update(self, step: int, loss: float) -> None:
        elapsed = time.perf_counter() - self.start
        left = elapsed / step * (self.steps - step)
        text = f"step {step:>4}/{self.steps}  loss {loss:.3f}  {elapsed:4.0f} s, {left:3.0f} s left"
        if self.on_terminal:
            done = 30 * step // self.steps
            bar = "#" * done + "-" * (30 - done)
            print(f"\r{self.name:<5} [{bar}] {text} ", end="", flush=True)
        elif step * 10 // self.steps != (step - 1) * 10 // self.steps:
            print(f"{self.name:<5} {text}", flush=True)

    def close(self) -> None:
        if self.on_terminal:
            print()
