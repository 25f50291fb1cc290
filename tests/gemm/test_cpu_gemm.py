"""What the CPU GEMM promises beyond the error bound: bits that depend on nothing but a row's own
operands, at every level of instructions."""

from __future__ import annotations

import threading

import pytest
import torch

import torchext
from torchext import ops

M, N, K = 81, 200, 717  # ragged: tiles of unequal height, a panel and a segment in part
# Heights of tiles; one and two panels or segments at once; products of few and of many rows.
ROWS = (1, 2, 6, 7, 8, 14, 15, 16, 17, 29, 33, 48, 49, 64, 65)


Pair = tuple[torch.Tensor, torch.Tensor]


def operands(
    m: int = M, n: int = N, k: int = K
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    a = torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]
    (data, scale), b = ops.quantize_1x128(a), ops.quantize_128x128(torch.randn(n, k))
    return data, scale, *b


def rows_of(a: torch.Tensor, a_scale: torch.Tensor, begin: int, end: int) -> Pair:
    return ops.restore_layout(a[begin:end], a_scale[begin:end])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", ROWS)
def test_a_row_does_not_depend_on_its_neighbors(count: int) -> None:
    a, a_scale, b, b_scale = operands()
    whole = ops.fp8_gemm_nt(a, a_scale, b, b_scale, out_dtype=torch.float32)
    for begin in (0, 5, M - count):
        some = rows_of(a, a_scale, begin, begin + count)
        part = ops.fp8_gemm_nt(*some, b, b_scale, out_dtype=torch.float32)
        assert torch.equal(part, whole[begin : begin + count])


def test_a_row_of_a_large_product_is_that_of_a_small_one() -> None:
    a, a_scale, b, b_scale = operands(1100, 300, 4100)  # several blocks of rows and chunks of K
    whole = ops.fp8_gemm_nt(a, a_scale, b, b_scale, out_dtype=torch.float32)
    for row in (0, 511, 512, 1099):
        some = rows_of(a, a_scale, row, row + 1)
        part = ops.fp8_gemm_nt(*some, b, b_scale, out_dtype=torch.float32)
        assert torch.equal(part[0], whole[row])
    some = rows_of(a, a_scale, 490, 530)  # several tiles of a product of few rows
    part = ops.fp8_gemm_nt(*some, b, b_scale, out_dtype=torch.float32)
    assert torch.equal(part, whole[490:530])


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("rows", [1, M, 700])
def test_threads_change_no_bit(rows: int, count: int, threads) -> None:
    a, a_scale, b, b_scale = operands(rows, 8000)  # even one row is worth several threads
    results = []
    for number in (1, count):
        threads(number)
        results.append(ops.fp8_gemm_nt(a, a_scale, b, b_scale, out_dtype=torch.float32))
    assert torch.equal(*results)


def test_groups_give_the_bits_of_single_products() -> None:
    a, a_scale, _, _ = operands()
    b = torch.randn(3, N, K)
    quantized = [ops.quantize_128x128(matrix) for matrix in b]
    stacked = ops.restore_layout(
        torch.stack([data for data, _ in quantized]), torch.stack([scale for _, scale in quantized])
    )
    offsets = torch.tensor([20, 20, M], dtype=torch.int32)
    grouped = ops.m_grouped_fp8_gemm_nt_contiguous(
        a, a_scale, *stacked, offsets, out_dtype=torch.float32
    )
    for group, (begin, end) in enumerate([(0, 20), (20, 20), (20, M)]):
        some = rows_of(a, a_scale, begin, end)
        alone = ops.fp8_gemm_nt(*some, *quantized[group], out_dtype=torch.float32)
        assert torch.equal(alone, grouped[begin:end])


def test_python_threads_may_multiply_at_once() -> None:
    a, a_scale, b, b_scale = operands(300, 1000)
    expected = ops.fp8_gemm_nt(a, a_scale, b, b_scale)
    wrong: list[int] = []

    def multiply(index: int) -> None:
        for _ in range(20):
            if not torch.equal(ops.fp8_gemm_nt(a, a_scale, b, b_scale), expected):
                wrong.append(index)

    workers = [threading.Thread(target=multiply, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_nothing_of_a_weight_is_kept() -> None:
    a, a_scale, b, b_scale = operands(4)
    first = ops.fp8_gemm_nt(a, a_scale, b, b_scale)
    b.view(torch.uint8).bitwise_xor_(0x80)  # negates every weight in place
    assert torch.equal(ops.fp8_gemm_nt(a, a_scale, b, b_scale), -first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_wide_rows_do_not_depend_on_their_neighbors(dtype: torch.dtype) -> None:
    _, _, b, b_scale = operands()
    x = torch.randn(M, K).to(dtype)
    whole = torchext.ops.fp8_linear(x, b, b_scale)
    for row in (0, 17, M - 1):
        assert torch.equal(torchext.ops.fp8_linear(x[row], b, b_scale), whole[row])
