"""Every error that an op documents: its class, and that it names the op, the argument, what the op
expects, what it got and the remedy."""

from __future__ import annotations

import re

import pytest
import torch

import torchext
from support.op_testing import (
    BLOCKS,
    FOLDING,
    FUSED,
    GROUPINGS,
    M_GROUPINGS,
    QUANTIZERS,
    grouped,
    quantized,
    random,
)
from torchext import ops
from torchext._catalog.entry import E4M3
from torchext._dispatch.errors import python_error


def expect(exception, *parts):
    """Expects an error of exactly this class that has the parts in this order, without the class's
    tag and without a context."""
    pattern = ".*".join(re.escape(part) for part in parts)

    class Expectation:
        def __enter__(self):
            self.raises = pytest.raises(exception, match=re.compile(pattern, re.DOTALL))
            self.info = self.raises.__enter__()
            return self

        def __exit__(self, *raised):
            caught = self.raises.__exit__(*raised)
            assert type(self.info.value) is exception
            assert "Error]" not in str(self.info.value)
            assert self.info.value.__cause__ is None
            assert self.info.value.__suppress_context__
            return caught

    return Expectation()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_refuse_other_input_dtypes(name, device):
    for dtype in (torch.float64, torch.int32, E4M3):
        x = torch.zeros(4, 16, device=device).to(dtype)
        with expect(TypeError, name, "x must be", str(dtype)):
            getattr(ops, name)(x)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_refuse_other_output_dtypes(name, device):
    x = torch.zeros(4, 16, device=device)
    with expect(TypeError, name, "dtype must be", "float8_e4m3fn", "torch.bfloat16"):
        getattr(ops, name)(x, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", FOLDING)
def test_quantizers_refuse_scalars(name, device):
    with expect(ValueError, name, "x must"):
        getattr(ops, name)(torch.tensor(1.0, device=device))


@pytest.mark.parametrize("name", FOLDING)
def test_quantizers_refuse_rows_that_do_not_fold(name, device):
    x = torch.zeros(2, 3, 4, device=device).transpose(0, 1)
    with expect(ValueError, name, "x must fold", "[3, 2, 4]", "(4, 12, 1)", "x.contiguous()"):
        getattr(ops, name)(x)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("shape", [(), (4,)])
def test_blocks_need_a_matrix(name, shape, device):
    with expect(ValueError, name, "x must", str(list(shape))):
        getattr(ops, name)(torch.zeros(shape, device=device))


def test_dequantize_refuses_other_dtypes(device):
    data, scale = ops.quantize_1x128(random(4, 300, device=device))
    with expect(TypeError, "dequantize", "data must be", "torch.float32"):
        ops.dequantize(data.float(), scale, out_dtype=torch.float32)
    with expect(TypeError, "dequantize", "scale must be", "torch.float16"):
        ops.dequantize(data, scale.half(), out_dtype=torch.float32)
    with expect(TypeError, "dequantize", "out_dtype must be", "torch.float64"):
        ops.dequantize(data, scale, out_dtype=torch.float64)


@pytest.mark.parametrize("shape", [(4, 2), (3, 3), (4, 4), (2, 1), (12,), (1, 4, 3, 1)])
def test_dequantize_refuses_a_scale_that_fits_nothing(shape, device):
    data, _ = ops.quantize_1x128(random(4, 300, device=device))
    with expect(ValueError, "dequantize", "scale", str(list(shape))):
        ops.dequantize(data, torch.ones(shape, device=device), out_dtype=torch.float32)


class TestGemmErrors:
    @pytest.fixture
    def operands(self, device):
        return list(quantized("1d2d", 20, 40, 300, device=device))

    def test_operands_must_be_fp8(self, operands):
        for index, name in ((0, "a"), (2, "b")):
            wrong = list(operands)
            wrong[index] = operands[index].bfloat16()
            with expect(TypeError, "fp8_gemm_nt", f"{name} must be", "torch.bfloat16", "quantize"):
                ops.fp8_gemm_nt(*wrong)

    def test_scales_must_be_float32(self, operands):
        for index, name in ((1, "a_scale"), (3, "b_scale")):
            wrong = list(operands)
            wrong[index] = operands[index].half()
            with expect(TypeError, "fp8_gemm_nt", f"{name} must be", "torch.float16"):
                ops.fp8_gemm_nt(*wrong)

    def test_k_must_agree(self, operands, device):
        a, a_scale, _, _ = operands
        b, b_scale = ops.quantize_128x128(random(40, 256, device=device))
        with expect(ValueError, "fp8_gemm_nt", "[20, 300]", "[40, 256]", "[N, K]"):
            ops.fp8_gemm_nt(a, a_scale, b, b_scale)

    def test_b_must_be_a_matrix(self, operands):
        a, a_scale, b, b_scale = operands
        with expect(ValueError, "fp8_gemm_nt", "b must have shape [N, K]", "[1, 40, 300]"):
            ops.fp8_gemm_nt(a, a_scale, b[None], b_scale)

    def test_a_must_not_be_a_scalar(self, operands):
        a, a_scale, b, b_scale = operands
        with expect(ValueError, "fp8_gemm_nt", "a must have shape [..., K]"):
            ops.fp8_gemm_nt(a[0, 0], a_scale, b, b_scale)

    def test_rows_need_a_pitch_of_16_bytes_on_a_gpu(self, operands, gpu):
        a, a_scale, b, b_scale = operands
        packed = a.contiguous()
        assert packed.stride() == (300, 1)
        with expect(ValueError, "fp8_gemm_nt", "a must have", "16", "(300, 1)", "restore_layout"):
            ops.fp8_gemm_nt(packed, a_scale, b, b_scale)
        with expect(ValueError, "fp8_gemm_nt", "b must have", "16", "(300, 1)", "restore_layout"):
            ops.fp8_gemm_nt(a, a_scale, b.contiguous(), b_scale)

    def test_columns_must_be_contiguous(self, operands, device):
        _, _, b, b_scale = operands
        a, a_scale = ops.quantize_1x128(random(20, 600, device=device))
        with expect(ValueError, "fp8_gemm_nt", "a must have contiguous rows", "(608, 2)"):
            ops.fp8_gemm_nt(a[:, ::2], a_scale[:, :3], b, b_scale)

    def test_rows_need_an_aligned_base_on_a_gpu(self, operands, device, gpu):
        _, a_scale, b, b_scale = operands
        a, _ = ops.quantize_1x128(random(20, 308, device=device))
        with expect(ValueError, "fp8_gemm_nt", "a must have", "data_ptr() % 16 == 8"):
            ops.fp8_gemm_nt(a[:, 8:], a_scale, b, b_scale)

    def test_leading_dimensions_must_fold(self, operands, device):
        _, _, b, b_scale = operands
        a, a_scale = ops.quantize_1x128(random(4, 5, 300, device=device))
        with expect(ValueError, "fp8_gemm_nt", "leading dimensions of a", "fold", "[5, 4, 300]"):
            ops.fp8_gemm_nt(a.transpose(0, 1), a_scale.transpose(0, 1), b, b_scale)

    def test_scales_must_fit_a_granularity(self, operands):
        a, a_scale, b, b_scale = operands
        for wrong in ((a_scale[:, :2], b_scale), (a_scale, b_scale[:, :2]), (a_scale[:7], b_scale)):
            with expect(ValueError, "fp8_gemm_nt", "granularity", "M=20, N=40, K=300", "got"):
                ops.fp8_gemm_nt(a, wrong[0], b, wrong[1])

    def test_scales_of_groups_must_be_m_major(self, operands):
        a, a_scale, b, b_scale = operands
        with expect(ValueError, "fp8_gemm_nt", "a_scale", "M-major", "(3, 1)"):
            ops.fp8_gemm_nt(a, a_scale.contiguous(), b, b_scale)

    def test_scales_of_groups_of_b_must_be_m_major(self, device):
        a, a_scale, b, b_scale = quantized("1d1d", 20, 40, 300, device=device)
        with expect(ValueError, "fp8_gemm_nt", "b_scale", "M-major", "(3, 1)"):
            ops.fp8_gemm_nt(a, a_scale, b, b_scale.contiguous())

    def test_scales_of_groups_need_a_pitch_and_a_base(self, operands, device):
        a, _, b, b_scale = operands
        odd = torch.empty_strided((20, 3), (1, 21), device=device).fill_(1)
        with expect(ValueError, "fp8_gemm_nt", "a_scale", "M-major", "(1, 21)"):
            ops.fp8_gemm_nt(a, odd, b, b_scale)
        shifted = torch.ones(3 * 24 + 1, device=device).as_strided((20, 3), (1, 24), 1)
        with expect(ValueError, "fp8_gemm_nt", "a_scale", "16-byte aligned"):
            ops.fp8_gemm_nt(a, shifted, b, b_scale)

    def test_bias(self, operands, device):
        with expect(ValueError, "fp8_gemm_nt", "bias must be", "[40]", "[41]"):
            ops.fp8_gemm_nt(*operands, bias=torch.zeros(41, device=device))
        with expect(ValueError, "fp8_gemm_nt", "bias must be contiguous", "(2)"):
            ops.fp8_gemm_nt(*operands, bias=torch.zeros(80, device=device)[::2])
        with expect(TypeError, "fp8_gemm_nt", "bias must be", "torch.float64"):
            ops.fp8_gemm_nt(*operands, bias=torch.zeros(40, device=device, dtype=torch.float64))

    def test_out_dtype(self, operands):
        with expect(TypeError, "fp8_gemm_nt", "out_dtype must be", "torch.float64"):
            ops.fp8_gemm_nt(*operands, out_dtype=torch.float64)

    def test_num_sms(self, operands):
        with expect(ValueError, "fp8_gemm_nt", "num_sms must be", "-1"):
            ops.fp8_gemm_nt(*operands, num_sms=-1)

    def test_out(self, operands, device):
        for shape in ((20, 41), (21, 40), (1, 20, 40), (800,)):
            with expect(ValueError, "fp8_gemm_nt", "out must have", "N = 40", str(list(shape))):
                ops.fp8_gemm_nt(*operands, out=torch.zeros(shape, device=device))
        with expect(ValueError, "fp8_gemm_nt", "out must have", "contiguous rows", "(1, 20)"):
            ops.fp8_gemm_nt(*operands, out=torch.zeros(40, 20, device=device).t())
        with expect(ValueError, "fp8_gemm_nt", "out must have", "overlap", "(0, 1)"):
            ops.fp8_gemm_nt(*operands, out=torch.zeros(1, 40, device=device).expand(20, 40))
        with expect(TypeError, "fp8_gemm_nt", "out must be", "torch.float64"):
            ops.fp8_gemm_nt(*operands, out=torch.zeros(20, 40, device=device, dtype=torch.float64))

    def test_accumulate_needs_out(self, operands):
        with pytest.raises(ValueError, match=r"fp8_gemm_nt: out must be .*accumulate=True.*None"):
            ops.fp8_gemm_nt(*operands, accumulate=True)

    def test_out_dtype_beside_out(self, operands, device):
        out = torch.zeros(20, 40, device=device)
        with pytest.raises(ValueError, match=r"fp8_gemm_nt: out_dtype must be None.*bfloat16"):
            ops.fp8_gemm_nt(*operands, out=out, out_dtype=torch.bfloat16)
        ops.fp8_gemm_nt(*operands, out=out, out_dtype=torch.float32)


class TestGroupedGemmErrors:
    @pytest.fixture(params=GROUPINGS)
    def call(self, request, device):
        """The op's name, a function that calls it with changed arguments, and its tensors."""
        name, tensors, options = grouped(request.param, 20, 40, 300, device=device)

        def call(changed=(), **changes):
            arguments = dict(enumerate(tensors)) | dict(changed)
            return getattr(ops, name)(*arguments.values(), **(options | changes))

        return name, call, tensors

    def test_operands(self, call, device):
        name, run, (a, a_scale, b, b_scale, *_) = call
        with expect(TypeError, name, "a must be", "torch.bfloat16", "quantize"):
            run({0: a.bfloat16()})
        with expect(TypeError, name, "b_scale must be", "torch.float16"):
            run({3: b_scale.half()})
        with expect(ValueError, name, "a must have shape", str([1, *a.shape])):
            run({0: a[None]})
        with expect(ValueError, name, "b must have shape", str([1, *b.shape])):
            run({2: b[None]})
        with expect(ValueError, name, "agree in K", "N, K]"):
            run({2: b[..., :256]})
        with expect(ValueError, name, "granularity", "N=40, K=300", "got"):
            run({1: a_scale[..., :2]})
        with expect(ValueError, name, "granularity", "N=40, K=300", "got"):
            run({3: b_scale[..., :2]})
        with expect(ValueError, name, "a_scale", "M-major"):
            run({1: a_scale.contiguous()})
        with expect(ValueError, name, "num_sms must be", "-1"):
            run(num_sms=-1)
        with expect(TypeError, name, "out_dtype must be", "torch.float64"):
            run(out_dtype=torch.float64)

    def test_out(self, call):
        name, run, _ = call
        out = run()
        with expect(ValueError, name, "out must have shape", str(list(out.shape))):
            run(out=out[..., :39])
        with expect(ValueError, name, "out must have", "do not overlap"):
            run(out=out[..., :1, :].expand(out.shape))
        with expect(ValueError, name, "out must have", "contiguous rows"):
            run(out=out.mT.contiguous().mT)
        with expect(TypeError, name, "out must be", "torch.float64"):
            run(out=out.double())
        with pytest.raises(ValueError, match=f"{name}: out must be .*accumulate=True.*None"):
            run(accumulate=True)
        with pytest.raises(ValueError, match=f"{name}: out_dtype must be None.*float16"):
            run(out=out, out_dtype=torch.float16)

    @pytest.mark.parametrize("case", M_GROUPINGS)
    def test_groups_of_b(self, case, device):
        name, tensors, options = grouped(case, 20, 40, 300, device=device)
        function = getattr(ops, name)
        a, a_scale, b, b_scale, *index = tensors
        with expect(ValueError, name, "leading dimensions of b", "fold"):
            function(a, a_scale, b[:, :39], b_scale, *index, **options)
        with expect(ValueError, name, "b_scale", "three dimensions of b", "[1, 3]"):
            function(a, a_scale, b, b_scale[0], *index, **options)
        with expect(ValueError, name, "bias must be contiguous", "[G, N] = [3, 40]", "[40]"):
            function(*tensors, bias=torch.zeros(40, device=device), **options)
        _, scale = ops.quantize_1x128(random(3, 40, 300, device=device))
        with expect(ValueError, name, "b_scale", "M-major"):
            function(a, a_scale, b, scale.contiguous(), *index, **options)

    def test_indices(self, device):
        for case in GROUPINGS:
            name, tensors, options = grouped(case, 20, 40, 300, device=device)
            argument = {"masked": "masked_m", "group ids": "group_ids"}.get(case, "offsets")
            index = options.get(argument, tensors[-1])
            fixed = tensors[:4]
            function = getattr(ops, name)
            with expect(TypeError, name, f"{argument} must be torch.int32", "torch.int64", "int()"):
                function(*fixed, **{argument: index.long()})
            with expect(ValueError, name, f"{argument} must", str([1, *index.shape])):
                function(*fixed, **{argument: index[None]})
            with expect(ValueError, name, f"{argument} must be contiguous", "(2)"):
                function(*fixed, **{argument: index.repeat_interleave(2)[::2]})
            if case != "along k":
                with expect(ValueError, name, f"{argument} must be", str([len(index)]), "got"):
                    function(*fixed, **{argument: index[1:]})

    def test_either_offsets_or_ids(self, device):
        name, tensors, _ = grouped("offsets", 20, 40, 300, device=device)
        with expect(ValueError, name, "offsets", "group_ids", "neither"):
            ops.m_grouped_fp8_gemm_nt_contiguous(*tensors[:4])
        ids = torch.zeros(20, dtype=torch.int32, device=device)
        with expect(ValueError, name, "offsets", "group_ids", "both"):
            ops.m_grouped_fp8_gemm_nt_contiguous(*tensors, group_ids=ids)

    def test_masked(self, device):
        name, (a, a_scale, *rest), _ = grouped("masked", 20, 40, 300, device=device)
        with expect(ValueError, name, "expected_m must be", "-1"):
            ops.m_grouped_fp8_gemm_nt_masked(a, a_scale, *rest, expected_m=-1)
        with expect(ValueError, name, "agree in G", "[2, 20, 300]", "[3, 40, 300]"):
            ops.m_grouped_fp8_gemm_nt_masked(a[:2], a_scale[:2], *rest)
        by_group = torch.ones(3, 3, 20, device=device).mT  # DeepGEMM's layout, which does not fold
        with expect(ValueError, name, "leading dimensions of a_scale", "fold", "(60, 1, 20)"):
            ops.m_grouped_fp8_gemm_nt_masked(a, by_group, *rest)

    def test_along_k_takes_one_granularity(self, device):
        name, (a, a_scale, b, b_scale, offsets), _ = grouped("along k", 20, 40, 300, device=device)
        ones = torch.ones(40, 1, device=device)
        for wrong in ((a_scale[:, :1], ones), (a_scale, b_scale[:1])):
            with expect(ValueError, name, "granularity", "1x128 with 1x128", "got"):
                ops.k_grouped_fp8_gemm_nt(a, wrong[0], b, wrong[1], offsets)

    def test_indices_out_of_range_on_the_cpu(self):
        """Only the CPU can check indices. A call that raises writes nothing."""
        for case, argument, values in (
            ("offsets", "offsets", [5, 4, 20]),
            ("offsets", "offsets", [5, 6, 21]),
            ("offsets", "offsets", [-1, 6, 20]),
            ("along k", "offsets", [5, 6, 301]),
            ("masked", "masked_m", [5, 6, 21]),
            ("masked", "masked_m", [5, -1, 20]),
            ("group ids", "group_ids", [0] * 19 + [3]),
        ):
            name, tensors, _ = grouped(case, 20, 40, 300, device="cpu")
            index = torch.tensor(values, dtype=torch.int32)
            shape = (20, 40) if name.endswith("contiguous") else (3, 20, 40)
            out = torch.full(shape, torch.nan)
            with expect(ValueError, name, f"{argument} must", "got"):
                getattr(ops, name)(*tensors[:4], **{argument: index}, out=out)
            assert out.isnan().all()


class TestFusedGemmErrors:
    @pytest.mark.parametrize("name, options", FUSED)
    def test_arguments(self, name, options, device):
        a, a_scale, b, b_scale = quantized("1d2d", 20, 40, 300, device=device)
        function = getattr(ops, name)
        with expect(TypeError, name, "a must be", "torch.bfloat16", "quantize"):
            function(a.bfloat16(), a_scale, b, b_scale, **options)
        with expect(ValueError, name, "granularity", "M=20, N=40, K=300", "got"):
            function(a, a_scale[:, :2], b, b_scale, **options)
        with expect(ValueError, name, "bias must be", "[40]", "[41]"):
            function(a, a_scale, b, b_scale, bias=torch.zeros(41, device=device), **options)
        with expect(TypeError, name, "dtype must be", "float8_e4m3fn", "torch.bfloat16"):
            function(a, a_scale, b, b_scale, dtype=torch.bfloat16, **options)
        with expect(ValueError, name, "num_sms must be", "-1"):
            function(a, a_scale, b, b_scale, num_sms=-1, **options)

    def test_swiglu_needs_a_gate_and_an_up(self, device):
        operands = quantized("1d2d", 20, 41, 300, device=device)
        with expect(ValueError, "fp8_gemm_nt_swiglu_quantize", "b must have an even", "[41, 300]"):
            ops.fp8_gemm_nt_swiglu_quantize(*operands)


def test_the_op_itself_raises_a_runtime_error_that_names_the_class(device):
    """torch.ops callers and compiled graphs see it: the stable ABI has no other class."""
    with pytest.raises(RuntimeError, match=r"\[TypeError\]"):
        torch.ops.torchext.quantize_1x128(torch.zeros(4, 16, device=device, dtype=torch.int32))


def test_errors_carry_the_stack_trace_of_cpp_when_asked_to():
    error = python_error(RuntimeError("op: x is bad [ValueError]\n#1 frame"))
    assert type(error) is ValueError
    assert str(error) == "op: x is bad\n#1 frame"


def test_other_runtime_errors_stay_what_they_are():
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert python_error(error) is error


def test_a_gpu_is_refused_by_a_build_without_cuda_kernels():
    available, reason = torchext.is_available("cuda")
    if torch.cuda.is_available() and not available:
        with pytest.raises(RuntimeError, match="no CUDA kernels"):
            ops.quantize_1x128(torch.zeros(4, 16, device="cuda"))
    else:
        pytest.skip(f"needs a GPU and a build without CUDA kernels: {reason}")
