"""Helpers for tests of torchext.nn.Linear: recipes, op counts, saved tensors, SQNR."""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchext import Recipe
from torchext.nn import Linear

RECIPES = {
    "deepseek_v3": Recipe.deepseek_v3(),
    "deepseek_v3_pow2": Recipe.deepseek_v3(pow2_scale=True),
    "rowwise": Recipe.rowwise(),
    "tensorwise": Recipe.tensorwise(),
    "tensorwise_e4m3": Recipe("tensorwise"),
    "mixed": Recipe("blockwise", input_dtype=torch.float8_e5m2, grad_dtype=torch.float8_e5m2),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
main_recipes = pytest.mark.parametrize(
    "recipe", [RECIPES[name] for name in ("deepseek_v3", "rowwise", "tensorwise")], ids=str
)

QUANTIZE_WEIGHT = ("quantize_128x128", "quantize_128x128_dual")
QUANTIZE_ACTIVATION = (
    "quantize_1x128",
    "quantize_1x128_t",
    "quantize_1x128_dual",
    "quantize_1x128_dual_bias_grad",  # of a gradient
)


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


class OpCounter(TorchDispatchMode):
    """Counts calls of torch.ops.torchext.*, and of ATen's matrix products, by name.

    A below-autograd alias, which has an underscore in front, counts as its public op.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("torchext::") or name in ("aten::mm", "aten::addmm", "aten::bmm"):
            self.calls[name.split("::")[1].removeprefix("_")] += 1
        return func(*args, **(kwargs or {}))

    def of(self, *names: str) -> int:
        return sum(self.calls[name] for name in names)


def counting_backend(calls: collections.Counter[str]) -> Any:
    """A backend of torch.compile that adds the ops of its graphs, forward and backward, to `calls`.

    Names are those of OpCounter.
    """
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def compiler(module: Any, inputs: Any) -> Any:
        for node in module.graph.nodes:
            # A write to a view or to an argument is the first argument of a higher-order op.
            op = node.args[0] if "auto_functionalized" in str(node.target) else node.target
            if isinstance(op, torch._ops.OpOverload) and op.namespace == "torchext":
                calls[op._opname.removeprefix("_")] += 1
        return make_boxed_func(module.forward)

    return aot_autograd(fw_compiler=compiler)


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """The list of tensors that autograd saves for backward while the context is open."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def sqnr(reference: Tensor, value: Tensor) -> float:
    """The signal-to-quantization-noise ratio of `value` in dB."""
    reference, value = reference.double(), value.double()
    noise = (reference - value).square().sum()
    return (10 * torch.log10(reference.square().sum() / noise)).item()


def normal_linear(
    device: torch.device,
    in_features: int = 200,
    out_features: int = 136,
    recipe: Recipe | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
) -> Linear:
    torch.manual_seed(0)
    linear = Linear(in_features, out_features, bias, device, dtype, recipe=recipe)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_()
    return linear


def normal(
    *shape: int, device: torch.device, dtype: torch.dtype = torch.float32, grad: bool = False
):
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_(grad)


def train_step(linear: torch.nn.Module, x: Tensor) -> Tensor:
    y = linear(x)
    y.square().mean().backward()
    return y


def assert_quantized_afresh(linear: Linear, x: Tensor, times: int = 1) -> None:
    """Asserts that the next forward quantizes the weight `times` times and equals a new layer's."""
    with OpCounter() as counter:
        y = linear(x)
    assert counter.of(*QUANTIZE_WEIGHT) == times
    assert torch.equal(y, copy.deepcopy(linear)(x))


def halve(linear: Linear) -> None:
    with torch.no_grad():
        linear.weight.mul_(0.5)
