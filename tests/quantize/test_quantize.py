"""Quantizers have the bits of the numpy reference (support/reference.py): dtypes, hostile values,
shapes, strides, layouts of outputs, and independence of the machine's settings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import torchext  # noqa: F401  (loads the ops)
from support import reference
from support.norm_testing import down_columns
from support.op_testing import FOLDING, QUANTIZERS
from torchext._catalog.entry import E4M3, E5M2

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


def quantize(name, x, fp8=E4M3, pow2_scale=False):
    return getattr(torch.ops.torchext, name)(x, dtype=fp8, pow2_scale=pow2_scale)


def matrix(tensor):
    """`tensor` with all dimensions but the last folded into rows."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def check(name, x, fp8=E4M3, pow2_scale=False):
    """Asserts that the op returns the reference's bits."""
    outputs = quantize(name, x, fp8, pow2_scale)
    values = matrix(x).float().cpu().numpy()
    if name.endswith("_bias_grad"):  # a NaN among its sums has any bits
        *outputs, sums = outputs
        name = name.removesuffix("_bias_grad")
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(sums.cpu().numpy(), down_columns(values))
    expected = reference.expected(name, values, reference.FORMATS[fp8], pow2_scale)
    assert len(outputs) == len(expected)
    for output, array in zip(outputs, expected, strict=True):
        is_scale = output.dtype == torch.float32
        assert is_scale or output.dtype == fp8
        bits = matrix(output).cpu().view(torch.int32 if is_scale else torch.uint8).numpy()
        np.testing.assert_array_equal(bits, array.view(bits.dtype), err_msg=name)


def spread(shape, dtype, device):
    """Normal data in which rows and columns have very different magnitudes."""
    x = torch.randn(shape, dtype=torch.float64)
    for dim in range(x.dim()):
        sizes = [1] * x.dim()
        sizes[dim] = x.shape[dim]
        x *= 2.0 ** torch.randint(-4, 5, sizes)
    return x.to(dtype).to(device)


# ---- values ----


@pytest.mark.parametrize("pow2_scale", [False, True])
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_random(name, dtype, fp8, pow2_scale, device):
    check(name, spread((130, 300), dtype, device), fp8, pow2_scale)


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_any_bits(name, dtype, fp8, device):
    """Every exponent in every group; a few groups hold NaN or Inf."""
    bits = torch.randint(-(2**31), 2**31, (20, 260)).to(BITS[dtype])
    x = bits.view(dtype)
    finite = torch.where(x.isfinite(), x, torch.zeros((), dtype=dtype))
    check(name, finite.to(device), fp8)
    check(name, x.to(device), fp8)


def hostile_groups(dtype, fp8):
    """Groups of at most 128 values, each of which is difficult in another way."""
    info = torch.finfo(dtype)
    tiny = info.smallest_normal
    least = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}[dtype]
    largest = LARGEST[fp8]
    midpoints = torch.from_numpy(reference.FORMATS[fp8].midpoints)
    amax = torch.tensor([largest])  # makes the scale 1
    small_ties = torch.cat([midpoints[:100], -midpoints[:27], amax])
    ties = torch.cat([midpoints[-100:], -midpoints[-27:], amax])
    ramp = torch.linspace(-1, 1, 128, dtype=torch.float64)
    ones = torch.ones(128, dtype=torch.float64)
    groups = {
        "zeros": 0 * ones,
        "negative zeros": -0.0 * ones,
        "one value": torch.tensor([3.7]),
        "one negative value among zeros": torch.tensor([0.0, -0.0, -1.3, -0.0]),
        "an outlier": torch.cat([ramp, torch.tensor([info.max / 2])])[1:],
        "the largest finite value": ramp * info.max,
        "all at the largest": torch.where(ramp > 0, info.max, -info.max),
        "subnormals": torch.arange(128) * least,
        "the least value": torch.tensor([least, -least, 0.0]),
        "around the smallest normal": tiny * torch.linspace(0.5, 2, 128, dtype=torch.float64),
        "subnormals beside a large value": torch.cat([torch.arange(127) * -least, ones[:1]]),
        "around the smallest scale": 2.0**-126 * largest * (1 + ramp / 4),
        "at the smallest scale": 2.0**-126 * largest * ramp,
        "below the smallest scale": 2.0**-128 * largest * ramp,
        "scales below 2**-64": 2.0**-65 * largest * ramp,
        "scales just above 2**-64": 2.0**-64 * largest * ramp * 1.01,
        "ties": ties,
        "ties of subnormals": small_ties,
        "ties, scaled down": ties * 2.0**-6,
        "ties under an odd scale": ties * 0.7,
        "ties of subnormals under an odd scale": small_ties * 0.7,
        "next to ties, below": ties * (1 - info.eps),
        "next to ties, above": torch.cat([ties[:-1] * (1 + info.eps), ties[-1:]]),
        "scale next above a power of two": ramp * largest * (1 + info.eps),
        "scale next below a power of two": ramp * largest * (1 - info.eps / 2),
        "NaN": torch.cat([ramp[1:], torch.tensor([math.nan])]),
        "negative NaN": torch.cat([torch.tensor([-math.nan]), -ones[1:]]),
        "Inf": torch.cat([ramp[:60], torch.tensor([math.inf]), ramp[61:]]),
        "-Inf": torch.cat([torch.tensor([-math.inf]), 0 * ones]),
        "NaN and Inf": torch.tensor([1.0, -math.inf, math.nan]),
    }
    return {name: group.to(dtype) for name, group in groups.items() if group.numel() <= 129}


@pytest.mark.parametrize("pow2_scale", [False, True])
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [n for n in FOLDING if "1x128" in n])
def test_hostile_groups(name, dtype, fp8, pow2_scale, device):
    """Hostile groups beside each other, along rows and along columns, do not affect one another."""
    groups = hostile_groups(dtype, fp8)
    x = torch.zeros(len(groups), 128, dtype=dtype)
    for row, group in zip(x, groups.values(), strict=True):
        row[: min(group.numel(), 128)] = group[:128]
    check(name, x.to(device), fp8, pow2_scale)
    check(name, x.t().contiguous().to(device), fp8, pow2_scale)


@pytest.mark.large
@pytest.mark.parametrize("amax_exponent", [0, 100, -50, -56, -92, -117, -118])
@pytest.mark.parametrize("pow2_scale", [False, True])
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_every_bf16_fraction_under_every_scale(fp8, pow2_scale, amax_exponent, device):
    """128 rows, each with another fraction of its largest magnitude and so of its scale. They hold
    all fractions under 38 exponents: codes from the largest to zero. A CPU kernel tabulates them;
    the exponents include those at which it changes to another method."""
    fraction = torch.arange(128) / 128 + 1
    exponents = 2.0 ** torch.arange(amax_exponent, amax_exponent - 38, -1, dtype=torch.float64)
    values = (exponents[:, None] * fraction).flatten()
    amax = 2.0**amax_exponent * fraction.double()[:, None]
    x = torch.cat([amax, values.expand(128, -1).minimum(amax)], 1)
    x[:, ::3] *= -1
    check("quantize_rowwise", x.bfloat16().to(device), fp8, pow2_scale)


@pytest.mark.parametrize("group", hostile_groups(torch.float32, E4M3))
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("name", [n for n in QUANTIZERS if n not in FOLDING or "wise" in n])
def test_hostile_values_under_wider_scales(name, fp8, group, device):
    for dtype in DTYPES:
        values = hostile_groups(dtype, fp8)[group]
        x = torch.zeros(3, 140, dtype=dtype)
        x[1, 5 : 5 + values.numel()] = values
        check(name, x.to(device), fp8)


def test_finite_groups_hold_no_nan_and_reach_the_largest_value(device):
    for fp8 in (E4M3, E5M2):
        data, scale = quantize("quantize_1x128", spread((64, 256), torch.float32, device), fp8)
        assert scale.isfinite().all()
        largest = data.float().abs().reshape(64, 2, 128).amax(-1)
        assert (largest == LARGEST[fp8]).all()


# ---- shapes and layout ----

MATRIX_SHAPES = [
    (1, 1), (1, 127), (1, 128), (1, 129), (2, 16), (3, 17), (5, 1), (15, 144), (16, 128),
    (127, 3), (128, 128), (129, 257), (131, 15), (260, 33), (0, 5), (5, 0), (0, 0), (0, 300),
]  # fmt: skip
FOLDING_SHAPES = [(1,), (7,), (300,), (2, 3, 40), (1, 1, 5), (3, 1, 2, 130), (2, 0, 3), (0,)]


def check_layout(name, x):
    """Asserts the documented strides: data with a 16-byte row pitch, group scales M-major."""
    outputs = quantize(name, x)
    leading, columns = x.shape[:-1], x.shape[-1]
    rows = math.prod(leading)

    def round_up(size, multiple):
        return -(-size // multiple) * multiple

    def folded(row_stride, column_stride):
        strides = [column_stride]
        for size in reversed(leading):
            strides.insert(0, row_stride)
            row_stride *= size
        return tuple(strides)

    groups = -(-columns // 128)
    data = ((*leading, columns), folded(round_up(columns, 16), 1))
    data_t = ((columns, rows), (round_up(rows, 16), 1))
    scale = ((*leading, groups), folded(1, round_up(rows, 4)))
    scale_t = ((columns, -(-rows // 128)), (1, round_up(columns, 4)))
    blocks = ((-(-rows // 128), groups), (groups, 1))
    expected = {
        "quantize_1x128": [data, scale],
        "quantize_1x128_t": [data_t, scale_t],
        "quantize_1x128_dual": [data, scale, data_t, scale_t],
        "quantize_1x128_dual_bias_grad": [data, scale, data_t, scale_t, ((columns,), (1,))],
        "quantize_128x128": [data, blocks],
        "quantize_128x128_dual": [data, blocks, data_t],
        "quantize_rowwise": [data, ((*leading, 1), folded(1, 1))],
        "quantize_tensorwise": [data, ((1, 1), (1, 1))],
    }[name]
    assert [(tuple(t.shape), t.stride()) for t in outputs] == expected


@pytest.mark.every_architecture(kernels=["quantize_*"])
@pytest.mark.parametrize("shape", MATRIX_SHAPES)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_matrices(name, shape, device):
    x = spread(shape, torch.bfloat16, device)
    check(name, x)
    check_layout(name, x)


@pytest.mark.parametrize("shape", FOLDING_SHAPES)
@pytest.mark.parametrize("name", FOLDING)
def test_leading_dimensions(name, shape, device):
    x = spread(shape, torch.float32, device)
    check(name, x)
    check_layout(name, x)


@pytest.mark.large
@pytest.mark.parametrize("name", QUANTIZERS)
def test_large_enough_to_be_shared_among_threads(name, device):
    check(name, spread((700, 900), torch.bfloat16, device))


def views(dtype, device):
    """Matrices that are read in place, whatever their strides."""
    base = spread((300, 310), dtype, device)
    return {
        "transposed": base[:140, :200].t(),
        "rows with gaps": base[:130, :200],
        "misaligned columns": base[3:40, 5:290],
        "every second row": base[:100:2, :150],
        "every third column": base[:40, ::3],
        "every third column, transposed": base[:140, ::3].t(),
        "one row, repeated": base[:1, :150].expand(130, 150),
        "one column, repeated": base[:130, :1].expand(130, 150),
        "one value, repeated": base[:1, :1].expand(5, 150),
        "one column of a matrix": base[:140, 7:8],
        "one row of a matrix": base[7:8],
        "one row, of strided elements": base[:, 7:8].t(),
        "windows that overlap": base.as_strided((60, 200), (3, 1)),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("view", views(torch.bfloat16, "cpu"))
@pytest.mark.parametrize("name", QUANTIZERS)
def test_strides(name, view, dtype, device):
    x = views(dtype, device)[view]
    check(name, x)
    check_layout(name, x)


@pytest.mark.parametrize("name", FOLDING)
def test_leading_dimensions_that_fold_without_being_contiguous(name, device):
    base = spread((6, 5, 80), torch.bfloat16, device)
    check(name, base[:, :, 3:60])
    check(name, base[:, :1, 3:60])
    check(name, base[::2, 2:3].expand(3, 1, 80))
    check(name, base[:1, :1, :60].expand(4, 3, 60))


@pytest.mark.parametrize("name", FOLDING)
def test_leading_dimensions_that_do_not_fold_are_refused(name, device):
    x = spread((6, 5, 80), torch.bfloat16, device)
    for view in (x[:, :3], x.transpose(0, 1), x.permute(2, 0, 1)):
        with pytest.raises(
            RuntimeError, match=rf"^{name}: .*fold.*x\.contiguous\(\) \[ValueError\]$"
        ):
            quantize(name, view)
        check(name, view.contiguous())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_other_arguments_are_refused(name, device):
    x = torch.ones(4, 16, device=device)
    for bad in (x.double(), x.int(), x.to(E4M3)):
        with pytest.raises(
            RuntimeError, match=rf"^{name}: x must be .*got {bad.dtype}.*\[TypeError\]"
        ):
            quantize(name, bad)
    for dtype in (torch.bfloat16, torch.float8_e4m3fnuz, torch.uint8):
        with pytest.raises(RuntimeError, match=rf"^{name}: dtype must be .*got .*\[TypeError\]"):
            quantize(name, x, dtype)
    shapes = [()] if name in FOLDING else [(), (4,)]
    for shape in shapes:
        with pytest.raises(RuntimeError, match=rf"^{name}: x must have shape .*\[ValueError\]"):
            quantize(name, torch.ones(shape, device=device))


# ---- settings of the machine ----


@pytest.mark.parametrize("name", QUANTIZERS)
def test_flushing_of_subnormals_changes_nothing(name):
    groups = hostile_groups(torch.float32, E4M3)
    x = torch.stack([groups["subnormals"], groups["below the smallest scale"]]).repeat(40, 3)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        outputs = quantize(name, x)
    finally:
        torch.set_flush_denormal(False)
    for flushed, kept in zip(outputs, quantize(name, x), strict=True):
        assert torch.equal(flushed.float(), kept.float())


def test_any_number_of_threads_gives_the_same_bits():
    x = spread((1000, 700), torch.float32, "cpu")
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append([part.float() for name in QUANTIZERS for part in quantize(name, x)])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))
