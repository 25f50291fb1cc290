"""Ways to change a layer's weight, recorded by PyTorch or not, and ways to copy a layer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import torch

from support.linear_testing import halve, normal_linear
from torchext import Recipe
from torchext.nn import Linear


def square_linear(device: torch.device) -> Linear:
    return normal_linear(device, 160, 160)


def kept(device: torch.device) -> int:
    """How often a forward quantizes an unchanged weight: on CUDA, no cache looks for changes."""
    return 1 if device.type == "cuda" else 0


def copies_of(linear: Linear) -> list[Linear]:
    saved = io.BytesIO()
    torch.save(linear, saved)
    saved.seek(0)
    return [
        copy.copy(linear),
        copy.deepcopy(linear),
        pickle.loads(pickle.dumps(linear)),
        torch.load(saved, weights_only=False),
    ]


class WritesThroughData(torch.optim.Optimizer):
    """An optimizer of the old style: it writes to `.data` and so bypasses the version counter."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.5)


def _swap_data(linear: Linear) -> None:
    linear.weight.data = linear.weight.data * 0.5


def _transpose_data(linear: Linear) -> None:
    linear.weight.data = linear.weight.data.t()


def _negate_lazily(linear: Linear) -> None:
    linear.weight.data = torch._neg_view(linear.weight.data)


def _other_shape_of_the_same_bytes(linear: Linear) -> None:
    linear.weight.data = linear.weight.data.as_strided((160, 160), (1, 160))


def _load(linear: Linear) -> None:
    linear.load_state_dict({name: t * 0.5 for name, t in linear.state_dict().items()})


def _load_assign(linear: Linear) -> None:
    state = {name: t * 0.5 for name, t in linear.state_dict().items()}
    linear.load_state_dict(state, assign=True)


def _replace(linear: Linear) -> None:
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 0.5)


def _swap_tensors(linear: Linear) -> None:
    torch.utils.swap_tensors(linear.weight, torch.nn.Parameter(linear.weight.detach() * 0.5))


def _reset(linear: Linear) -> None:
    linear.reset_parameters()


def _sgd(linear: Linear) -> None:
    torch.optim.SGD(linear.parameters(), lr=0.5).step()


def _adamw(linear: Linear) -> None:
    torch.optim.AdamW(linear.parameters(), lr=0.5, fused=True).step()


def _old_optimizer(linear: Linear) -> None:
    WritesThroughData(linear.parameters()).step()


def _bfloat16(linear: Linear) -> None:
    linear.to(torch.bfloat16)


def _recipe(linear: Linear) -> None:
    linear.recipe = Recipe.deepseek_v3(pow2_scale=True)


# Changes that PyTorch records in some way. A fused step leaves the version counter alone.
RECORDED = [
    halve,
    _swap_data,
    _transpose_data,
    _load,
    _load_assign,
    _replace,
    _swap_tensors,
    _reset,
    _sgd,
    _adamw,
    _old_optimizer,
    _bfloat16,
    _recipe,
    _negate_lazily,
    _other_shape_of_the_same_bytes,
]


def _merge_lora(linear: Linear) -> None:
    a, b = torch.ones(4, 160).to(linear.weight), torch.ones(160, 4).to(linear.weight)
    linear.weight.data += b @ a


def _copy_ema(linear: Linear) -> None:
    torch._foreach_lerp_([linear.weight.data], [torch.zeros_like(linear.weight)], 0.5)


def _through_detach(linear: Linear) -> None:
    torch.nn.init.normal_(linear.weight.data)


def _through_the_storage(linear: Linear) -> None:
    storage = linear.weight.untyped_storage()
    storage.copy_((linear.weight.detach() * 0.5).untyped_storage())


def _one_sign(linear: Linear) -> None:
    linear.weight.data[-1, -1] *= -1


def _all_signs(linear: Linear) -> None:
    linear.weight.data.neg_()


def _exchanged_rows(linear: Linear) -> None:
    linear.weight.data[[3, 100]] = linear.weight.data[[100, 3]]


def _exchanged_neighbors(linear: Linear) -> None:
    linear.weight.data[:, [6, 7]] = linear.weight.data[:, [7, 6]]


def _transposed_in_place(linear: Linear) -> None:
    linear.weight.data.copy_(linear.weight.data.t().clone())


def _opposite_deltas(linear: Linear) -> None:
    linear.weight.data[0, 0] += 100
    linear.weight.data[0, 1] -= 100


# Changes that leave no trace: the version counter, the address and the optimizer do not show them.
UNRECORDED = [
    _merge_lora,
    _copy_ema,
    _through_detach,
    _through_the_storage,
    _one_sign,
    _all_signs,
    _exchanged_rows,
    _exchanged_neighbors,
    _transposed_in_place,
    _opposite_deltas,
]


def name_of(change: Callable[[Linear], None]) -> str:
    return change.__name__.removeprefix("_")
