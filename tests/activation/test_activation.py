"""Activations fused with quantization: FP32 values and slopes against float64, outputs bit for bit
against the quantizers, sums in their documented order, saved FP8 operands, shapes and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.op_interface import without_simulator
from support.op_testing import assert_same, random
from torchext import ops
from torchext._catalog.entry import E4M3, E5M2

# Family -> columns of the input for each column of the activation, and the options of its ops.
FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "silu_mul": (2, {}),
    "gelu_mul": (2, {}),
    "gelu_mul tanh": (2, {"tanh_approximation": True}),
    "gelu": (1, {}),
    "gelu tanh": (1, {"tanh_approximation": True}),
    "relu2": (1, {}),
}
FORWARD = [
    ops.silu_mul_quantize_1x128,
    ops.silu_mul_quantize_1x128_t,
    ops.silu_mul_quantize_1x128_dual,
    ops.gelu_mul_quantize_1x128,
    ops.gelu_mul_quantize_1x128_t,
    ops.gelu_mul_quantize_1x128_dual,
    ops.gelu_quantize_1x128,
    ops.gelu_quantize_1x128_t,
    ops.gelu_quantize_1x128_dual,
    ops.relu2_quantize_1x128,
    ops.relu2_quantize_1x128_t,
    ops.relu2_quantize_1x128_dual,
]
BACKWARD = [
    ops.silu_mul_backward_quantize_1x128_dual,
    ops.gelu_mul_backward_quantize_1x128_dual,
    ops.gelu_backward_quantize_1x128_dual,
    ops.relu2_backward_quantize_1x128_dual,
]
WIDE = [torch.bfloat16, torch.float16, torch.float32]
every_family = pytest.mark.parametrize("family", FAMILIES)


def forward(family, ending=""):
    return named(FORWARD, f"{family.split()[0]}_quantize_1x128{ending}")


def backward(family):
    return named(BACKWARD, f"{family.split()[0]}_backward_quantize_1x128_dual")


def named(functions, name):
    return next(function for function in functions if function.__name__ == name)


def gradient_rows(family, grad, x):
    """The FP32 gradient: the bias gradient of one row is that row. On the CPU it is that of the CPU
    kernels also under the simulator, whose launch for each row would take long."""
    options = {**FAMILIES[family][1], "bias_grad": True}
    with without_simulator():
        return torch.stack(
            [backward(family)(dy, row, **options)[4] for dy, row in zip(grad, x, strict=True)]
        )


def gated_gradient(family, x):
    """slope(x) and value(x) of the function of a gated family, in FP32."""
    ones = torch.ones_like(x)
    return gradient_rows(family, ones, torch.cat((x, ones), dim=-1)).chunk(2, dim=-1)


def activated(family, x):
    """The FP32 activation, by way of the gradients of the ups."""
    operands, _ = FAMILIES[family]
    x = x.float()
    if family == "relu2":
        return x.clamp(min=0).square()
    if operands == 1:
        return gated_gradient(family.replace("gelu", "gelu_mul"), x)[1]
    gate, up = x.chunk(2, dim=-1)
    return gated_gradient(family, gate)[1] * up


def exact(family, x):
    """The activation of x in float64, for autograd."""
    function = {"silu": torch.nn.functional.silu, "relu2": lambda x: x.relu().square()}.get(
        family.partition("_")[0].split()[0],
        lambda x: torch.nn.functional.gelu(x, approximate="tanh" if "tanh" in family else "none"),
    )
    if FAMILIES[family][0] == 1:
        return function(x)
    gate, up = x.chunk(2, dim=-1)
    return function(gate) * up


# ---- values ----

RANGE = torch.cat(
    (torch.linspace(-130, 130, 2001), torch.linspace(-15, 15, 4001), torch.tensor([0.0, -0.0]))
)
UNIT = 2.0**-24


@pytest.mark.parametrize("family", ["silu_mul", "gelu_mul", "gelu_mul tanh"])
def test_values_and_slopes_are_within_their_bounds(family, device):
    """docs/numerics.md has the bounds."""
    x = RANGE.to(device)[None]
    slope, value = gated_gradient(family, x)
    wide = x.double().requires_grad_()
    expected = exact(family, torch.cat((wide, torch.ones_like(wide)), dim=-1))
    (expected_slope,) = torch.autograd.grad(expected.sum(), wide)
    size = wide.detach().abs()
    if family == "silu_mul":
        bound = (2 * size + 4) * UNIT * expected.detach().abs() + 2.0**-120
        bound_of_slope = (2 * size + 6) * UNIT
    else:
        bound = 5 * UNIT * size + 2.0**-120
        bound_of_slope = torch.full_like(size, (48 if "tanh" in family else 6) * UNIT)
    assert ((value.double() - expected).abs() <= bound).all()
    assert ((slope.double() - expected_slope).abs() <= bound_of_slope).all()


@pytest.mark.parametrize("large", [200.0, 1e10, 3e38])
@every_family
def test_huge_operands(family, large, device):
    """Where exponentials overflow and underflow, values and slopes have their limits."""
    operands, options = FAMILIES[family]
    x = torch.tensor([[large, -large]], device=device)
    operand = torch.cat((x, torch.ones_like(x)), dim=-1) if operands == 2 else x
    slope = gradient_rows(family, torch.ones_like(x), operand)[0, :2]
    limits = torch.tensor([2 * large if family == "relu2" else 1.0, 0.0])
    torch.testing.assert_close(slope.cpu(), limits, rtol=0, atol=0)
    if family != "relu2":
        data, scale = forward(family)(operand, **options)
        y = ops.dequantize(data, scale, out_dtype=torch.float32)
        torch.testing.assert_close(y.cpu(), torch.tensor([[large, 0.0]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("pow2_scale", [False, True])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("wide", WIDE)
@every_family
def test_fused_equals_the_composition(family, wide, dtype, pow2_scale, device):
    """The quantizers, applied to the FP32 activation, give the same bits."""
    operands, options = FAMILIES[family]
    x = random(20, operands * 152, device=device, dtype=wide)
    quantization = {"dtype": dtype, "pow2_scale": pow2_scale}
    y = activated(family, x)
    for ending in ("", "_t", "_dual"):
        fused = forward(family, ending)(x, **options, **quantization)
        assert_same(fused, getattr(ops, f"quantize_1x128{ending}")(y, **quantization))


# ---- gradients ----

SIZES = [(1, 1), (3, 7), (20, 128), (17, 136), (16, 152), (20, 129), (130, 200)]


@pytest.mark.parametrize("rows, columns", SIZES)
@every_family
def test_gradients_equal_the_composition(family, rows, columns, device):
    operands, options = FAMILIES[family]
    grad = random(rows, columns, device=device)
    x = random(rows, operands * columns, device=device)
    *dual, bias_grad, activation_t, activation_scale_t = backward(family)(
        grad, x, bias_grad=True, activation_dtype=E5M2, pow2_scale=True, **options
    )
    dx = gradient_rows(family, grad, x)
    assert_same(tuple(dual), ops.quantize_1x128_dual(dx, pow2_scale=True))
    assert_same(bias_grad, sums_in_order(dx))
    assert_same(
        (activation_t, activation_scale_t),
        forward(family, "_t")(x, dtype=E5M2, pow2_scale=True, **options),
    )


def sums_in_order(x):
    """Sums of columns in the order of docs/numerics.md, by loops."""
    total = None
    for tile in x.split(128):
        runs = []
        for run in tile.split(16):
            part = run[0].clone()
            for row in run[1:]:
                part += row
            runs.append(part + 0.0 if len(run) < 16 else part)
        runs += [torch.zeros_like(runs[0])] * (8 - len(runs))
        p = runs
        of_tile = ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]))
        total = of_tile if total is None else total + of_tile
    return total


@every_family
def test_gradients_are_those_of_float64(family, device):
    operands, options = FAMILIES[family]
    grad, x = random(70, 256, device=device), random(70, operands * 256, device=device)
    leaf = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(exact(family, leaf), leaf, grad.double())
    data, scale, data_t, scale_t, bias_grad = backward(family)(grad, x, bias_grad=True, **options)
    for pair, want in (((data, scale), expected), ((data_t, scale_t), expected.t())):
        error = ops.dequantize(*pair, out_dtype=torch.float32) - want
        assert error.norm() < 0.04 * expected.norm()  # rounding to e4m3 costs 2.6 % RMS
    size = expected.abs().sum(0)
    assert ((bias_grad - expected.sum(0)).abs() <= 2.0**-17 * size).all()
    dx = gradient_rows(family, grad, x)
    tolerance = 2.0**-18 * (grad.abs().amax() * x.abs().amax().clamp(min=1)).double()
    assert ((dx - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("columns", [7, 16, 120, 128, 200, 256])
@every_family
def test_saved_fp8_operands_are_dequantized(family, columns, wide, dtype, device):
    operands, options = FAMILIES[family]
    options = options | {"bias_grad": True, "activation_dtype": E4M3}
    x, scale = ops.quantize_1x128(
        random(20, operands * columns, device=device, dtype=torch.float32), dtype=dtype
    )
    grad = random(20, columns, device=device, dtype=wide)
    name = "gate_up_scale" if operands == 2 else "x_scale"
    from_fp8 = backward(family)(grad, x, **{name: scale}, **options)
    dequantized = ops.dequantize(x, scale, out_dtype=torch.float32)
    assert_same(from_fp8, backward(family)(grad.float(), dequantized, **options))


@every_family
def test_what_is_not_asked_for_is_none(family, device):
    operands, options = FAMILIES[family]
    grad, x = random(20, 48, device=device), random(20, operands * 48, device=device)
    plain = backward(family)(grad, x, **options)
    assert len(plain) == 5 and plain[4] is None
    everything = backward(family)(grad, x, bias_grad=True, activation_dtype=E4M3, **options)
    assert_same(plain[:4], everything[:4])
    assert_same(backward(family)(grad, x, activation_dtype=E4M3, **options)[5:], everything[5:])


@pytest.mark.parametrize("shape", [(0, 48), (2, 0, 48), (7, 0)])
@every_family
def test_sums_of_no_rows_are_zero(family, shape, device):
    operands, options = FAMILIES[family]
    *rows, columns = shape
    x = random(*rows, operands * columns, device=device)
    bias_grad = backward(family)(random(*shape, device=device), x, bias_grad=True, **options)[4]
    assert_same(bias_grad, torch.zeros(operands * columns, device=device))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_reach_their_groups_alone(bad, device):
    gate_up = random(40, 512, device=device)
    gate_up[3, 130] = bad  # gate 130, and so group 1 of row 3
    data, scale, data_t, scale_t = ops.silu_mul_quantize_1x128_dual(gate_up)
    assert scale.isnan().nonzero().tolist() == [[3, 1]]
    assert scale_t.isnan().nonzero().tolist() == [[130, 0]]
    assert data.float().isnan().sum() == 128 and data_t.float().isnan().sum() == 40
    grad = random(40, 256, device=device)
    grad[5, 7] = bad
    scale = ops.gelu_mul_backward_quantize_1x128_dual(grad, random(40, 512, device=device))[1]
    assert scale.isnan().nonzero().tolist() == [[5, 0], [5, 2]]


def test_results_do_not_depend_on_threads():
    grad, gate_up = random(600, 300, device="cpu"), random(600, 600, device="cpu")

    def results():
        return ops.silu_mul_backward_quantize_1x128_dual(
            grad, gate_up, bias_grad=True, activation_dtype=E4M3
        )

    first, threads = results(), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_same(results(), first)
    finally:
        torch.set_num_threads(threads)


# ---- layouts ----


@every_family
def test_operands_of_any_strides(family, device):
    operands, options = FAMILIES[family]
    x = random(40, operands * 96, device=device, dtype=torch.float32)
    grad = random(40, 96, device=device, dtype=torch.float32)
    expected = backward(family)(grad, x, bias_grad=True, **options)
    padded = torch.zeros(40, operands * 96 + 3, device=device)[:, 1:-2].copy_(x)
    doubled = torch.zeros(40, 2 * operands * 96, device=device)[:, ::2].copy_(x)
    for other in (padded, doubled, x.t().contiguous().t()):
        assert_same(
            forward(family, "_dual")(other, **options), forward(family, "_dual")(x, **options)
        )
        odd_grad = torch.zeros(41, 97, device=device)[1:, 1:].copy_(grad)
        assert_same(backward(family)(odd_grad, other, bias_grad=True, **options), expected)


# ---- errors ----


def error(function, *arguments, **options):
    with pytest.raises((ValueError, TypeError)) as caught:
        function(*arguments, **options)
    return caught.type, str(caught.value)


@pytest.mark.parametrize("ending", ["", "_t", "_dual"])
@every_family
def test_errors_of_forward(family, ending, device):
    op, (operands, options) = forward(family, ending), FAMILIES[family]
    name, argument = op.__name__, "gate_up" if operands == 2 else "x"
    x = random(4, operands * 16, device=device)
    for wrong in (x.double(), x.to(E4M3), x.int()):
        kind, text = error(op, wrong, **options)
        assert kind is TypeError and text.startswith(f"{name}: {argument} must be torch.bfloat16")
    kind, text = error(op, x, dtype=torch.bfloat16, **options)
    assert kind is TypeError and text.startswith(f"{name}: dtype must be torch.float8_e4m3fn")
    kind, text = error(op, x[0, 0], **options)
    assert kind is ValueError and text.startswith(f"{name}: {argument} must have shape")
    kind, text = error(op, random(2, 3, 4, device=device).transpose(0, 1), **options)
    assert kind is ValueError and "must fold" in text and f"{argument}.contiguous()" in text
    if operands == 2:
        kind, text = error(op, x[:, :-1], **options)
        assert kind is ValueError and text.startswith(f"{name}: gate_up must have an even number")


@every_family
def test_errors_of_backward(family, device):
    op, (operands, options) = backward(family), FAMILIES[family]
    name, argument = op.__name__, "gate_up" if operands == 2 else "x"
    x, grad = random(4, operands * 16, device=device), random(4, 16, device=device)
    fp8, scale = ops.quantize_1x128(x)
    of_scale = f"{argument}_scale"

    def check(kind, expected, *arguments, **more):
        found, text = error(op, *arguments, **options, **more)
        assert found is kind and text.startswith(f"{name}: {expected}"), text

    check(TypeError, "grad must be torch.bfloat16", grad.double(), x)
    check(TypeError, f"grad must have the dtype of {argument}", grad.float(), x)
    check(TypeError, f"{argument} must be torch.bfloat16", grad, x.double())
    check(TypeError, "dtype must be", grad, x, dtype=torch.bfloat16)
    check(TypeError, "dtype must be", grad, x, activation_dtype=torch.bfloat16)
    check(ValueError, "grad must have the shape", grad[:, :8], x)
    check(ValueError, "grad must have the shape", grad[:2], x)
    check(ValueError, f"{argument} must have shape", grad, x[0, 0])
    check(ValueError, f"{of_scale} must be None", grad, x, **{of_scale: scale})
    check(ValueError, f"{of_scale} must be given", grad, fp8)
    check(TypeError, f"{of_scale} must be torch.float32", grad, fp8, **{of_scale: scale.bfloat16()})
    check(ValueError, f"{of_scale} must have one scale", grad, fp8, **{of_scale: scale[:2]})
    if operands == 2:
        check(ValueError, "gate_up must have an even number", grad, x[:, :-1])


def test_every_op_is_tested():
    found = {forward(family, ending) for family in FAMILIES for ending in ("", "_t", "_dual")}
    assert found == set(FORWARD) and {backward(family) for family in FAMILIES} == set(BACKWARD)


@every_family
def test_outputs_need_no_gradient(family, device):
    operands, options = FAMILIES[family]
    x = random(4, operands * 16, device=device).requires_grad_()
    grad = random(4, 16, device=device).requires_grad_()
    assert not any(t.requires_grad for t in forward(family, "_dual")(x, **options))
    results = backward(family)(grad, x, bias_grad=True, **options)
    assert not any(t.requires_grad for t in results)
