"""fp8_linear of DTensors, compared with the call on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from support.ranks import rank_context
from support.weights_only_testing import GRANULARITIES, operands
from torchext import ops


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_distributed_tensors(granularity, mesh):
    """Any placement gives the bits of the plain call, and of its gradient."""
    x, weight = operands(granularity, 4, 256, 384, torch.device("cpu"))
    bias = torch.randn(256)

    def distributed(tensor, placement):
        return DTensor.from_local(tensor, mesh, [placement])

    for some_bias in (bias, None):
        plain: Any = x.clone().requires_grad_()
        expected = ops.fp8_linear(plain, *weight.quantized, some_bias)
        expected.float().sum().backward()
        for of_x in (Replicate(), Shard(0), Shard(1)):
            for of_weight in (Replicate(), Shard(0), Shard(1)):
                leaf: Any = distributed(x, of_x).requires_grad_()
                y: Any = ops.fp8_linear(
                    leaf, distributed(weight.data, of_weight),
                    distributed(weight.scale, Replicate()),
                    None if some_bias is None else distributed(some_bias, Replicate()),
                )  # fmt: skip
                assert torch.equal(y.full_tensor(), expected)
                y.float().sum().backward()
                assert torch.equal(leaf.grad.full_tensor(), plain.grad)


def _two_ranks(rank: int, where: str, results: Any) -> None:
    """Puts (granularity, placements, difference from the plain call) for each case."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for granularity in GRANULARITIES:
        x, weight = operands(granularity, 4, 256, 512, torch.device("cpu"), dtype=torch.float32)
        bias = torch.randn(256)
        expected = ops.fp8_linear(x, *weight.quantized, bias)
        for placements in ((Replicate(), Shard(0)), (Shard(1), Shard(1)), (Shard(0), Replicate())):
            x_part, data_part = (
                t.chunk(2, p.dim)[rank].contiguous() if isinstance(p, Shard) else t
                for t, p in zip((x, weight.data), placements, strict=True)
            )
            y: Any = ops.fp8_linear(
                DTensor.from_local(x_part, mesh, [placements[0]]),
                DTensor.from_local(data_part, mesh, [placements[1]]),
                DTensor.from_local(weight.scale, mesh, [Replicate()]),
                DTensor.from_local(bias, mesh, [Replicate()]),
            )
            difference = (y.full_tensor() - expected).norm() / expected.norm()
            results.put((granularity, str(placements), difference.item()))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_share_a_product(tmp_path: Path):
    """By features, by K (the partial sums are added, and the bias once), and by rows of x."""
    context = rank_context()
    results = context.Queue()
    where = str(tmp_path / "init")
    ranks = [context.Process(target=_two_ranks, args=(rank, where, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        found = [results.get(timeout=120) for _ in range(2 * 3 * len(GRANULARITIES))]
    finally:
        for rank in ranks:
            rank.join(30)
            rank.kill()
    assert max(difference for *_, difference in found) < 1e-5, found
