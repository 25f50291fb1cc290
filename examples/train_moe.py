"""Trains a small mixture of experts on two processes, in FP8, against BF16 on one process.

    torchrun --nproc-per-node 2 examples/train_moe.py              some minutes on two cores
    torchrun --nproc-per-node 2 examples/train_moe.py --steps 4    seconds

The model has the shape of DeepSeek-V3: latent attention, a dense layer, then layers of experts
with a shared expert and a sigmoid router, whose bias balances the load. It predicts bytes of
Python's standard library (torchext.demo). With --nproc-per-node R each process holds 1 / R of the
experts and trains on 1 / R of each batch: torchext.nn.MoE sends tokens to their experts in FP8 and
returns rows in BF16 (--no-exact: one sum for each rank). Then rank 0 alone trains the same model,
from the same weights on the same batches, under BF16 autocast, with experts in plain PyTorch.

It prints the losses, the largest difference of the smoothed curves, and the bytes that a process
sends for each step, against BF16 all-to-alls that send every choice of every token. --picture FILE
draws the curves. CPUs use gloo, GPUs NCCL.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import torchext
from torchext.demo.data import batches, standard_library
from torchext.demo.model import MLP, NUM_BYTES
from torchext.demo.report import _smooth

WIDTH, HEADS, HEAD, ROTARY, LATENT = 256, 4, 64, 32, 128
EXPERTS, CHOICES, INNER = 16, 4, 128
SMOOTHED = 20  # steps whose mean loss is compared


class LatentAttention(nn.Module):
    """Causal attention whose keys and values come from one small latent (DeepSeek-V2's MLA)."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, HEADS * (HEAD + ROTARY), bias=False)
        self.kv_down = nn.Linear(WIDTH, LATENT + ROTARY, bias=False)
        self.norm = nn.RMSNorm(LATENT)
        self.kv_up = nn.Linear(LATENT, HEADS * 2 * HEAD, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [batch, length, width]
        q, q_rotary = self.q_proj(x).unflatten(-1, (HEADS, -1)).split([HEAD, ROTARY], -1)
        latent, k_rotary = self.kv_down(x).split([LATENT, ROTARY], -1)
        k, v = self.kv_up(self.norm(latent)).unflatten(-1, (HEADS, -1)).chunk(2, -1)
        k_rotary = rotated(k_rotary[:, :, None]).expand(-1, -1, HEADS, -1)
        q, k = torch.cat([q, rotated(q_rotary)], -1), torch.cat([k, k_rotary.to(k.dtype)], -1)
        heads = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding of x [batch, length, heads, size]."""
    half = x.shape[-1] // 2
    frequencies = 10000 ** (-torch.arange(half, device=x.device) / half)
    angles = (torch.arange(x.shape[1], device=x.device)[:, None] * frequencies)[:, None]
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Router(nn.Module):
    """The experts with the largest sigmoid plus bias; weights are their sigmoids, normalized.

    After each step the bias moves away from experts with more than their share of tokens, as in
    DeepSeek-V3, so no loss has to balance them.
    """

    bias: Tensor
    load: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH) * 0.02)
        self.register_buffer("bias", torch.zeros(EXPERTS))
        self.register_buffer("load", torch.zeros(EXPERTS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight).sigmoid()
        ids = (scores.detach() + self.bias).topk(CHOICES, -1).indices
        self.load += torch.bincount(ids.flatten(), minlength=EXPERTS)
        chosen = scores.gather(-1, ids)
        return ids, chosen / chosen.sum(-1, keepdim=True)

    @torch.no_grad()
    def balance(self) -> None:
        """Called after each step, when `load` has the counts of all ranks."""
        self.bias += 0.001 * (self.load.mean() - self.load).sign()
        self.load.zero_()


class PlainExperts(nn.Module):
    """Experts of one process in plain PyTorch, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH) * 0.02)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) * 0.02)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        ids, weights = ids.flatten(0, -2), weights.flatten(0, -2)
        out = torch.zeros_like(tokens, dtype=torch.float32)
        for expert in range(EXPERTS):
            token, choice = torch.where(ids == expert)
            gate, up = F.linear(tokens[token], self.gate_up_proj[expert]).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, self.down_proj[expert])
            out.index_add_(0, token, y.float() * weights[token, choice, None])
        return out.to(x.dtype).view_as(x)


class ExpertLayer(nn.Module):
    """Routed experts and one that every token passes."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router()
        self.experts: nn.Module = PlainExperts()
        self.shared = MLP(WIDTH, INNER)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, *self.router(x)) + self.shared(x)


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(WIDTH), LatentAttention()
        self.mlp_norm, self.mlp = nn.RMSNorm(WIDTH), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    """Bytes [batch, length] to logits of the next byte."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_BYTES, WIDTH)
        self.blocks = nn.Sequential(
            Block(MLP(WIDTH, 512)), *(Block(ExpertLayer()) for _ in range(layers))
        )
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, NUM_BYTES, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


def in_fp8(model: Model, dispatcher: torchext.moe.Dispatcher, rank: int, *, exact: bool) -> Model:
    """A copy whose linear layers are FP8, and which holds the experts of one rank."""
    model = copy.deepcopy(model)
    here = dispatcher.num_local_experts
    for layer in model.modules():
        if isinstance(layer, ExpertLayer):
            plain = layer.experts
            layer.experts = torchext.nn.MoE(
                WIDTH, INNER, EXPERTS, dispatcher=dispatcher, exact=exact
            )
            for own, all_experts in zip(
                layer.experts.parameters(), plain.parameters(), strict=True
            ):
                own.data.copy_(all_experts[rank * here : (rank + 1) * here])
    torchext.convert_to_fp8_training(model)
    return model


def train(model: Model, steps: Tensor, ranks: int, rank: int) -> tuple[list[float], float]:
    """Losses of all steps, of the whole batch, and the seconds. steps: [steps, batch, length + 1],
    of which this rank takes its part."""
    experts = {
        id(p) for m in model.modules() if isinstance(m, torchext.nn.MoE) for p in m.parameters()
    }
    replicated = [p for p in model.parameters() if id(p) not in experts]
    routers = [m for m in model.modules() if isinstance(m, Router)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    losses: list[float] = []
    start = time.perf_counter()
    for number, batch in enumerate(steps):
        warm_up = min(1.0, (number + 1) / max(1, len(steps) // 20))
        rate = warm_up * (0.55 + 0.45 * math.cos(math.pi * number / len(steps)))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate
        tokens = batch.chunk(ranks)[rank]
        with torch.autocast(tokens.device.type, torch.bfloat16):
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()) / ranks
        loss.backward()
        shared = [loss.detach(), *(router.load for router in routers)]
        # Experts' gradients are sums over the tokens of all ranks already.
        shared += [p.grad for p in replicated if p.grad is not None]
        if ranks > 1:
            add_up(shared)
        optimizer.step()
        optimizer.zero_grad()
        for router in routers:
            router.balance()
        losses.append(shared[0].item())
        if rank == 0 and (number + 1) % max(1, len(steps) // 5) == 0:
            seconds = time.perf_counter() - start
            print(f"  step {number + 1:>4}  loss {losses[-1]:.3f}  {seconds:4.0f} s", flush=True)
    return losses, time.perf_counter() - start


def add_up(tensors: list[Tensor]) -> None:
    """Adds tensors over all ranks, in one all-reduce."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def bytes_in_bf16(routers: list[Tensor], rank: int, ranks: int) -> float:
    """Bytes that a rank would send with a BF16 row for each choice of an expert elsewhere: out,
    back, and both again in backward."""
    away = [ids[ids // (EXPERTS // ranks) != rank].numel() for ids in routers]
    return 4 * sum(away) * 2 * WIDTH


def draw(curves: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure  # not pyplot: no display is needed

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    losses, gap = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for (name, values), style in zip(curves.items(), ("-", "--"), strict=True):
        losses.plot(_smooth(values, SMOOTHED), style, label=name)
    first, second = (_smooth(values, SMOOTHED) for values in curves.values())
    gap.plot([100 * (b / a - 1) for a, b in zip(first, second, strict=True)], color="tab:orange")
    losses.set(ylabel="loss, nats per byte", title="A small mixture of experts, trained twice")
    losses.legend()
    gap.set(xlabel="step", ylabel="FP8 to BF16, %")
    for axes in (losses, gap):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("steps", 200), ("batch", 16), ("length", 128), ("layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--exact", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    # Rank 0 trains alone for a while, and the others wait for it.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=2))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    model = Model(options.layers).to(device)
    text = standard_library().train
    steps = batches(text, options.steps, options.batch, options.length, seed=0).to(device)

    dispatcher = torchext.moe.Dispatcher(EXPERTS, timeout=600)
    fp8 = in_fp8(model, dispatcher, rank, exact=options.exact)
    chosen: list[Tensor] = []

    def note(module: Any, inputs: Any, outputs: Any) -> None:
        chosen.append(outputs[0])

    hooks = [m.register_forward_hook(note) for m in fp8.modules() if isinstance(m, Router)]
    if rank == 0:
        print(f"FP8, {EXPERTS} experts on {ranks} processes")
    losses, seconds = train(fp8, steps, ranks, rank)
    for hook in hooks:
        hook.remove()
    totals = [dispatcher.bytes_sent, bytes_in_bf16(chosen, rank, ranks)]
    counts = torch.tensor(totals, dtype=torch.float64, device=device) / ranks / len(steps)
    dist.all_reduce(counts)
    sent, in_bf16 = (counts / 1e6).tolist()
    if rank == 0:
        print("BF16, one process")
        reference, seconds_alone = train(model, steps, 1, 0)
        smooth, smooth_reference = _smooth(losses, SMOOTHED), _smooth(reference, SMOOTHED)
        largest = max(abs(a / b - 1) for a, b in zip(smooth, smooth_reference, strict=True))
        last = f"FP8 {smooth[-1]:.4f}, BF16 {smooth_reference[-1]:.4f}"
        print(f"loss of the last {SMOOTHED} steps: {last}")
        print(f"largest difference of means of {SMOOTHED} steps: {largest:.2%}")
        share = f"{sent / in_bf16:.2f}" if in_bf16 else "none"
        print(
            f"a process sends {sent:.2f} MB for a step; with BF16 rows of every choice it would "
            f"send {in_bf16:.2f} MB (ratio {share})"
        )
        each = 1000 / len(steps)
        print(f"a step takes {seconds * each:.0f} ms in FP8, {seconds_alone * each:.0f} ms in BF16")
        if options.picture:
            draw(
                {"BF16, one process": reference, f"FP8, {ranks} processes": losses}, options.picture
            )
    dist.barrier()
    dispatcher.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
