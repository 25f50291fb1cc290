"""shard_fp8 on 2 and 4 ranks: every result has the bits of FSDP2 that gathers BF16 weights, which
each rank then quantizes."""

from __future__ import annotations

import copy
import io
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.utils.checkpoint import checkpoint

import torchext
from support.combined_parallelism import check_fsdp_with_tensor_and_expert_parallelism  # noqa: F401
from support.ranks import Meshes, run_checks
from torchext import Recipe
from torchext.distributed import (
    Fp8ColwiseParallel,
    Fp8RowwiseParallel,
    Fp8ShardedWeight,
    gathered_dtypes,
    shard_fp8,
)
from torchext.distributed.blocks import Blocks
from torchext.ops import quantize_128x128

pytestmark = pytest.mark.slow  # starts processes, each of which loads torch

E4M3 = torch.float8_e4m3fn


# ---- models ----


class Block(nn.Module):
    def __init__(self, features: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(features)
        self.up, self.down = nn.Linear(features, inner), nn.Linear(inner, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Gated(nn.Module):
    def __init__(self, features: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(features, inner, bias=False)
        self.up_proj = nn.Linear(features, inner, bias=False)
        self.down_proj = nn.Linear(inner, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """As in transformers: 3-D parameters, here with an uneven number of experts."""

    def __init__(self, features: int, inner: int, count: int = 5) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(count, 2 * inner, features) / features**0.5)
        self.down = nn.Parameter(torch.randn(count, features, inner) / inner**0.5)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("tcwk,tk->tcw", self.gate_up[ids], x).chunk(2, -1)
        return torch.einsum("tcki,tci,tc->tk", self.down[ids], F.silu(gate) * up, weights)


class Mixture(nn.Module):
    def __init__(self, features: int, inner: int) -> None:
        super().__init__()
        self.router = nn.Linear(features, 5, bias=False)
        self.experts = Experts(features, inner)
        self.moe = torchext.nn.MoE(features, inner, 6, shared_intermediate_size=inner)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = torch.softmax(self.router(x).float(), -1).topk(2)
        y = x + self.experts(x, ids, weights.to(x.dtype))
        return y + self.moe(y, ids, weights)


def model(kind: type[nn.Module], features: int, inner: int, layers: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    built = nn.Sequential(*(kind(features, inner) for _ in range(layers)))
    torchext.convert_to_fp8_training(
        built, module_filter_fn=lambda module, name: "router" not in name
    )
    return built


def sharded(built: Any, mesh: DeviceMesh, gather: Any, **options: Any) -> Any:
    for part in built:
        shard_fp8(part, mesh, gather=gather, **options)
    return shard_fp8(built, mesh, gather=gather, **options)


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(built: nn.Module, features: int, steps: int = 2, batches: int = 1) -> list[Tensor]:
    """Outputs, gradients and at last parameters of some steps."""
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-2)
    seen = []
    for step in range(steps):
        for batch in range(batches):
            torch.manual_seed(100 * dist.get_rank() + 10 * step + batch)
            y = built(torch.randn(24, features))
            y.float().square().mean().backward()
            seen.append(y.detach())
        seen += [whole(p.grad) for p in built.parameters()]
        nn.utils.clip_grad_norm_(built.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return seen + [whole(p.detach()) for p in built.parameters()]


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for index, (x, y) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(x, y), f"tensor {index} of {len(got)}"


def compare(kind: type[nn.Module], features: int, inner: int, mesh: DeviceMesh, **rest: Any) -> Any:
    """Trains with both kinds of gathers, and returns the model that gathered FP8."""
    models = [sharded(model(kind, features, inner), mesh, g, **rest) for g in ("fp8", "bfloat16")]
    assert E4M3 in gathered_dtypes(models[0]).values()
    assert E4M3 not in gathered_dtypes(models[1]).values()
    same(*(train(m, features) for m in models))
    return models[0]


# ---- checks that run on every rank ----


def check_aligned_shards(meshes: Meshes) -> None:
    compare(Block, 256, 512, meshes.pair)


def check_uneven_shards(meshes: Meshes) -> None:
    # 456 rows are 114 a rank, 200 are 50, so that blocks straddle up to three ranks.
    compare(Block, 320, 456, meshes.all)
    compare(Block, 130, 200, meshes.all, reshard_after_forward=False)


def check_shards_without_rows(meshes: Meshes) -> None:
    compare(Block, 5, 9, meshes.all)  # 2, 2, 1 and 0 rows; 3, 3, 3 and 0


def check_replicated_shards(meshes: Meshes) -> None:
    compare(Block, 192, 320, meshes.square)


def check_fused_mlp(meshes: Meshes) -> None:
    built = compare(Gated, 256, 384, meshes.all)
    assert all(dtype is E4M3 for dtype in gathered_dtypes(built).values())


def check_experts(meshes: Meshes) -> None:
    built = compare(Mixture, 160, 128, meshes.all)
    sent = gathered_dtypes(built)
    assert sent["0.experts.gate_up"] is E4M3 and sent["0.experts.down"] is E4M3
    assert sent["0.moe.gate_up_proj"] is E4M3 and sent["0.moe.down_proj"] is E4M3
    assert sent["0.router.weight"] is torch.float32


def check_policies(meshes: Meshes) -> None:
    """Without mixed precision, with FP16, on CPU offload: as the unsharded model, where it is."""
    torch.manual_seed(1)
    x = torch.randn(24, 200)
    for dtype in (None, torch.float16):
        built = model(Block, 200, 328)
        expected = copy.deepcopy(built).to(dtype or torch.float32)
        y = expected(x if dtype is None else x.to(dtype))
        y.float().square().mean().backward()
        sharded(built, meshes.all, "fp8", mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
        z = built(x)
        z.float().square().mean().backward()
        assert torch.equal(y, z)
        for p, q in zip(built.parameters(), expected.parameters(), strict=True):
            difference = (whole(p.grad) - whole(q.grad).float()).norm() / whole(q.grad).norm()
            assert difference < 1e-2  # FSDP2 divides the sum of the ranks' gradients
    compare(Block, 200, 328, meshes.pair, offload_policy=CPUOffloadPolicy(pin_memory=False))


def check_accumulation_and_recomputation(meshes: Meshes) -> None:
    class Checkpointed(Block):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    def run(kind: type[nn.Module], gather: str) -> list[Tensor]:
        return train(sharded(model(kind, 256, 328), meshes.pair, gather), 256, batches=2)

    expected = run(Block, "bfloat16")
    same(run(Block, "fp8"), expected)
    same(run(Checkpointed, "fp8"), expected)


def check_checkpoints(meshes: Meshes) -> None:
    """A state_dict holds ordinary tensors, and loads into a model with or without FP8 gathers."""
    built: Any = compare(Block, 200, 328, meshes.all)
    path: list[str | None] = [None]
    if dist.get_rank() == 0:
        path = [tempfile.mkdtemp()]
    dist.broadcast_object_list(path)
    dcp.save(built.state_dict(), checkpoint_id=path[0])
    kept = [whole(p.detach()) for p in built.parameters()]
    for gather in ("fp8", "bfloat16"):
        other = sharded(model(Block, 200, 328), meshes.pair, gather)
        for p in other.parameters():
            p.detach().zero_()
        state = other.state_dict()
        dcp.load(state, checkpoint_id=path[0])
        other.load_state_dict(state)
        same([whole(p.detach()) for p in other.parameters()], kept)
        if gather == "fp8":
            assert E4M3 in gathered_dtypes(other).values()
            same([other(torch.ones(3, 200))], [built(torch.ones(3, 200))])
    saved = io.BytesIO()
    torch.save(built[0].up.weight.to_local(), saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    assert type(loaded) is Tensor and torch.equal(loaded, built[0].up.weight.to_local())
    state = torch.optim.AdamW(built.parameters()).state_dict()
    assert Fp8ShardedWeight not in {type(v) for v in state.values()}


def check_meta_device(meshes: Meshes) -> None:
    source = model(Block, 200, 328)
    with torch.device("meta"):
        built = model(Block, 200, 328)
    sharded(built, meshes.all, "fp8")
    built.to_empty(device="cpu")
    for p, q in zip(built.parameters(), source.parameters(), strict=True):
        assert isinstance(p, DTensor)
        part: Any = distribute_tensor(q.detach(), meshes.all, p.placements)
        p._local_tensor.detach().copy_(part._local_tensor)
    x = torch.randn(8, 200)
    same([built(x)], [sharded(source, meshes.all, "bfloat16")(x)])


def check_nan_and_infinity(meshes: Meshes) -> None:
    for value in (torch.nan, torch.inf):
        found = []
        for gather in ("fp8", "bfloat16"):
            built: Any = model(Block, 130, 200, layers=1)
            with torch.no_grad():
                built[0].up.weight[99, 3] = value  # in a block of rows 0 to 127 of three ranks
            y = sharded(built, meshes.all, gather)(torch.randn(4, 130).fill_(1))
            found.append(y)
        assert found[0].isnan().any()
        assert torch.equal(*(y.isnan() for y in found))
        same(*([y.nan_to_num()] for y in found))


class Counting:
    """An all-gather for FSDP2 that counts the bytes which each rank contributes."""

    def __init__(self) -> None:
        self.sent = 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **options: Any) -> Any:
        self.sent += input_tensor.nbytes
        return dist.all_gather_single(output_tensor, input_tensor, **options)


def check_with_tensor_parallelism(meshes: Meshes) -> None:
    """FSDP2 on the outer dimension, with tensor parallelism on the inner one."""

    def run(gather: Any) -> list[Tensor]:
        built = model(Block, 256, 512)
        for part in built:
            plan: dict[str, ParallelStyle] = {
                "up": Fp8ColwiseParallel(),
                "down": Fp8RowwiseParallel(),
            }
            parallelize_module(part, meshes.square["inner"], plan)
            shard_fp8(part, meshes.square["outer"], gather=gather)
        sent = gathered_dtypes(built)
        assert [name for name, dtype in sent.items() if dtype is E4M3] == (
            ["0.up.weight", "0.down.weight", "1.up.weight", "1.down.weight"]
            if gather == "fp8"
            else []
        )
        torch.manual_seed(meshes.square["outer"].get_local_rank())
        optimizer = torch.optim.AdamW(built.parameters(), lr=1e-2)
        seen = []
        for _ in range(2):
            y = built(torch.randn(24, 256))
            y.float().square().mean().backward()
            seen += [y.detach(), *(whole(p.grad) for p in built.parameters())]
            optimizer.step()
            optimizer.zero_grad()
        return seen

    same(run("fp8"), run("bfloat16"))


def check_bytes(meshes: Meshes) -> None:
    """One byte for each element and 4 for each block, against two."""
    reductions = []
    plain = dist.all_reduce

    def counted(tensor: Tensor, *rest: Any, **options: Any) -> Any:
        reductions.append(tensor.nbytes)
        return plain(tensor, *rest, **options)

    def sent(features: int, inner: int, gather: Any) -> int:
        built: Any = model(Gated, features, inner, layers=1)
        sharded(built, meshes.pair, gather)
        count = Counting()
        built[0].set_custom_all_gather(count)
        with torch.no_grad():
            built(torch.ones(2, features))
        return count.sent

    dist.all_reduce = counted
    try:
        elements = 3 * 512 * 1024 // 2
        assert sent(512, 1024, "bfloat16") == 2 * elements
        assert sent(512, 1024, "fp8") == elements + 4 * elements // 128**2
        assert not reductions
        # 100 of 200 rows, so that the cut is within a block of all weights
        assert sent(200, 256 + 144, "fp8") == (2 * 200 * 208 + 100 * 400) + 4 * (2 * 2 * 2 + 4)
        assert reductions == [4 * (2 + 2 + 4)]
    finally:
        dist.all_reduce = plain


def check_errors(meshes: Meshes) -> None:
    built = sharded(model(Block, 256, 256, layers=1), meshes.pair, "fp8")
    built.unshard()
    built[0].unshard()
    with pytest.raises(NotImplementedError, match=r"shard_fp8: aten.mul.*gather=.bfloat16"):
        built[0].up.weight * 2
    built[0].reshard()
    layer = model(Block, 256, 256, layers=1)
    with pytest.raises(ValueError, match=r"shard_fp8: gather must be .*got 'fp4'"):
        shard_fp8(layer, meshes.pair, gather="fp4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reshard_after_forward must be a bool"):
        shard_fp8(layer, meshes.all, reshard_after_forward=2)
    with pytest.raises(ValueError, match=r"mp_policy must have param_dtype=torch.bfloat16"):
        shard_fp8(layer, meshes.pair, gather="bfloat16", mp_policy=MixedPrecisionPolicy())
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module \(got list\)"):
        shard_fp8([], meshes.pair)  # type: ignore[arg-type]


def check_what_is_not_gathered_in_fp8(meshes: Meshes) -> None:
    layers = [torchext.nn.Linear(128, 128, recipe=Recipe.rowwise())]
    layers += [torchext.nn.Linear(128, 128, recipe=Recipe(dgrad="wide"))]
    layers += [torchext.nn.Linear(128, 128) for _ in range(2)]
    built: Any = nn.Sequential(*layers, nn.Linear(128, 128))
    built[4].weight = built[3].weight
    shard_fp8(built, meshes.pair)
    assert [d for n, d in gathered_dtypes(built).items() if n.endswith("weight")] == [
        torch.float32,
        torch.float32,
        E4M3,
        torch.float32,
    ]
    built(torch.randn(4, 128)).sum().backward()


CHECKS = [name for name in dir() if name.startswith("check_")]


# ---- tests ----


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return run_checks(__file__, CHECKS, 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", CHECKS)
def test_on_four_ranks(check: str, found: dict[str, str | None]) -> None:
    assert found[check] is None, found[check]


def test_compiled(mesh: DeviceMesh) -> None:
    def run(gather: str) -> list[Tensor]:
        torch._dynamo.reset()
        built = model(Block, 256, 328, layers=1)
        built[0].compile(backend="aot_eager")
        return train(sharded(built, mesh, gather), 256)

    same(run("fp8"), run("bfloat16"))


@pytest.mark.parametrize("shape", [(512, 256), (456, 130), (9, 5), (300, 17), (3, 200, 130)])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_messages_have_the_bits_of_the_whole_weight(shape: Any, world: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).bfloat16()
    blocks = Blocks(shape, world)
    shards = [weight[slice(*blocks.span(rank))] for rank in range(world)]
    amax = None
    if blocks.straddling():
        parts = [blocks.boundary_amax(shard, rank) for rank, shard in enumerate(shards)]
        amax = torch.stack(parts).amax(0)
    messages = [blocks.message(s, rank, amax, E4M3, False) for rank, s in enumerate(shards)]
    data = blocks.data(torch.cat([m.data for m in messages]).view(-1), E4M3)
    scale = blocks.scale(torch.cat([m.scale for m in messages]).view(-1))
    rows = blocks.scale_rows(scale.device)
    scale = scale[: blocks.scale_count()] if rows is None else scale[rows]
    expected, expected_scale = quantize_128x128(weight)
    assert torch.equal(data.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale)
