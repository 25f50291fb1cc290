"""torchext.nn.Linear with DTensor parameters, compared with the layer on one rank."""

from __future__ import annotations

import copy
import queue
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from support.ranks import rank_context
from torchext import Recipe, convert_to_fp8_training

RECIPES = [Recipe.deepseek_v3(), Recipe.rowwise(), Recipe.tensorwise()]


class Mlp(torch.nn.Module):
    def __init__(self, recipe: Recipe, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.LayerNorm(256)
        self.up = torch.nn.Linear(256, 512, bias)
        self.down = torch.nn.Linear(512, 256, bias)
        self.recipe = recipe

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


PLANS: dict[str, dict[str, ParallelStyle]] = {
    "tensor": {"up": ColwiseParallel(), "down": RowwiseParallel()},
    "sequence": {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    },
    "gathered": {"up": ColwiseParallel(output_layouts=Replicate()), "down": ColwiseParallel()},
}


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def difference(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def differences(
    mesh: DeviceMesh, recipe: Recipe, plan: str, bias: bool, compiled: bool
) -> dict[str, float]:
    """The differences of the output and of each gradient from those of the layer on one rank."""
    plain = Mlp(recipe, bias)
    # Not fused: a norm of DTensors runs as PyTorch's, whose last bits are others.
    convert_to_fp8_training(plain, recipe, fuse=False)
    model = copy.deepcopy(plain)
    parallelize_module(model, mesh, PLANS[plan])
    torch.manual_seed(1)
    x = torch.randn(2, 16, 256)
    expected = plain(x)
    expected.square().mean().backward()
    local = x.chunk(mesh.size(), 1)[mesh.get_rank()] if plan == "sequence" else x
    y = (torch.compile(model, backend="aot_eager") if compiled else model)(local)
    if plan == "gathered":  # the last layer's features are sharded
        y = DTensor.from_local(y, mesh, [Shard(2)])
    whole(y).square().mean().backward()
    gradients = zip(model.named_parameters(), plain.parameters(), strict=True)
    return {
        "output": difference(whole(y), expected),
        **{name: difference(whole(p.grad), whole(q.grad)) for (name, p), q in gradients},
    }


@pytest.mark.parametrize("plan", PLANS)
def test_one_rank_has_the_same_bits(mesh, plan):
    for recipe in RECIPES:
        found = differences(mesh, recipe, plan, bias=True, compiled=False)
        assert max(found.values()) == 0


def test_compiled(mesh):
    torch._dynamo.reset()
    found = differences(mesh, RECIPES[0], "tensor", bias=True, compiled=True)
    assert max(found.values()) < 1e-5


def _two_ranks(rank: int, where: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    cases = [
        *((RECIPES[0], plan, True) for plan in PLANS),
        (RECIPES[0], "tensor", False),
        *((recipe, "tensor", True) for recipe in RECIPES[1:]),
    ]
    found = {
        (str(recipe), plan, bias): differences(mesh, recipe, plan, bias, compiled=False)
        for recipe, plan, bias in cases
    }
    results.put(found)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks(tmp_path):
    context = rank_context()
    results = context.Queue()
    arguments = (str(tmp_path / "init"), results)
    ranks = [context.Process(target=_two_ranks, args=(rank, *arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        both = [results.get(timeout=120) for _ in ranks]
    except queue.Empty:
        pytest.fail("a rank did not answer")
    finally:
        for rank in ranks:
            rank.join(30)
            rank.kill()
    assert both[0] == both[1]
    for (recipe, plan, bias), found in both[0].items():
        # Shards contain whole blocks of 128, which keep their scales. Row-wise and tensor-wise
        # scales belong to each rank's part, so that elements round differently.
        bound = 1e-5 if recipe == "blockwise" else 0.15
        assert max(found.values()) < bound, (recipe, plan, bias, found)


def test_any_placement(mesh):
    """Placements that no plan uses are redistributed."""
    plain = Mlp(RECIPES[0])
    convert_to_fp8_training(plain)
    layer, x = plain.up, torch.randn(2, 16, 256)
    expected = layer(x)
    for placement in (Replicate(), Shard(0), Shard(1), Shard(2)):
        distributed = distribute_tensor(x, mesh, [placement])
        for weight in (Replicate(), Shard(0), Shard(1)):
            parameters: dict[str, Tensor] = {
                "weight": distribute_tensor(layer.weight, mesh, [weight]),
                "bias": distribute_tensor(layer.bias, mesh, [Replicate()]),
            }
            y = torch.func.functional_call(layer, parameters, (distributed,))
            assert torch.equal(y.full_tensor(), expected)


def test_a_plain_input_of_a_sharded_layer_is_refused(mesh):
    plain = Mlp(RECIPES[0])
    convert_to_fp8_training(plain)
    weight = distribute_tensor(plain.up.weight, mesh, [Shard(0)])
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        torch.func.functional_call(plain.up, {"weight": weight}, (torch.randn(3, 256),))
