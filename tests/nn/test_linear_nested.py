"""torchext.nn.Linear on jagged nested tensors: the rows of all elements, concatenated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.linear_testing import gradient, main_recipes, normal, normal_linear

pytestmark = pytest.mark.large  # nested tensors do not depend on the kernels


def jagged(parts: list[Tensor], **options) -> Tensor:
    return torch.nested.nested_tensor(parts, layout=torch.jagged, **options)


def squares(nested: Tensor) -> Tensor:
    return torch.cat(nested.unbind()).square().mean()


def assert_same_gradients(linear: torch.nn.Module, y: Tensor, rows: Tensor) -> None:
    """Asserts that nested y gives the parameters the gradients of its concatenated rows."""
    linear.zero_grad()
    squares(y).backward()
    got = [gradient(parameter).clone() for parameter in linear.parameters()]
    linear.zero_grad()
    linear(rows).square().mean().backward()
    for kept, parameter in zip(got, linear.parameters(), strict=True):
        assert torch.equal(kept, gradient(parameter))


@main_recipes
def test_jagged(device, recipe):
    linear = normal_linear(device, recipe=recipe)
    parts = [normal(n, 200, device=device) for n in (3, 0, 130, 1)]
    x = jagged(parts, requires_grad=True)
    y = linear(x)
    rows = torch.cat(parts).requires_grad_()
    assert y.is_nested and y.shape[1] == x.shape[1]  # the same ragged dimension
    assert torch.equal(y.values(), linear(rows))
    assert_same_gradients(linear, y, rows)
    assert torch.equal(gradient(x).values(), gradient(rows))
    with torch.no_grad():
        assert torch.equal(linear(x).values(), linear(rows))


def test_jagged_composes_with_its_input(device):
    linear = normal_linear(device, 200, 200)
    x = jagged([normal(n, 200, device=device) for n in (3, 5)])
    y = torch.nn.functional.gelu(linear(x)) + x
    assert torch.equal(y.values(), torch.nn.functional.gelu(linear(x.values())) + x.values())


@main_recipes
def test_rows_between_the_elements_take_no_part(device, recipe):
    """With lengths, an element may end before the next begins; rows in between do not count."""
    linear = normal_linear(device, recipe=recipe)
    values = normal(200, 200, device=device)
    values[5:8] = torch.nan
    offsets = torch.tensor([0, 8, 100, 200], device=device)
    lengths = torch.tensor([5, 92, 40], device=device)
    rows = torch.cat([values[0:5], values[8:100], values[100:140]])
    x = torch.nested.nested_tensor_from_jagged(values.requires_grad_(), offsets, lengths)
    y = linear(x)
    assert y.shape[1] == x.shape[1] and y.lengths() is not None
    assert torch.equal(torch.cat(y.unbind()), linear(rows))
    assert not y.values()[5:8].any()
    assert_same_gradients(linear, y, rows.detach())
    assert not values.grad[5:8].any() and values.grad[:5].any()


def test_a_ragged_dimension_further_on(device):
    linear = normal_linear(device)
    parts = [normal(n, 4, 200, device=device) for n in (3, 5)]
    y = linear(jagged(parts).transpose(1, 2))
    for element, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(element, linear(part.transpose(0, 1)), rtol=1e-4, atol=1e-4)


def test_in_a_graph(device):
    linear = normal_linear(device)
    parts = [normal(n, 200, device=device) for n in (3, 5)]
    x = jagged(parts, requires_grad=True)
    y = torch.fx.symbolic_trace(torch.nn.Sequential(linear))(x)
    assert torch.equal(y.values(), linear(torch.cat(parts)))
    assert_same_gradients(linear, y, torch.cat(parts))
    with pytest.raises(TypeError, match=r"pass its values\(\), or call the layer"):
        torch.fx.symbolic_trace(linear)(x)


def test_autocast(device):
    linear = normal_linear(device)
    with torch.autocast(device.type, torch.bfloat16):
        y = linear(jagged([normal(n, 200, device=device) for n in (3, 5)]))
    assert y.dtype == torch.bfloat16


def test_compiled(device):
    torch._dynamo.reset()
    linear = normal_linear(device)
    x = jagged([normal(n, 200, device=device) for n in (3, 5)], requires_grad=True)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x).values(), linear(x).values())
    squares(compiled(x)).backward()
    dx, x.grad = gradient(x), None
    squares(linear(x)).backward()
    assert torch.equal(dx.values(), gradient(x).values())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_what_cannot_be_is_refused(device):
    linear = normal_linear(device)
    parts = [normal(n, 200, device=device) for n in (3, 5)]
    with pytest.raises(TypeError, match=r"input must be a nested tensor of layout torch\.jagged"):
        linear(torch.nested.nested_tensor(parts))
    with pytest.raises(RuntimeError, match="input must have a last dimension of in_features"):
        linear(jagged(parts).transpose(1, 2))
    with pytest.raises(RuntimeError, match=r"input must have shape \[\.\.\., 200\]"):
        linear(jagged([part[:, :150] for part in parts]))
