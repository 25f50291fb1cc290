"""torchext.nn.Linear under torch.func, vmap and batched gradients, compared with plain calls."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch._vmap_internals import _vmap
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)

from support.linear_testing import (
    OpCounter,
    gradient,
    main_recipes,
    normal,
    normal_linear,
    train_step,
)
from torchext import Recipe, ops
from torchext.nn import Linear

pytestmark = pytest.mark.large  # transforms do not depend on the kernels


def parameters_of(linear: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in linear.named_parameters()}


def sum_of(f, x):
    return f(x).sum()


def squares(linear: torch.nn.Module, parameters, x):
    return functional_call(linear, parameters, (x,)).square().mean()


def gradients(linear: torch.nn.Module, x) -> dict[str, torch.Tensor]:
    linear.zero_grad()
    train_step(linear, x)
    return {name: gradient(parameter) for name, parameter in linear.named_parameters()}


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def assert_close(got, expected) -> None:
    """Allows for sums in another order; the quantized operands must be the same."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# ---- gradients ----


@main_recipes
@pytest.mark.parametrize("shape", [(24, 200), (2, 5, 200), (200,)], ids=str)
def test_grad_and_vjp(device, recipe, shape):
    linear = normal_linear(device, recipe=recipe)
    x = normal(*shape, device=device, grad=True)
    got = grad(lambda p: squares(linear, p, x.detach()))(parameters_of(linear))
    assert_equal(got, gradients(linear, x))
    y, pull, *_ = vjp(linear, x.detach())
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(linear(x), x, dy)
    assert torch.equal(y, linear(x)) and torch.equal(pull(dy)[0], expected)


def test_grad_of_one_argument_needs_one_product(device):
    linear = normal_linear(device).requires_grad_(False)
    with OpCounter() as counter:
        grad(lambda x: linear(x).sum())(normal(4, 200, device=device))
    assert counter.of("linear", "linear_dgrad") == 2 and counter.of("linear_wgrad") == 0


def test_gradients_without_a_bias_in_lower_precision(device):
    linear = normal_linear(device, dtype=torch.bfloat16, bias=False)
    x = normal(24, 200, device=device, dtype=torch.bfloat16)
    got = grad(lambda p: squares(linear, p, x))(parameters_of(linear))
    assert_equal(got, gradients(linear, x))


def test_autocast(device):
    linear = normal_linear(device)
    x = normal(3, 24, 200, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = vmap(linear)(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, linear(x))
        got = grad(lambda p: squares(linear, p, x))(parameters_of(linear))
        assert_equal(got, gradients(linear, x))
    with torch.autocast(device.type, torch.bfloat16, enabled=False):
        assert vmap(linear)(x).dtype == torch.float32


@main_recipes
def test_jacobians(device, recipe):
    linear = normal_linear(device, 40, 24, recipe)
    x = normal(3, 40, device=device)
    expected = torch.autograd.functional.jacobian(linear, x)
    assert_close(jacrev(linear)(x), expected)
    assert_close(jacrev(linear, chunk_size=7)(x), expected)
    assert_close(torch.autograd.functional.jacobian(linear, x, vectorize=True), expected)


@main_recipes
@pytest.mark.parametrize("shape", [(24, 200), (2, 5, 200), (200,)], ids=str)
def test_batched_gradients(device, recipe, shape):
    linear = normal_linear(device, recipe=recipe)
    x = normal(*shape, device=device, grad=True)
    y = linear(x)
    dys = torch.randn(3, *y.shape, device=device)
    inputs = (x, linear.weight, linear.bias)
    batched = torch.autograd.grad(y, inputs, dys, is_grads_batched=True, retain_graph=True)
    for index, dy in enumerate(dys):
        single = torch.autograd.grad(y, inputs, dy, retain_graph=True)
        for got, expected in zip(batched, single, strict=True):
            assert_close(got[index], expected)


@main_recipes
def test_batched_gradients_in_another_thread(device, recipe):
    """As on CUDA, whose backward runs in a thread of its own, with its own count of batches."""
    linear = normal_linear(device, recipe=recipe)
    x = normal(6, 200, device=device, grad=True)
    y = linear(x)
    dys = torch.randn(2, 3, *y.shape, device=device)
    inputs = (x, linear.weight, linear.bias)

    def pull(dy):
        return torch.autograd.grad(y, inputs, dy, retain_graph=True)

    with ThreadPoolExecutor(1) as thread:
        batched = _vmap(_vmap(lambda dy: thread.submit(pull, dy).result()))(dys)
    for first, second in itertools.product(range(2), range(3)):
        for got, expected in zip(batched, pull(dys[first, second]), strict=True):
            assert_close(got[first, second], expected)


def test_an_op_of_an_outer_batch_within_an_inner_batch(device):
    x, inner = normal(4, 5, 64, device=device), torch.zeros(3, 2, device=device)
    scale = _vmap(lambda x: _vmap(lambda y: (ops.quantize_rowwise(x)[1], y))(inner)[0])(x)
    expected = ops.quantize_rowwise(x)[1]
    assert torch.equal(scale, expected[:, None].expand(-1, 3, -1, -1))


def test_batched_gradients_can_be_differentiated_once(device):
    linear = normal_linear(device)
    x = normal(4, 200, device=device, grad=True)
    y = linear(x)
    dys = torch.randn(3, *y.shape, device=device)
    (dx,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, create_graph=True)
    with pytest.raises(RuntimeError, match="backward must be differentiated once"):
        dx.sum().backward()


@main_recipes
def test_batched_gradients_of_a_compiled_layer(device, recipe):
    torch._dynamo.reset()
    linear = normal_linear(device, recipe=recipe)
    x = normal(6, 200, device=device, grad=True)
    y = torch.compile(linear, backend="aot_eager")(x)
    dys = torch.randn(3, *y.shape, device=device)
    inputs = (x, linear.weight, linear.bias)
    batched = torch.autograd.grad(y, inputs, dys, is_grads_batched=True)
    for index, dy in enumerate(dys):
        single = torch.autograd.grad(linear(x), inputs, dy)
        for got, expected in zip(batched, single, strict=True):
            assert_close(got[index], expected)


def test_compiled_transforms(device):
    torch._dynamo.reset()
    linear = normal_linear(device)
    x, parameters = normal(3, 6, 200, device=device), parameters_of(linear)

    def of_each_sample(parameters, x):
        return vmap(grad(lambda p, x: squares(linear, p, x)), in_dims=(None, 0))(parameters, x)

    compiled = torch.compile(of_each_sample, backend="aot_eager", fullgraph=True)
    assert_equal(compiled(parameters, x), of_each_sample(parameters, x))
    # The backward of the graph, which the compiler traces too, would be a second derivative.
    jacobian = torch.compile(jacrev(linear), backend="aot_eager")(x[0, 0])
    assert_close(jacobian, jacrev(linear)(x[0, 0]))
    with pytest.raises(RuntimeError, match="backward must be differentiated once"):
        jacobian.sum().backward()
    inner = torch.compile(linear, backend="aot_eager")
    assert torch.equal(vmap(inner)(x), vmap(linear)(x))
    with pytest.raises(NotImplementedError, match=r"no jvp; use reverse mode"):
        torch.compile(lambda x: jvp(linear, (x,), (x,)), backend="aot_eager")(x)


# ---- vmap ----


@main_recipes
@pytest.mark.parametrize("in_dim, out_dim", [(0, 0), (1, 0), (0, 1), (2, -1)])
def test_vmap_over_the_input(device, recipe, in_dim, out_dim):
    linear = normal_linear(device, recipe=recipe)
    x = normal(4, 6, 200, device=device)
    got = vmap(linear, in_dims=in_dim, out_dims=out_dim)(x.movedim(0, in_dim).contiguous())
    assert_close(got.movedim(out_dim, 0), torch.stack([linear(each) for each in x]))
    if recipe.granularity != "tensorwise":  # the scales of elements of the batch differ
        assert torch.equal(got.movedim(out_dim, 0), linear(x))


@main_recipes
def test_nested_and_chunked_vmap(device, recipe):
    linear = normal_linear(device, recipe=recipe)
    x = normal(3, 4, 200, device=device)
    expected = torch.stack([torch.stack([linear(row) for row in rows]) for rows in x])
    assert_close(vmap(vmap(linear))(x), expected)
    assert_close(vmap(vmap(linear), chunk_size=2)(x), expected)
    assert_close(vmap(vmap(linear, in_dims=1), in_dims=1)(x.permute(2, 0, 1)), expected)


def test_vmap_of_an_empty_batch(device):
    linear = normal_linear(device, recipe=Recipe.tensorwise())
    assert vmap(linear)(torch.zeros(0, 4, 200, device=device)).shape == (0, 4, 136)


@main_recipes
def test_gradients_through_vmap(device, recipe):
    linear = normal_linear(device, recipe=recipe)
    x = normal(4, 6, 200, device=device, grad=True)
    vmap(linear)(x).square().mean().backward()
    dx, x.grad = x.grad, None
    dw, db = linear.weight.grad, linear.bias.grad
    linear.zero_grad()
    if recipe.granularity == "tensorwise":  # each element of the batch has its own scales
        torch.stack([linear(each) for each in x]).square().mean().backward()
    else:
        train_step(linear, x)
    for got, expected in ((dx, x.grad), (dw, linear.weight.grad), (db, linear.bias.grad)):
        assert_close(got, expected)


@main_recipes
@pytest.mark.parametrize("shape", [(6, 200), (200,)], ids=str)
def test_gradients_of_each_sample(device, recipe, shape):
    linear = normal_linear(device, recipe=recipe)
    x = normal(4, *shape, device=device)

    def loss(parameters, sample):
        return squares(linear, parameters, sample)

    got = vmap(grad(loss), in_dims=(None, 0))(parameters_of(linear), x)
    for index, sample in enumerate(x):
        for name, expected in gradients(linear, sample).items():
            assert_close(got[name][index], expected)
    got = vmap(grad(loss), in_dims=(None, 0), chunk_size=3)(parameters_of(linear), x)
    assert got["weight"].shape == (4, 136, 200)


@main_recipes
def test_ensembles(device, recipe):
    layers = []
    for seed in range(3):
        torch.manual_seed(seed)
        layers.append(Linear(200, 136, device=device, recipe=recipe))
    parameters, buffers = stack_module_state(layers)
    x = normal(3, 6, 200, device=device)

    def call(parameters, x):
        return functional_call(layers[0], (parameters, buffers), (x,))

    each = vmap(call)(parameters, x)
    same = vmap(call, in_dims=(0, None), randomness="different")(parameters, x[0])
    for index, layer in enumerate(layers):
        assert torch.equal(each[index], layer(x[index]))
        assert torch.equal(same[index], layer(x[0]))
    got = vmap(grad(lambda p, x: call(p, x).square().mean()))(parameters, x)
    for index, layer in enumerate(layers):
        assert_equal({name: g[index] for name, g in got.items()}, gradients(layer, x[index]))


def test_a_batch_of_biases_or_of_weights_alone(device):
    linear = normal_linear(device)
    x = normal(6, 200, device=device)
    weights = normal(3, 136, 200, device=device)
    biases = normal(136, 3, device=device)
    for name, values, dim in (("weight", weights, 0), ("bias", biases, 1)):
        got = vmap(
            lambda value, name=name: functional_call(linear, {name: value}, (x,)), in_dims=dim
        )(values)
        for index in range(3):
            expected = functional_call(linear, {name: values.select(dim, index).clone()}, (x,))
            assert torch.equal(got[index], expected)


def test_the_weight_is_used_as_it_is(device):
    """A transform neither uses nor makes a kept FP8 weight."""
    linear = normal_linear(device)
    x = normal(6, 200, device=device)
    linear(x)
    with torch.no_grad():
        linear.weight.mul_(0.5)
        linear.bias.mul_(0.5)
    assert torch.equal(vmap(linear)(x[None])[0], linear(x))


# ---- transforms without a rule ----


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # raised by make_dual
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: jvp(f, (x,), (x,)),
        lambda f, x: vmap(lambda row: jvp(f, (row,), (row,)))(x),
        lambda f, x: jvp(vmap(f), (x,), (x,)),
        lambda f, x: jvp(grad(partial(sum_of, f)), (x,), (x,)),
        linearize,
        lambda f, x: jacfwd(f)(x),
        lambda f, x: hessian(partial(sum_of, f))(x),
        lambda f, x: torch.autograd.functional.jacobian(
            f, x, vectorize=True, strategy="forward-mode"
        ),
    ],
)
@pytest.mark.parametrize("frozen", [True, False])
def test_forward_derivatives_are_refused(device, transform, frozen):
    linear = normal_linear(device, 12, 8).requires_grad_(not frozen)
    with pytest.raises(NotImplementedError, match=r"no jvp; use reverse mode"):
        transform(linear, normal(3, 12, device=device))


def test_a_tangent_of_a_parameter_is_refused(device):
    linear = normal_linear(device, 12, 8)
    x, p = normal(3, 12, device=device), parameters_of(linear)
    for name in p:
        with pytest.raises(NotImplementedError, match=r"no jvp; use reverse mode"):
            jvp(
                lambda t, name=name: functional_call(linear, {**p, name: t}, (x,)),
                (p[name],),
                (p[name],),
            )


def test_no_tangent_is_no_derivative(device):
    linear = normal_linear(device, 12, 8)
    x = normal(3, 12, device=device)
    with forward_ad.dual_level():
        assert torch.equal(linear(x), linear(x))
    _, tangent, *_ = jvp(lambda t: t * linear(x).sum(), (x,), (x,))
    assert torch.equal(tangent, x * linear(x).sum())


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: grad(lambda x: grad(lambda x: f(x).square().sum())(x).sum())(x),
        lambda f, x: jacrev(jacrev(lambda x: f(x).square().sum()))(x),
        lambda f, x: vmap(grad(lambda x: grad(lambda x: f(x).square().sum())(x).sum()))(x),
        lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).square().sum(), x),
        lambda f, x: torch.autograd.functional.jvp(f, x, x),
        lambda f, x: torch.autograd.functional.hvp(lambda x: f(x).square().sum(), x, x),
        lambda f, x: torch.autograd.functional.vhp(lambda x: f(x).square().sum(), x, x),
    ],
)
def test_second_derivatives_are_refused(device, transform):
    linear = normal_linear(device, 12, 8)
    with pytest.raises(RuntimeError, match="backward must be differentiated once"):
        transform(linear, normal(3, 12, device=device))


def test_second_derivatives_by_the_weight_are_refused(device):
    linear = normal_linear(device, 12, 8)
    x = normal(3, 12, device=device)

    def of_input(parameters):
        return grad(lambda x: functional_call(linear, parameters, (x,)).sum())(x).square().sum()

    with pytest.raises(RuntimeError, match="backward must be differentiated once"):
        grad(of_input)(parameters_of(linear))


def test_errors_name_the_layer(device):
    linear = normal_linear(device)
    with pytest.raises(RuntimeError, match=r"torchext\.nn\.Linear: input must have shape"):
        vmap(linear)(torch.zeros(2, 3, 199, device=device))
    with pytest.raises(TypeError, match=r"torchext\.nn\.Linear: input must be torch\.float32"):
        vmap(linear)(torch.zeros(2, 3, 200, device=device, dtype=torch.float64))
