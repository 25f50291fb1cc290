"""Trains a transformer twice from the same start, in BF16 and with torchext's FP8 layers. Writes
losses, step times and peak memory as JSON.

    python -m benchmarks.training --out FILE        on a GPU that is otherwise idle

The text is synthetic: a Markov chain over 512 tokens. A token is followed by one of eight, drawn
uniformly, so that no model's loss can be below log(8) = 2.08 (a little less where some of the
eight are equal).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, SUCCESSORS = 512, 8
WARM_UPS = 5  # steps left out of the step time


class Block(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate_up, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(y.transpose(1, 2).reshape(batch, length, width))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def batch_of(table: Tensor, rows: int, length: int) -> Tensor:
    """[rows, length] tokens: each is a uniformly drawn successor of the token before it."""
    tokens = [torch.randint(VOCABULARY, (rows,), device=table.device)]
    draws = torch.randint(SUCCESSORS, (length - 1, rows), device=table.device)
    for draw in draws:
        tokens.append(table[tokens[-1], draw])
    return torch.stack(tokens, dim=1)


def train(options: argparse.Namespace, fp8: bool) -> dict:
    from torchext import convert_to_fp8_training

    torch.manual_seed(options.seed)
    model = Model(options.width, options.layers, options.width // 128).to("cuda", torch.bfloat16)
    if fp8:
        convert_to_fp8_training(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)
    torch.manual_seed(options.seed + 1)
    table = torch.randint(VOCABULARY, (VOCABULARY, SUCCESSORS), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / 20)
        tokens = batch_of(table, options.batch, options.length + 1)
        torch.cuda.synchronize()
        start = time.perf_counter()
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return {
        "losses": losses,
        "final_loss": statistics.mean(losses[-10:]),
        "step_milliseconds": 1e3 * statistics.median(seconds[WARM_UPS:]),
        "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: written. 2: no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.training: needs a GPU", file=sys.stderr)
        return 2
    from .environment import describe

    results: dict = {"environment": describe("cuda")}
    results["arguments"] = {k: v for k, v in vars(options).items() if k != "out"}
    for name, fp8 in (("bf16", False), ("fp8", True)):
        results[name] = train(options, fp8)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        r = results[name]
        print(
            f"{name}: loss {r['final_loss']:.4f}, {r['step_milliseconds']:.1f} ms a step,"
            f" peak {r['peak_gigabytes']:.1f} GB",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
