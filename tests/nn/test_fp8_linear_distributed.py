"""FP8 weights under DDP and FSDP2, beside an adapter that trains."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from support.linear_testing import gradient
from torchext import dequantize_weights, quantize_for_inference

E4M3 = torch.float8_e4m3fn


class Experts(nn.Module):
    """ReLU^2 experts in two 3-D parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 128, 256) / 16)
        self.down = nn.Parameter(torch.randn(3, 256, 128) / 16)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        h = F.relu(torch.einsum("tcik,tk->tci", self.up[ids], x)).square()
        return torch.einsum("tcki,tci,tc->tk", self.down[ids], h, weights)


class Adapted(nn.Module):
    def __init__(self, mode: str = "w8a8") -> None:
        super().__init__()
        self.first, self.second = nn.Linear(128, 256), nn.Linear(256, 128)
        self.experts = Experts()
        quantize_for_inference(self, mode)  # type: ignore[arg-type]
        self.requires_grad_(False)
        self.down, self.up = nn.Linear(128, 8, bias=False), nn.Linear(8, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.first(x) + self.up(self.down(x)))
        ids = torch.arange(2 * len(x)).view(-1, 2) % 3
        return self.second(h + self.experts(h, ids, torch.full(ids.shape, 0.5)))


@pytest.fixture(params=["w8a8", "w8a16"])
def model(request: pytest.FixtureRequest) -> Adapted:
    torch.manual_seed(0)
    return Adapted(request.param)


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    y = model(x)
    y.square().mean().backward()
    down = next(p for name, p in model.named_parameters() if name.endswith("down.weight"))
    grad = gradient(down)
    return y.detach(), grad.full_tensor() if isinstance(grad, DTensor) else grad


def test_ddp(model, mesh):
    x = torch.randn(4, 128)
    expected = step(copy.deepcopy(model), x)
    for got, wanted in zip(step(DistributedDataParallel(model), x), expected, strict=True):
        assert torch.equal(got, wanted)


def test_ddp_is_told_of_what_is_in_fp8_when_it_wraps_the_model():
    def left_out(model: Any) -> list[str]:
        return list(model._ddp_params_and_buffers_to_ignore)

    model = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128))
    attribute: Any = ["1.bias"]
    model._ddp_params_and_buffers_to_ignore = attribute
    quantize_for_inference(model)
    model.insert(0, nn.Linear(128, 128))
    assert left_out(model) == ["1.bias", "1.weight", "2.weight"]
    assert not quantize_for_inference(model, skip=["0"]).converted
    assert left_out(model) == ["1.bias", "1.weight", "2.weight"]
    twin = copy.deepcopy(model)
    dequantize_weights(model)
    assert left_out(model) == ["1.bias"]
    assert left_out(pickle.loads(pickle.dumps(twin))) == ["1.bias", "1.weight", "2.weight"]


def test_fsdp2(model, mesh):
    x = torch.randn(4, 128)
    expected = step(copy.deepcopy(model), x)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for part in (model.first, model.experts, model.second, model):
        fully_shard(part, mesh=mesh)
    assert isinstance(model.first.weight, DTensor) and isinstance(model.experts.up, DTensor)
    for got, wanted in zip(step(model, x), expected, strict=True):
        assert torch.equal(got, wanted)
    for name, tensor in model.state_dict().items():
        assert isinstance(tensor, DTensor)
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor.full_tensor(), state[name])


def test_fsdp2_refuses_to_cast_fp8_weights(mesh):
    model = Adapted()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model.first, mesh=mesh, mp_policy=policy)
    with pytest.raises(TypeError, match=r"must be torch.float8_e4m3fn .*bfloat16.*param_dtype"):
        model(torch.randn(4, 128))
