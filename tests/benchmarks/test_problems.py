"""References, checks and layouts, which keep a wrong result from being published."""

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.cases import (
    ACTIVATIONS,
    ALONG_K,
    FUSED,
    GEMMS,
    GROUPED,
    LINEARS,
    MOE,
    MOE_LAYER,
    NORMS,
    QUANTIZERS,
    RAGGED,
    STEP,
    WGRAD_ACCUMULATE,
    Case,
    bf16_rows,
    cpu_cases,
    cuda_cases,
)
from benchmarks.contenders import SUBJECT, all_contenders, contenders_for
from benchmarks.contenders import plain_fp8 as plain
from benchmarks.contenders.cublaslt import dense_columns, padded_blocks
from benchmarks.problems import (
    PROBLEMS,
    GemmProblem,
    GroupedProblem,
    LinearProblem,
    QuantizeProblem,
    TrainingProblem,
    UnsupportedError,
    WrongResultError,
    difference,
    require,
)
from support.cuda_division import CudaDivision
from torchext import ops
from torchext._catalog import CATALOG


def case(suite: str, op: str, shape: tuple[int, ...]) -> Case:
    return Case(suite, op, "given", "", shape)


UNSUPPORTED = {
    ("bf16", WGRAD_ACCUMULATE): "accumulates in FP32",
    ("bf16", ALONG_K): "accumulates in FP32",
    **{(name, op): "only the layer" for name in ("bf16", "fp32") for op in MOE},
}
CASES = [
    *(case("quantize", op, (70, 200)) for op in QUANTIZERS),
    *(case("activation", op, (70, 200)) for op in ACTIVATIONS),
    *(case("norm", op, (70, 200)) for op in NORMS),
    *(case("moe", op, (20, 200)) for op in MOE),
    case("moe", MOE_LAYER, (30, 144, 128, 4, 2)),
    *(case("gemm", op, (48, 144, 272)) for op in GEMMS),
    *(case("grouped", op, (3, 150, 144, 272)) for op in GROUPED),
    case("grouped", RAGGED, (3, 15, 144, 272)),
    bf16_rows("given", "", (48, 144, 272)),
    case("training", STEP, (2, 16, 256)),
    *(case("fused", op, (48, 144, 272)) for op in FUSED),
    *(case("linear", op, (48, 144, 272)) for op in LINEARS),
]


@pytest.mark.parametrize("chosen", CASES, ids=lambda c: c.name)
def test_every_contender_of_this_machine_is_right(chosen):
    problem = PROBLEMS[chosen.suite](chosen, "cpu")
    for contender in contenders_for("cpu"):
        if contender.suite == chosen.suite and chosen.has(contender.name):
            contender.require("cpu")
            if (contender.name, chosen.op) in UNSUPPORTED:
                with pytest.raises(UnsupportedError, match=UNSUPPORTED[contender.name, chosen.op]):
                    contender.prepare(problem)
                continue
            run = contender.prepare(problem)
            for _ in range(2):  # `before` must make a second call do the same work
                if run.before:
                    run.before()
                error = run.check(run.call())
            limit = 0.12 if chosen.op == MOE_LAYER else 0.06  # errors of two GEMMs
            assert error["relative"] < limit, contender.name


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_op_of_the_catalog_is_measured(device, monkeypatch):
    """For each op of each suite in the table, torchext's contender calls ops at a small shape."""
    called = set()
    for name in CATALOG:
        original = getattr(ops, name)

        def recorded(*args, name=name, original=original, **kwargs):
            called.add(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(ops, name, recorded)
    measured = {(c.suite, c.op) for c in (cuda_cases if device == "cuda" else cpu_cases)()}
    ours = [c for c in all_contenders() if c.name in (SUBJECT, "torchext_w8a16")]
    for chosen in CASES:
        if (chosen.suite, chosen.op) in measured:
            for contender in ours:
                if contender.suite == chosen.suite and chosen.has(contender.name):
                    contender.prepare(PROBLEMS[chosen.suite](chosen, "cpu")).call()
    only_on_cpu = (
        {("grouped", RAGGED), ("training", STEP), ("moe", MOE_LAYER)} if device == "cuda" else set()
    )
    assert measured == {(c.suite, c.op) for c in CASES} - only_on_cpu
    assert called == set(CATALOG)


def test_ragged_groups_have_from_one_row_to_twice_the_mean():
    problem = GroupedProblem(case("grouped", RAGGED, (200, 4, 16, 32)), "cpu")
    assert set(problem.lengths) == set(range(1, 9))
    assert problem.offsets[-1] == problem.rows == sum(problem.lengths)


def test_a_step_of_the_demo_is_compared_with_the_unquantized_loss():
    problem = TrainingProblem(case("training", STEP, (2, 16, 256)), "cpu")
    assert problem.check(torch.tensor(problem.expected))["relative"] < 1e-6
    for wrong in (1.02 * problem.expected, float("nan")):
        with pytest.raises(WrongResultError, match="loss: relative error"):
            problem.check(torch.tensor(wrong))


def test_an_unquantized_layer_runs_in_its_own_dtype():
    problem = LinearProblem(case("linear", "forward", (16, 32, 48)), "cpu")
    (bf16,) = [c for c in contenders_for("cpu") if (c.name, c.suite) == ("bf16", "linear")]
    result = bf16.prepare(problem).call()
    assert isinstance(result, tuple) and result[0].dtype == torch.bfloat16


def test_a_training_step_starts_without_gradients_and_with_a_changed_weight():
    problem = LinearProblem(case("linear", "forward_backward", (16, 32, 48)), "cpu")
    weight = torch.nn.Parameter(problem.weight.clone())
    run = problem.run(lambda x: x @ weight.t(), weight, 1e-2)
    result = run.call()
    assert isinstance(result, tuple) and run.before is not None
    _, grad_x, grad_weight = result
    assert grad_x is not None and grad_weight is weight.grad
    version, value = weight._version, weight.detach().clone()
    run.before()
    assert weight.grad is None
    assert weight._version > version and torch.equal(weight, value)


@pytest.mark.parametrize("op", [op for op in QUANTIZERS if op != "dequantize"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 130), (200, 144), (130, 257)])
def test_plain_quantizers_equal_torchext_in_bits_and_layout(op, shape):
    x = torch.randn(shape).mul_(10).bfloat16()
    x[0, 0] = 0
    for ours, theirs in zip(getattr(plain, op)(x), getattr(ops, op)(x), strict=True):
        assert torch.equal(ours.float(), theirs.float())
        assert ours.stride() == theirs.stride() or ours.shape[-1] == 1 or ours.shape[0] == 1


@pytest.mark.parametrize("op", [op for op in QUANTIZERS if op != "dequantize"])
def test_plain_quantizers_have_the_same_bits_on_cuda(op):
    x = torch.randn(130, 257).bfloat16()
    with CudaDivision():
        emulated = getattr(plain, op)(x)
    for ours, theirs in zip(emulated, getattr(ops, op)(x), strict=True):
        assert torch.equal(ours.float(), theirs.float())


def test_plain_quantizer_against_numpy():
    x = torch.randn(3, 256)
    data, scale = plain.quantize_1x128(x)
    amax = np.abs(x.numpy().reshape(3, 2, 128)).max(2)
    assert np.array_equal(scale.numpy(), (amax / np.float32(448)).astype(np.float32))
    back = plain.dequantize(data, scale).numpy()
    assert np.abs(back - x.numpy()).max() <= amax.max() / 28 * 1.001  # half an FP8 step at 448


@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), 1e3])
def test_one_wrong_element_is_found(spoil):
    expected = torch.randn(300, 400, dtype=torch.float64)
    result = expected.to(torch.bfloat16)
    require(difference(result, expected), 5e-3, 5e-2)
    result[17, 3] = spoil
    with pytest.raises(WrongResultError, match="relative error"):
        require(difference(result, expected), 5e-3, 5e-2)


def test_a_wrong_tile_and_a_wrong_shape_are_found():
    problem = GemmProblem(case("gemm", "fprop", (256, 256, 256)), "cpu")
    right = problem.expected_fp8.to(torch.bfloat16)
    assert problem.check_fp8(right)["relative"] < 5e-3
    wrong = right.clone()
    wrong[64:128, :64] = 0
    for result in (wrong, right * 1.01, right[:, :255], right * float("nan")):
        with pytest.raises(WrongResultError):
            problem.check_fp8(result)


@pytest.mark.parametrize("op", GROUPED)
def test_a_wrong_group_is_found_and_rows_of_no_group_are_not_looked_at(op):
    problem = GroupedProblem(case("grouped", op, (3, 150, 144, 272)), "cpu")
    assert sum(problem.lengths) > 0 and len(problem.parts) == 3
    right = [part.to(torch.bfloat16) for part in problem.expected_fp8]
    if problem.along_k:
        result = torch.stack(right)
        last: tuple = (2,)
    else:
        result = torch.full((problem.rows, 144), torch.nan, dtype=torch.bfloat16)
        for part, values in zip(problem.parts, right, strict=True):
            result[part] = values
        last = (problem.parts[2],)
    assert problem.check_fp8(result)["relative"] < 5e-3
    result[last] *= 1.02
    with pytest.raises(WrongResultError, match="group 2: relative error"):
        problem.check_fp8(result)


def test_groups_are_described_to_every_contender_alike():
    contiguous = GroupedProblem(case("grouped", "contiguous", (4, 300, 16, 128)), "cpu")
    assert all(length % 128 == 0 for length in contiguous.lengths)
    assert contiguous.offsets.tolist()[-1] == contiguous.rows == len(contiguous.row_groups)
    assert torch.bincount(contiguous.row_groups).tolist() == contiguous.lengths
    masked = GroupedProblem(case("grouped", "masked", (4, 300, 16, 128)), "cpu")
    assert masked.counts.tolist() == masked.lengths and max(masked.lengths) <= masked.room
    assert masked.left_fp8[0].shape == (4, masked.room, 128)
    assert masked.left_fp8[1].stride() == (masked.room, 1, 4 * masked.room)
    along_k = GroupedProblem(case("grouped", "along_k", (4, 16, 24, 300)), "cpu")
    assert along_k.flops == 2 * 16 * 24 * sum(along_k.lengths) == 2 * 16 * 24 * along_k.k


def test_a_flipped_bit_of_a_quantizer_is_found():
    problem = QuantizeProblem(case("quantize", "quantize_1x128", (8, 128)), "cpu")
    data, scale = plain.quantize_1x128(problem.x)
    problem.check_bits((data, scale))
    data.view(torch.uint8)[3, 5] ^= 1
    with pytest.raises(WrongResultError, match=r"output_0_elements': 1"):
        problem.check_bits((data, scale))
    with pytest.raises(WrongResultError, match="expected 2 outputs, got 1"):
        problem.check_bits(scale)


def test_gradients_are_checked_one_by_one():
    problem = LinearProblem(case("linear", "forward_backward", (16, 24, 32)), "cpu")
    weight = torch.nn.Parameter(problem.weight.clone())
    check = problem.run(lambda x: x @ weight.t(), weight, 1e-2).check
    check(problem.expected)
    output, grad_x, grad_weight = problem.expected
    with pytest.raises(WrongResultError, match="gradient of the weight"):
        check((output, grad_x, 1.1 * grad_weight))
    with pytest.raises(WrongResultError, match="gradient of x: none"):
        check((output, None, grad_weight))


def test_traffic_is_counted_as_published():
    def per_element(op: str) -> float:
        least = QuantizeProblem(case("quantize", op, (128, 256)), "cpu").bytes
        assert least is not None
        return least / (128 * 256)

    assert round(per_element("quantize_1x128"), 2) == 3.03
    assert round(per_element("quantize_1x128_dual"), 2) == 4.06
    assert per_element("quantize_128x128") == 3
    gemm = GemmProblem(case("gemm", "fprop", (16, 32, 48)), "cpu")
    assert gemm.bytes == 16 * 48 + 32 * 48 + 2 * 16 * 32
    assert gemm.flops == 2 * 16 * 32 * 48
    assert gemm.traffic(operand=2) == 2 * (16 * 48 + 32 * 48) + 2 * 16 * 32
    added = GemmProblem(case("gemm", "wgrad_accumulate", (16, 32, 48)), "cpu")
    assert added.bytes == 32 * 16 + 48 * 16 + 8 * 32 * 48
    rows = GroupedProblem(case("grouped", "contiguous", (2, 300, 32, 48)), "cpu")
    assert rows.bytes == rows.rows * 48 + 2 * 32 * 48 + 2 * rows.rows * 32
    columns = GroupedProblem(case("grouped", "along_k", (2, 16, 24, 300)), "cpu")
    assert columns.bytes == (16 + 24) * columns.k + 8 * 2 * 16 * 24


def test_scale_layouts_of_cublaslt():
    scale = plain.quantize_1x128(torch.randn(6, 300))[1]
    assert scale.stride() == (1, 8)
    dense = dense_columns(scale)
    assert dense.stride() == (1, 6) and torch.equal(dense, scale)
    blocks = torch.randn(3, 5)
    padded: Tensor = padded_blocks(blocks)
    assert padded.shape == (8, 3) and padded.stride() == (1, 8)
    assert torch.equal(padded[:5], blocks.t())
