"""The tensors that torchext.nn.Linear saves for backward may be copied in any way in between."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from support.linear_testing import every_recipe, gradient, main_recipes, normal, normal_linear
from support.op_testing import opcheck
from torchext import ops
from torchext.ops.linear_function import quantize_activation, quantize_weight
from torchext.recipe import GRANULARITIES

pytestmark = pytest.mark.large  # layouts do not depend on the kernels


def _by_size(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.size(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _saved(tensor: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


def _bytes(tensor: Tensor) -> Tensor:
    """Copies through bytes, as a file of dense tensors or a message would."""
    raw = bytes(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy())
    flat = torch.frombuffer(bytearray(raw or b"\0"), dtype=torch.uint8)[: len(raw)]
    return flat.view(tensor.dtype).view(tensor.shape).to(tensor.device)


def _packed(tensor: Tensor) -> Tensor:
    """Copies into a larger buffer, at an unaligned offset."""
    buffer = torch.empty(tensor.numel() + 3, dtype=tensor.dtype, device=tensor.device)
    place = buffer[3:].view(tensor.shape)
    return place.copy_(tensor)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous().to(tensor.dtype)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def _sparse(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(3, -1)[..., ::3]


COPIES = {
    "clone": torch.clone,
    "contiguous": Tensor.contiguous,
    "dense clone": lambda t: t.clone(memory_format=torch.contiguous_format),
    "by size": _by_size,
    "deepcopy": lambda t: t.detach().__deepcopy__({}),
    "to": lambda t: t.to(t.dtype, copy=True),
    "bytes": _bytes,
    "torch.save": _saved,
    "packed": _packed,
    "wide": _wide,
    "transposed": _transposed,
    "strided": _sparse,
}


def hooks(copy: Callable[[Tensor], Tensor]) -> contextlib.AbstractContextManager:
    return torch.autograd.graph.saved_tensors_hooks(copy, lambda tensor: tensor)


def gradients(
    module: torch.nn.Module, x: Tensor, context: contextlib.AbstractContextManager | None = None
) -> list[Tensor]:
    x.grad = None
    module.zero_grad()
    with context or contextlib.nullcontext():
        y = module(x)
    dy = torch.arange(y.numel(), device=y.device).remainder_(7).view_as(y).to(y)
    y.backward(dy)
    return [gradient(x), *map(gradient, module.parameters())]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


# (rows, features, outputs): unaligned; fully aligned; several groups of rows; sizes of 1.
SIZES = [(9, 200, 72), (256, 256, 256), (300, 129, 136), (3, 17, 33), (1, 40, 1), (130, 1, 8)]


@main_recipes
@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_saved_tensors_may_be_copied(device, recipe, copy):
    for m, k, n in (*SIZES, (0, 40, 24)):
        linear = normal_linear(device, k, n, recipe)
        x = normal(m, k, device=device, grad=True)
        expected = gradients(linear, x)
        assert_equal(gradients(linear, x, hooks(copy)), expected)
        # Copies when packing and unpacking, with the FP8 weight that an earlier forward made.
        both = torch.autograd.graph.saved_tensors_hooks(copy, copy)
        assert_equal(gradients(linear, x, both), expected)


@every_recipe
@pytest.mark.parametrize("pin_memory", [False, True])
def test_offloading_to_the_cpu(device, recipe, pin_memory):
    for m, k, n in SIZES:
        linear = normal_linear(device, k, n, recipe)
        x = normal(m, k, device=device, grad=True)
        expected = gradients(linear, x)
        offload = torch.autograd.graph.save_on_cpu(pin_memory=pin_memory)
        assert_equal(gradients(linear, x, offload), expected)


@main_recipes
@pytest.mark.parametrize("shape", [(40,), (2, 3, 40), (2, 0, 40), (5, 1, 33, 40)], ids=str)
def test_inputs_of_any_rank(device, recipe, shape):
    linear = normal_linear(device, 40, 24, recipe)
    x = normal(*shape, device=device, grad=True)
    expected = gradients(linear, x)
    for copy in (_by_size, torch.clone):
        assert_equal(gradients(linear, x, hooks(copy)), expected)


def test_offload_wrapper_of_fsdp(device):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import offload_wrapper

    linear = normal_linear(device, 200, 136)
    x = normal(9, 200, device=device, grad=True)
    expected = gradients(linear, x)
    assert_equal(gradients(offload_wrapper(linear), x), expected)


def test_nothing_is_copied_where_nothing_was(device):
    linear = normal_linear(device)
    x = normal(9, 200, device=device, grad=True)
    y = linear(x)
    pointers = [saved.data_ptr() for saved in y.grad_fn.saved_tensors]
    seen = []

    class Copies(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Copies():
        y.sum().backward(retain_graph=True)
    assert not [name for name in seen if "copy" in name or "clone" in name or "empty" in name]
    assert [saved.data_ptr() for saved in y.grad_fn.saved_tensors] == pointers


# ---- compiled ----

# Left out: copies that keep neither strides nor alignment. They break any compiled layer.
COMPILED_COPIES = {
    name: COPIES[name] for name in ("clone", "contiguous", "by size", "bytes", "torch.save", "wide")
}


@main_recipes
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_saved_tensors_of_compiled_layers_may_be_copied(device, recipe, backend):
    sizes = {"aot_eager": [*SIZES[:3], (1, 40, 1), (0, 40, 24)], "inductor": SIZES[:1]}[backend]
    for m, k, n in sizes:
        torch._dynamo.reset()
        linear = normal_linear(device, k, n, recipe)
        x = normal(m, k, device=device, grad=True)
        expected = gradients(linear, x)[:2]  # the bias's gradient may be summed in another order
        compiled: Any = torch.compile(linear, backend=backend, fullgraph=True)
        assert_equal(gradients(compiled, x)[:2], expected)
        for copy in COMPILED_COPIES.values():
            assert_equal(gradients(compiled, x, hooks(copy))[:2], expected)
        offload = torch.autograd.graph.save_on_cpu()
        assert_equal(gradients(compiled, x, offload)[:2], expected)


def test_saved_tensors_of_compiled_layers_of_dynamic_size(device):
    torch._dynamo.reset()
    linear = normal_linear(device, 200, 136)
    compiled: Any = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (9, 32, 300):
        x = normal(m, 200, device=device, grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        expected = gradients(linear, x)[:2]
        assert_equal(gradients(compiled, x)[:2], expected)
        assert_equal(gradients(compiled, x, hooks(_by_size))[:2], expected)


def test_frozen_weights_and_inputs_of_compiled_layers(device):
    for frozen in ("weight", "input"):
        torch._dynamo.reset()
        linear = normal_linear(device, 40, 24)
        x = normal(9, 40, device=device, grad=frozen != "input")
        linear.weight.requires_grad_(frozen != "weight")
        compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
        with hooks(_by_size):
            y = compiled(x)
        y.sum().backward()
        got = x.grad, linear.weight.grad
        x.grad = linear.weight.grad = None
        linear(x).sum().backward()
        for left, right in zip(got, (x.grad, linear.weight.grad), strict=True):
            assert (left is None) == (right is None)
            assert left is None or torch.equal(left, right)


# ---- the ops of compiled layers ----


@every_recipe
@pytest.mark.parametrize(
    "shape", [(9, 200), (2, 3, 64), (130, 17), (1, 1), (5, 0), (0, 5), (8,)], ids=str
)
def test_what_compiled_layers_keep(device, recipe, shape):
    x = normal(*shape, device=device)
    rows, columns = x.numel() // max(shape[-1], 1) if x.numel() else shape[0], shape[-1]
    eager: Any = quantize_activation(x, recipe.input_dtype, recipe, plain=True, transposed=True)
    kept: Any = quantize_activation(
        x, recipe.input_dtype, recipe, plain=True, transposed=True, kept=True
    )
    assert torch.equal(kept.data.float(), eager.data.float())
    assert torch.equal(kept.scale, eager.scale)
    for tensor, original in ((kept.data_t, eager.data_t), (kept.scale_t, eager.scale_t.t())):
        assert tensor.is_contiguous() and _by_size(tensor).stride() == tensor.stride()
        assert torch.equal(tensor[:, : original.shape[1]].float(), original.float())
    assert kept.data_t.shape == (columns, -(-rows // 16) * 16)
    options = {"dtype": recipe.input_dtype, "pow2_scale": recipe.pow2_scale}
    granularity = GRANULARITIES.index(recipe.granularity)
    opcheck(torch.ops.torchext._quantize_kept.default, (x, granularity), options)


@every_recipe
@pytest.mark.parametrize("n, k", [(136, 200), (256, 256), (128, 40), (17, 1), (1, 130), (8, 0)])
def test_products_of_what_compiled_layers_keep(device, recipe, n, k):
    weight = normal(n, k, device=device)
    eager = quantize_weight(weight, recipe, transposed=True)
    kept = quantize_weight(weight, recipe, transposed=True, kept=True)
    dy = quantize_activation(
        normal(9, n, device=device), recipe.grad_dtype, recipe, plain=True, transposed=False
    )
    product = torch.ops.torchext._fp8_gemm_nt_kept.default
    operands = (dy.data, dy.scale, kept.data_t, kept.scale_t)
    plain: Any = (dy.data, dy.scale, eager.data_t, eager.scale_t)
    expected = ops.fp8_gemm_nt(*plain)
    assert torch.equal(product(*operands), expected)
    if n == 128:  # else opcheck's copies of dy's operands would lose their layout
        opcheck(product, operands)
    if recipe.granularity == "blockwise":
        opcheck(torch.ops.torchext._quantize_128x128_kept.default, (weight,))


def test_products_refuse_what_was_not_kept(device):
    dy = ops.quantize_1x128(normal(9, 136, device=device))
    w = ops.quantize_128x128(normal(200, 136, device=device))
    with pytest.raises(RuntimeError, match=r"_fp8_gemm_nt_kept: b must have 144 columns, a's 136"):
        torch.ops.torchext._fp8_gemm_nt_kept(*dy, *w)
