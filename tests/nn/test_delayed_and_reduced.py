"""Weight gradients that are delayed, under DDP and FSDP2, which reduce gradients after backward.

One process is enough: DDP's hook below doubles what it reduces, and FSDP2 moves what it reduces to
the shards. A delayed gradient would miss either.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import torchext
from torchext import delay_weight_gradients
from torchext.ops import gradient_sync


class Recomputed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = torchext.nn.Linear(128, 128), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        torchext.nn.Linear(128, 128), torchext.nn.SwiGLU(128, 128), Recomputed(True),
        Recomputed(False),
    )  # fmt: skip


def loss(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(seed))
    return model(x).square().mean()


def gradients(*seeds: int) -> list[Tensor]:
    """Those of `network`, summed over micro-batches."""
    model = network()
    for seed in seeds:
        loss(model, seed).backward()
    return [p.grad for p in model.parameters()]  # type: ignore[misc]


def replicated() -> DistributedDataParallel:
    def doubled(_, bucket):  # DDP compares annotations with classes, and here they are strings
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(2 * bucket.buffer())
        return future

    model = DistributedDataParallel(network())
    model.register_comm_hook(None, doubled)
    return model


def sharded(mesh: Any, *, reshard: bool = False) -> Any:
    model: Any = fully_shard(network(), mesh=mesh)
    model.set_reshard_after_backward(reshard)
    return model


def of_shards(model: Any) -> list[Tensor]:
    model.reshard()
    grads = [p.grad for p in model.parameters()]
    assert all(isinstance(grad, DTensor) for grad in grads)
    return [grad.full_tensor() for grad in grads]


def assert_same(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_ddp_reduces_all_gradients(mesh):
    model = replicated()
    with delay_weight_gradients() as queue:
        with model.no_sync():
            loss(model, 1).backward()
        assert len(queue) == 5  # not that of the layer which reentrant checkpointing recomputes
        queue.run()
        loss(model, 2).backward()
        assert len(queue) == 0
    assert_same((p.grad for p in model.parameters()), (2 * g for g in gradients(1, 2)))


def test_ddp_may_be_told_to_reduce_after_forward(mesh):
    """As torch's pipelines do: all forwards run in no_sync()."""
    model: Any = replicated()
    with delay_weight_gradients() as queue:
        with model.no_sync():
            found = [loss(model, seed) for seed in (1, 2)]
            found[0].backward()
            assert len(queue) == 5
        queue.run()
        model.reducer.prepare_for_backward([found[1]])
        found[1].backward()
        assert len(queue) == 0
    assert_same((p.grad for p in model.parameters()), (2 * g for g in gradients(1, 2)))


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp2_reduces_all_gradients(mesh, reshard):
    model = sharded(mesh, reshard=reshard)
    with delay_weight_gradients() as queue:
        loss(model, 1).backward()
        assert len(queue) == 0
    assert_same(of_shards(model), gradients(1))


def test_fsdp2_reduces_what_was_delayed_before(mesh):
    model = sharded(mesh)
    model.set_requires_gradient_sync(False)
    with delay_weight_gradients() as queue:
        loss(model, 1).backward()
        assert len(queue) == 5
        queue.run()
        model.set_requires_gradient_sync(True)
        loss(model, 2).backward()
        assert len(queue) == 0
    assert_same(of_shards(model), gradients(1, 2))


def test_running_the_queue_too_late_is_an_error(mesh):
    model, shards = replicated(), sharded(mesh)
    with delay_weight_gradients() as queue:
        with model.no_sync():
            loss(model, 1).backward()
        loss(model, 2).backward()
        with pytest.raises(RuntimeError, match="must come before gradients are reduced"):
            queue.run()
        shards.set_requires_gradient_sync(False)
        loss(shards, 1).backward()
        shards.set_requires_gradient_sync(True)
        with pytest.raises(RuntimeError, match="must come before gradients are reduced"):
            queue.run()


@pytest.mark.parametrize(
    "owner, name", [(DistributedDataParallel, "_active_ddp_module"), (None, "FSDPState")]
)
def test_a_torch_that_does_not_tell_is_an_error(mesh, monkeypatch, owner, name):
    from torch.distributed.fsdp._fully_shard import _fsdp_state

    monkeypatch.delattr(owner or _fsdp_state, name)
    with pytest.raises(RuntimeError, match=f"must tell which gradients are reduced .*{name}"):
        gradient_sync.check_torch()
