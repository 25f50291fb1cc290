"""torchext.compat.deep_gemm.utils: casts compared with torchext's quantizers, layouts of scales."""

from __future__ import annotations

import pytest
import torch

from support.deep_gemm_testing import matrix
from torchext import ops
from torchext.compat import deep_gemm

E4M3 = torch.float8_e4m3fn
SHAPES = [(1, 1), (3, 128), (37, 300), (130, 257), (256, 384)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def codes(data):
    return data.contiguous().view(torch.uint8)


def quantized(name, x, use_ue8m0):
    """(data, scale) from torchext's quantizer of the same granularity."""
    if name == "per_token_cast_to_fp8":
        return ops.quantize_1x128(x, pow2_scale=use_ue8m0)
    if name == "per_block_cast_to_fp8":
        return ops.quantize_128x128(x, pow2_scale=use_ue8m0)
    data_t, scale_t = ops.quantize_1x128_t(x, pow2_scale=use_ue8m0)
    return data_t.t(), scale_t.t()


# ---- casts ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "name", ["per_token_cast_to_fp8", "per_channel_cast_to_fp8", "per_block_cast_to_fp8"]
)
def test_casts_are_torchexts_where_the_definitions_agree(name, shape, dtype, device):
    """Scales that are powers of two: equal bits. Otherwise scales have equal bits (on GPUs torch
    divides by 448 with a reciprocal), and data differs by at most one unit in the last place."""
    if name == "per_channel_cast_to_fp8":
        shape = (-(-shape[0] // 128) * 128, shape[1])
    x = matrix(*shape, device)
    x = x.sign() * x.abs().clamp(min=1e-3)  # above DeepGEMM's lower limit of amax
    x = x.to(dtype)
    cast = getattr(deep_gemm, name)
    data, scale = cast(x, use_ue8m0=True)
    expected, expected_scale = quantized(name, x, use_ue8m0=True)
    assert torch.equal(scale, expected_scale) and torch.equal(codes(data), codes(expected))
    assert data.is_contiguous() and scale.is_contiguous()
    assert data.dtype == E4M3 and scale.dtype == torch.float32

    data, scale = cast(x, use_ue8m0=False)
    expected, expected_scale = quantized(name, x, use_ue8m0=False)
    tolerance = 0 if device.type == "cpu" else 2.0**-23
    torch.testing.assert_close(scale, expected_scale, rtol=tolerance, atol=0)
    apart = (codes(data).int() - codes(expected).int()).abs()
    assert (apart <= 1).all()
    assert (apart == 0).float().mean() > 0.9


@pytest.mark.parametrize("use_ue8m0", [False, True])
def test_casts_keep_deep_gemms_definition_where_it_differs(use_ue8m0):
    """Groups of zeros, tiny groups, NaN and Inf: every element follows DeepGEMM's definition."""
    x = torch.zeros(5, 128)
    x[1, 3] = small = torch.tensor(1e-5)
    x[2, 7], x[2, 9] = torch.nan, 1.0
    x[3, 7], x[3, 9] = torch.inf, 1.0
    x[4, 0], x[4, 1] = 448.0, -447.0
    data, scale = deep_gemm.per_token_cast_to_fp8(x, use_ue8m0)
    tiny = torch.tensor(1e-4) / 448.0
    least = 2.0**-22 if use_ue8m0 else tiny.item()
    assert scale[0].item() == scale[1].item() == least
    assert (data[0].float() == 0).all()
    assert data[1, 3].float() == (small * (1 / scale[1, 0])).to(E4M3).float()
    assert data[2, 7].isnan()
    if use_ue8m0:  # the largest exponent is 2**127
        assert scale[2].item() == scale[3].item() == 2.0**127
        assert data[2, 9].float() == 0
    else:
        assert scale[2].isnan() and data[2, 9].isnan()
        assert scale[3].item() == torch.inf and data[3, 9].float() == 0
    assert scale[4].item() == 1 and data[4, :2].float().tolist() == [448.0, -448.0]


def test_casts_may_land_on_the_neighbor():
    """DeepGEMM computes x * (1 / scale), torchext x / scale. The docstring states the difference,
    which shows at elements of 17 times the scale, midway between 16 and 18."""
    x = torch.zeros(1000, 128)
    x[:, 0] = torch.linspace(1, 2, 1000)
    x[:, 1] = x[:, 0] / 448 * 17
    data, _ = deep_gemm.per_token_cast_to_fp8(x, use_ue8m0=False)
    apart = (codes(data).int() - codes(ops.quantize_1x128(x)[0]).int()).abs()
    assert apart.max() == 1
    assert (apart[:, 0] == 0).all()


@pytest.mark.parametrize("gran_k", [16, 32, 64, 256])
def test_other_granularities(gran_k, device):
    x = matrix(64, 200, device)
    data, scale = deep_gemm.per_token_cast_to_fp8(x, False, gran_k)
    assert scale.shape == (64, -(-200 // gran_k))
    back = deep_gemm.cast_back_from_fp8(data, scale, gran_k)
    largest = (scale * 448).repeat_interleave(gran_k, 1)[:, :200]
    assert ((back - x).abs() <= (x.abs() / 16).maximum(largest * 2.0**-17)).all()
    blocks, block_scale = deep_gemm.per_block_cast_to_fp8(x, False, gran_k)
    assert block_scale.shape == (-(-64 // gran_k), -(-200 // gran_k))
    spread = block_scale.repeat_interleave(gran_k, 0)[:64].repeat_interleave(gran_k, 1)[:, :200]
    error = (blocks.float() * spread - x).abs()
    assert (error <= (x.abs() / 16).maximum(spread * 448 * 2.0**-17)).all()


def test_channels_are_tokens_of_the_transpose(device):
    x = matrix(256, 40, device)
    data, scale = deep_gemm.per_channel_cast_to_fp8(x, use_ue8m0=False)
    by_token, token_scale = deep_gemm.per_token_cast_to_fp8(x.t(), use_ue8m0=False)
    assert torch.equal(codes(data), codes(by_token.t())) and torch.equal(scale, token_scale.t())


def test_custom_dimensions(device):
    x = torch.randn(3, 5, 7, 64, device=device)
    data, scale = deep_gemm.per_custom_dims_cast_to_fp8(x, (0, 2), use_ue8m0=False)
    assert data.shape == x.shape and scale.shape == (3, 7)
    torch.testing.assert_close(scale * 448, x.abs().amax((1, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(data.float() * scale[:, None, :, None], x, rtol=1 / 16, atol=1e-2)
    rows, row_scale = deep_gemm.per_custom_dims_cast_to_fp8(x[0, 0], (0,), use_ue8m0=True)
    expected, expected_scale = ops.quantize_rowwise(x[0, 0], pow2_scale=True)
    assert torch.equal(codes(rows), codes(expected))
    assert torch.equal(row_scale, expected_scale.squeeze())


def test_exponents_pack_and_unpack(device):
    values = 2.0 ** torch.arange(-126, 126, device=device, dtype=torch.float32).view(21, 12)
    packed = deep_gemm.pack_ue8m0_to_int(values)
    assert packed.shape == (21, 3) and packed.dtype == torch.int32
    assert packed[0, 0].item() == 0x04030201  # the first exponent in the lowest byte
    assert torch.equal(deep_gemm.unpack_ue8m0_from_int(packed), values)
    assert deep_gemm.unpack_ue8m0_from_int(torch.tensor([-1], dtype=torch.int32)).isnan().all()
    x = matrix(20, 600, device)
    data, packed = deep_gemm.per_token_cast_to_fp8(x, True, use_packed_ue8m0=True)
    _, scale = deep_gemm.per_token_cast_to_fp8(x, True)
    assert packed.shape == (20, 2)
    unpacked = deep_gemm.unpack_ue8m0_from_int(packed)
    assert torch.equal(unpacked[:, :5], scale) and (unpacked[:, 5:] == 1).all()
    back = deep_gemm.cast_back_from_fp8(data, packed, use_packed_ue8m0=True)
    assert torch.equal(back, deep_gemm.cast_back_from_fp8(data, scale))


def test_rounding_up_to_powers_of_two():
    x = torch.tensor([1.0, 1.0000001, -3.0, 0.0, 1e-45, 3e38, torch.inf, torch.nan])
    expected = [1.0, 2.0, 4.0, 2.0**-126, 2.0**-126, 2.0**127, 2.0**127, 2.0**127]
    assert deep_gemm.ceil_to_ue8m0(x).tolist() == expected


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_casts_compile(backend, device):
    def casts(x):
        return (
            *deep_gemm.per_token_cast_to_fp8(x, True),
            *deep_gemm.per_token_cast_to_fp8(x, True, use_packed_ue8m0=True),
            *deep_gemm.per_block_cast_to_fp8(x, True),
            *deep_gemm.per_channel_cast_to_fp8(x, True),
            *deep_gemm.per_custom_dims_cast_to_fp8(x, (1,), True),
        )

    x = matrix(256, 300, device).bfloat16()
    torch._dynamo.reset()
    compiled = torch.compile(casts, fullgraph=True, backend=backend)
    for given, expected in zip(compiled(x), casts(x), strict=True):
        assert torch.equal(given.float(), expected.float())


# ---- layouts ----


@pytest.mark.parametrize("rows", [1, 4, 37, 128])
@pytest.mark.parametrize("leading", [(), (3,)])
def test_m_major_scales(leading, rows, device):
    sf = torch.randn(*leading, rows, 5, device=device)
    pitch = -(-rows // 4) * 4
    strides = ((5 * pitch,) if leading else ()) + (1, pitch)
    for given in (sf, sf.mT.contiguous().mT, sf.repeat_interleave(2, -1)[..., ::2]):
        result = deep_gemm.get_mn_major_tma_aligned_tensor(given)
        assert torch.equal(result, sf) and result.stride() == strides
        assert deep_gemm.get_mn_major_tma_aligned_tensor(result) is result


def test_scales_of_a_quantizer_need_no_copy(device):
    _, scale = ops.quantize_1x128(torch.randn(37, 300, device=device))
    assert deep_gemm.get_mn_major_tma_aligned_tensor(scale) is scale


def test_required_layouts(device):
    """The calls that vLLM and SGLang make, for each kind of operand."""
    transform = deep_gemm.transform_sf_into_required_layout
    a, b = torch.rand(37, 3, device=device), torch.rand(2, 3, device=device)
    grouped_a, grouped_b = (torch.rand(4, *x.shape, device=device) for x in (a, b))
    for recipe in ((1, 128, 128), (1, 1, 128)):
        result = transform(sf=a, mn=37, k=300, recipe=recipe, is_sfa=True)
        assert torch.equal(result, a) and result.stride() == (1, 40)
    assert transform(b, 200, 300, (1, 128, 128), is_sfa=False, disable_ue8m0_cast=True) is b
    assert transform(b, 200, 300, (128, 128)) is b
    assert transform(a, 37, 300, (1, 128)).stride() == (1, 40)
    assert transform(grouped_a, 37, 300, (1, 128), num_groups=4).stride() == (120, 1, 40)
    recipe = (1, 128, 128)
    assert transform(grouped_b, 200, 300, recipe, num_groups=4, is_sfa=False) is grouped_b
    powers = deep_gemm.ceil_to_ue8m0(torch.rand(37, 4, device=device))
    packed = deep_gemm.pack_ue8m0_to_int(powers)
    result = transform(packed, 37, 300, (1, 1, 128), is_sfa=False)
    assert torch.equal(result, powers[:, :3]) and result.stride() == (1, 40)


def test_sizes():
    assert [deep_gemm.ceil_div(x, 128) for x in (0, 1, 128, 129)] == [0, 1, 1, 2]
    assert [deep_gemm.align(x, 128) for x in (0, 1, 128, 129)] == [0, 128, 128, 256]
    assert deep_gemm.get_tma_aligned_size(37, 4) == 40
    assert deep_gemm.get_tma_aligned_size(37, 1) == 48


def test_alignment_of_groups():
    assert deep_gemm.get_mk_alignment_for_contiguous_layout() == 128
    assert deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout(expected_m=3) == 128
    deep_gemm.set_mk_alignment_for_contiguous_layout(1)
    assert deep_gemm.get_m_alignment_for_contiguous_layout() == 1
    assert deep_gemm.get_k_alignment_for_contiguous_layout() == 1


def test_switches_that_change_nothing():
    deep_gemm.use_deterministic_algorithms(False)
    assert deep_gemm.get_deterministic_algorithms() is True
    deep_gemm.set_ignore_compile_dims(True)


# ---- errors ----

MATRIX, SCALE = torch.ones(128, 256), torch.ones(37, 2)
WRONG = [
    (ValueError, r"per_token_cast_to_fp8: x must be a matrix .*\[128\]",
     lambda: deep_gemm.per_token_cast_to_fp8(MATRIX[:, 0], True)),
    (ValueError, "per_token_cast_to_fp8: use_packed_ue8m0 must come with use_ue8m0=True",
     lambda: deep_gemm.per_token_cast_to_fp8(MATRIX, False, use_packed_ue8m0=True)),
    (ValueError, "per_block_cast_to_fp8: x must be a matrix",
     lambda: deep_gemm.per_block_cast_to_fp8(MATRIX[None], True)),
    (ValueError, r"per_channel_cast_to_fp8: x must have a multiple of gran_k=128 rows .*\[100, 256",
     lambda: deep_gemm.per_channel_cast_to_fp8(MATRIX[:100], True)),
    (ValueError, "per_channel_cast_to_fp8: x must be a matrix",
     lambda: deep_gemm.per_channel_cast_to_fp8(MATRIX[None], True)),
    (ValueError, "cast_back_from_fp8: x must be a matrix",
     lambda: deep_gemm.cast_back_from_fp8(MATRIX[None], SCALE)),
    (TypeError, "pack_ue8m0_to_int: x must be torch.float32 .*float64",
     lambda: deep_gemm.pack_ue8m0_to_int(MATRIX.double())),
    (ValueError, r"pack_ue8m0_to_int: .* multiple of 4 \(got shape \[37, 2\]\); pad it",
     lambda: deep_gemm.pack_ue8m0_to_int(SCALE)),
    (ValueError, "pack_ue8m0_to_int: x must hold positive powers of two",
     lambda: deep_gemm.pack_ue8m0_to_int(MATRIX * 3)),
    (ValueError, "pack_ue8m0_to_int: x must hold positive powers of two",
     lambda: deep_gemm.pack_ue8m0_to_int(-MATRIX)),
    (TypeError, "unpack_ue8m0_from_int: packed_sf must be torch.int32 .*float32",
     lambda: deep_gemm.unpack_ue8m0_from_int(MATRIX)),
    (TypeError, "get_mn_major_tma_aligned_tensor: sf must be torch.float32",
     lambda: deep_gemm.get_mn_major_tma_aligned_tensor(SCALE.int())),
    (ValueError, r"get_mn_major_tma_aligned_tensor: .*\[37\]",
     lambda: deep_gemm.get_mn_major_tma_aligned_tensor(SCALE[:, 0])),
    (ValueError, "get_tma_aligned_size: element_size must be .*got 3",
     lambda: deep_gemm.get_tma_aligned_size(37, 3)),
    (ValueError, "set_mk_alignment_for_contiguous_layout: .*positive",
     lambda: deep_gemm.set_mk_alignment_for_contiguous_layout(0)),
    (ValueError, "transform_sf_into_required_layout: is_sfa must be given with a recipe of 3",
     lambda: deep_gemm.transform_sf_into_required_layout(SCALE, 37, 256, (1, 128, 128))),
    (ValueError, "transform_sf_into_required_layout: is_sfa must be given with a recipe of 3",
     lambda: deep_gemm.transform_sf_into_required_layout(SCALE, 37, 256, (1, 128), is_sfa=True)),
    (ValueError, "transform_sf_into_required_layout: recipe must give .*1x32",
     lambda: deep_gemm.transform_sf_into_required_layout(SCALE, 37, 256, (1, 32))),
    (ValueError, r"transform_sf_into_required_layout: the scale of sf.*\[37, 3\] \(got \[37, 2\]\)",
     lambda: deep_gemm.transform_sf_into_required_layout(SCALE, 37, 300, (1, 128))),
    (TypeError, "transform_sf_into_required_layout: .*must be torch.float32 .*int32",
     lambda: deep_gemm.transform_sf_into_required_layout(SCALE.int(), 37, 256, (128, 128))),
]  # fmt: skip


@pytest.mark.parametrize("error, message, call", WRONG)
def test_errors_say_what_was_expected(error, message, call):
    with pytest.raises(error, match=message):
        call()


# ---- four exponents in an int32 ----


def powers_of_two(*shape, device):
    return torch.randint(-20, 20, shape, device=device).float().exp2()


@pytest.mark.parametrize("shape", [(1, 1), (5, 4), (37, 9), (3, 10, 5), (2, 1, 4), (4, 0), (0, 3)])
@pytest.mark.parametrize("turned", [False, True])
def test_packed_exponents(turned, shape, device):
    sf = powers_of_two(*shape, device=device)
    if turned:
        sf = sf.mT.contiguous().mT
    packed = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf)
    rows, columns = shape[-2], -(-shape[-1] // 4)
    pitch = -(-rows // 4) * 4
    assert packed.dtype == torch.int32 and packed.shape == (*shape[:-1], columns)
    assert packed.stride() == (columns * pitch, 1, pitch)[3 - len(shape) :]
    assert torch.equal(deep_gemm.unpack_ue8m0_from_int(packed)[..., : shape[-1]], sf)
    used = 32 if shape[-1] % 4 == 0 else shape[-1] % 4 * 8  # bits of the last int32
    if packed.numel():
        assert not (packed[..., -1].long() & 0xFFFFFFFF >> used << used).any()


@pytest.mark.parametrize("k", [128, 300, 512, 700])
def test_packed_exponents_are_scales(k, device, copies):
    a, b = (deep_gemm.per_token_cast_to_fp8(matrix(r, k, device), True) for r in (20, 24))
    expected, d = (torch.empty(20, 24, device=device) for _ in range(2))
    deep_gemm.fp8_gemm_nt(a, b, expected, recipe=(1, 1, 128))
    pack = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor
    deep_gemm.fp8_gemm_nt((a[0], pack(a[1])), (b[0], pack(b[1])), d)
    assert torch.equal(d, expected)


def test_packed_exponents_between_groups_may_be_anything(device):
    sf = powers_of_two(300, 3, device=device)
    sf[100:128], sf[133:] = torch.nan, -3.0
    ends = torch.tensor([100, 133], dtype=torch.int32, device=device)
    packed = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf, psum_layout=ends)
    unpacked = deep_gemm.unpack_ue8m0_from_int(packed)[:, :3]
    assert torch.equal(unpacked[:100], sf[:100]) and torch.equal(unpacked[128:133], sf[128:133])
    assert (unpacked[100:128] == 1).all()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda f, g: f(torch.ones(4, 4).double()), TypeError, "sf must be torch.float32"),
        (lambda f, g: f(torch.ones(4)), ValueError, r"sf must be \[MN, K / 128\]"),
        (lambda f, g: f(torch.full((4, 4), 3.0)), ValueError, "positive powers of two"),
        (
            lambda f, g: g(torch.ones(2, 4), torch.zeros(1), [512]),
            ValueError,
            r"sf must be \[4, MN",
        ),
        (lambda f, g: g(torch.ones(4, 4), torch.zeros(2), [512]), ValueError, "grouped_layout as"),
        (
            lambda f, g: g(torch.ones(4, 4), torch.zeros(1), [512], use_psum_layout=True),
            ValueError,
            "use_psum_layout must be False",
        ),
        (lambda f, g: g(torch.ones(1, 4).half(), torch.zeros(1), [1]), TypeError, "torch.float32"),
    ],
)
def test_packing_says_what_it_takes(call, error, message):
    with pytest.raises(error, match=rf"^get_\w+_packed_ue8m0_tensor: .*{message}"):
        call(
            deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor,
            deep_gemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor,
        )
