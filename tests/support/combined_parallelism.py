"""FSDP2, tensor and expert parallelism in one block, for tests/distributed/test_shard_fp8.py.

Four ranks: "outer" is data parallel and shards what "inner" leaves of each parameter. "inner" has
the rows of a sequence (128 tokens a rank), features of the dense layers, and experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module

import torchext
from support.ranks import Meshes
from torchext.distributed import (
    Fp8ColwiseParallel,
    Fp8RowwiseParallel,
    gathered_dtypes,
    shard_fp8,
)
from torchext.moe import Dispatcher

TOKENS, HIDDEN, INNER, EXPERTS, CHOICES = 128, 256, 512, 4, 2


class Block(nn.Module):
    """All three parts read x, so that what they read has the same bits on any number of ranks."""

    def __init__(self, dispatcher: Dispatcher | None = None) -> None:
        super().__init__()
        self.up = torchext.nn.Linear(HIDDEN, INNER)
        self.down = torchext.nn.Linear(INNER, HIDDEN, bias=False)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.moe = torchext.nn.MoE(HIDDEN, 128, EXPERTS, dispatcher=dispatcher)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # As many tokens at a time as a rank has: torch's GEMM depends on that in its last bits.
        logits = torch.cat([self.router(part) for part in x.split(TOKENS)]).float()
        weights, ids = torch.softmax(logits, -1).topk(CHOICES)
        dense = self.down(torch.nn.functional.gelu(self.up(x)))
        return dense, self.moe(x, ids, weights.to(x.dtype))  # as FSDP2 casts a module's inputs


def values(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5


def fill(block: Block, experts: slice = slice(None)) -> Block:
    """The same values for each block, of some of the experts."""
    for seed, (name, parameter) in enumerate(block.named_parameters()):
        shape = (EXPERTS, *parameter.shape[1:]) if "moe" in name else parameter.shape
        whole = values(*shape, seed=seed)
        parameter.detach().copy_(whole[experts] if "moe" in name else whole)
    return block


def step(block: Any, tokens: slice) -> dict[str, Tensor]:
    """The outputs for some tokens of all ranks, and the gradient of x."""
    x = (16 * values(4 * TOKENS, HIDDEN, seed=100)).bfloat16()[tokens].requires_grad_()
    outputs = block(x)
    grads = [values(4 * TOKENS, HIDDEN, seed=seed).bfloat16()[tokens] for seed in (101, 102)]
    torch.autograd.backward(outputs, grads)
    assert x.grad is not None
    return {"dense": outputs[0].detach(), "moe": outputs[1].detach(), "dx": x.grad}


def sharded(meshes: Meshes, gather: Any) -> Any:
    inner, outer = meshes.square["inner"], meshes.square["outer"]
    dispatcher = Dispatcher(EXPERTS, group=inner.get_group())
    here, rank = dispatcher.num_local_experts, inner.get_local_rank()
    block = fill(Block(dispatcher), slice(rank * here, (rank + 1) * here))
    plan: Any = {
        "up": Fp8ColwiseParallel(input_layouts=Shard(0)),
        "down": Fp8RowwiseParallel(output_layouts=Shard(0)),
    }
    parallelize_module(block, inner, plan)
    for part in (block.moe, block):
        shard_fp8(part, outer, gather=gather)
    return block


def gradient(block: Any, name: str, meshes: Meshes) -> Tensor:
    """That of all experts, features and tokens, as one process has it."""
    grad = block.get_parameter(name).grad
    assert isinstance(grad, DTensor)
    whole = grad.full_tensor()  # over "outer", and of tensor parallelism over "inner"
    inner = meshes.square["inner"].get_group()
    if name == "router.weight":  # each rank of "inner" has other tokens
        dist.all_reduce(whole, group=inner)
    elif "moe" in name:
        parts = [torch.empty_like(whole) for _ in range(2)]
        dist.all_gather(parts, whole, group=inner)
        whole = torch.cat(parts)
    return whole


def difference(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def check_fsdp_with_tensor_and_expert_parallelism(meshes: Meshes) -> None:
    """Against one process with the tokens of all four ranks. FSDP2 divides by the two of "outer".

    To the bit: the experts' output, and everything between FP8 and BF16 gathers. The rest are sums
    of what ranks have rounded to BF16.
    """
    rank = dist.get_rank()
    tokens = slice(rank * TOKENS, (rank + 1) * TOKENS)
    plain = fill(Block()).bfloat16()
    expected = step(plain, slice(None))
    found = {}
    for gather in ("fp8", "bfloat16"):
        block = sharded(meshes, gather)
        in_fp8 = [n for n, d in gathered_dtypes(block).items() if d is torch.float8_e4m3fn]
        weights = ["up.weight", "down.weight", "moe.gate_up_proj", "moe.down_proj"]
        assert in_fp8 == (weights if gather == "fp8" else [])
        results = step(block, tokens)
        names = [name for name, _ in plain.named_parameters()]
        found[gather] = results | {name: gradient(block, name, meshes) for name in names}
    for name, got in found["fp8"].items():
        assert torch.equal(got, found["bfloat16"][name]), name
    assert torch.equal(found["fp8"]["moe"], expected["moe"][tokens])
    for name, bound in (("dense", 5e-3), ("dx", 2e-2)):
        assert difference(found["fp8"][name], expected[name][tokens]) < bound, name
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        # Rows that arrive in FP8 are rounded again for the gradients of experts.
        bound = 0.06 if "moe" in name else 6e-3
        assert difference(2 * found["fp8"][name], parameter.grad) < bound, name
