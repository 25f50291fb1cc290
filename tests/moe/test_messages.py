"""Messages between ranks: what they carry, rows of no token or choice, errors.

tests/test_catalog.py compares the ops with their references.
"""

from __future__ import annotations

import pytest
import torch

from support.op_testing import assert_same
from torchext import ops
from torchext._catalog.moe import ids_of, slots_of, weights_of
from torchext.ops.moe_messages import MessageLayout


def row_numbers(tokens, ranks=1):
    return torch.arange(tokens * ranks, dtype=torch.int32).view(tokens, ranks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_message_gives_the_rows_that_permuting_gives(dtype, fp8, device):
    x, ids = torch.randn(50, 700).to(device, dtype), ids_of(50, 3, 6).to(device)
    x[3, 5], x[4, 6] = torch.nan, torch.inf
    slots, offsets = ops.moe_route(ids, 6)
    count = int(offsets[-1])
    slots = torch.where(slots < count, slots, -1)
    weights = weights_of(50, 3).to(device)
    numbers = row_numbers(50).to(device)
    message = ops.moe_pack_1x128(x, numbers, ids, weights, dtype=fp8)
    data, scale, weight = ops.moe_unpack_1x128(message, slots, offsets, 700, count, dtype=fp8)
    assert_same((data, scale), ops.moe_permute_quantize_1x128(x, slots, count, dtype=fp8))
    expected = torch.empty(count, device=device)
    expected[slots[slots >= 0].long()] = weights[slots >= 0]
    assert torch.equal(weight, expected)


def test_a_token_is_the_same_in_all_of_its_rows(device):
    x, slots = torch.randn(20, 300).to(device), slots_of(20, 3).to(device)
    message = ops.moe_pack_1x128(x, slots)
    once = ops.moe_pack_1x128(x, row_numbers(20).to(device))
    for rank in range(3):
        assert torch.equal(message[slots[:, rank].long()], once)


def test_the_header(device):
    x, ids, weights = torch.randn(20, 300), ids_of(20, 3, 6), weights_of(20, 3)
    layout = MessageLayout.of(300, 3)
    assert layout == (304, 316, 328, 352)
    numbers = row_numbers(20).to(device)
    message = ops.moe_pack_1x128(x.to(device), numbers, ids.to(device), weights.to(device)).cpu()
    assert torch.equal(message[:, layout.ids : layout.weights].view(torch.int32), ids.int())
    sent = message[:, layout.weights : layout.weights + 12].view(torch.float32)
    assert torch.equal(sent, weights)
    assert not message[:, 300:304].any() and not message[:, 340:].any()


def test_rows_of_no_token_choose_nothing(device):
    x, ids, weights = torch.randn(3, 200), ids_of(3, 2, 6), weights_of(3, 2)
    slots = torch.tensor([[4, -1], [-5, 0], [2, 5]], dtype=torch.int32)
    header = ids.to(device), weights.to(device)
    message = ops.moe_pack_1x128(x.to(device), slots.to(device), *header, 7).cpu()
    layout = MessageLayout.of(200, 2)
    sent = message[:, layout.ids : layout.weights].view(torch.int32)
    for row, token in enumerate((1, None, 2, None, 0, 2, None)):
        expected = [-1, -1] if token is None else ids[token].tolist()
        assert sent[row].tolist() == expected


def test_rows_of_no_choice_are_zeros(device):
    x, numbers = torch.randn(6, 200).to(device), row_numbers(6).to(device)
    message = ops.moe_pack_1x128(x, numbers)
    slots = torch.tensor([[2], [-1], [0], [-7], [1], [-1]], dtype=torch.int32, device=device)
    offsets = torch.tensor([1, 3], dtype=torch.int32, device=device)
    data, scale, weight = ops.moe_unpack_1x128(message, slots, offsets, 200, 9, header=False)
    assert not data[3:].float().any()
    assert scale[3:].eq(1).all()
    assert weight.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert_same(
        (data[:3].clone(), scale[:3].clone()),
        tuple(t.clone() for t in ops.quantize_1x128(x[[2, 4, 0]])),
    )


@pytest.mark.parametrize("num_sms", [1, 3])
def test_num_sms_changes_no_bit(num_sms, device):
    x, slots = torch.randn(700, 520).bfloat16().to(device), slots_of(700, 2).to(device)
    ids, weights = ids_of(700, 4, 20).to(device), weights_of(700, 4).to(device)
    message = ops.moe_pack_1x128(x, slots, ids, weights)
    assert torch.equal(ops.moe_pack_1x128(x, slots, ids, weights, num_sms=num_sms), message)
    numbers = row_numbers(1400).to(device)
    offsets = torch.tensor([1400], dtype=torch.int32, device=device)
    given = message, numbers, offsets, 520
    headers = ops.moe_pack_1x128(x, slots)
    assert_same(
        ops.moe_unpack_1x128(headers, *given[1:], header=False, num_sms=num_sms),
        ops.moe_unpack_1x128(headers, *given[1:], header=False),
    )


def test_large_results_are_the_same(device):
    """On the CPU, results of 16 MiB and more bypass the cache."""
    if device != "cpu":
        pytest.skip("the size matters to the CPU kernels only")
    x, slots = torch.randn(1100, 2048).bfloat16(), slots_of(1100, 8)
    message = ops.moe_pack_1x128(x, row_numbers(1100))
    offsets = torch.tensor([8800], dtype=torch.int32)
    data, scale, _ = ops.moe_unpack_1x128(message, slots, offsets, 2048, header=False)
    assert_same((data, scale), ops.moe_permute_quantize_1x128(x, slots))


X = torch.randn(4, 200)
SLOTS = row_numbers(4)
IDS, WEIGHTS = ids_of(4, 2, 6), weights_of(4, 2)
MESSAGE = torch.zeros(4, 224, dtype=torch.uint8)
ROWS, OFFSETS = torch.arange(8, dtype=torch.int32).view(4, 2), torch.tensor([8]).int()


def unpack(message=MESSAGE, slots=ROWS, offsets=OFFSETS, columns=200, rows=None):
    return ops.moe_unpack_1x128(message, slots, offsets, columns, rows, header=False)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: ops.moe_pack_1x128(X[0], SLOTS), ValueError, r"x must have shape \[T, K\]"),
        (lambda: ops.moe_pack_1x128(X.double(), SLOTS), TypeError, "x must be torch.bfloat16,"),
        (lambda: ops.moe_pack_1x128(X, SLOTS[:3]), ValueError, "slots must have shape .* T = 4"),
        (lambda: ops.moe_pack_1x128(X, SLOTS, rows=3), ValueError, "below the number of rows, 3"),
        (lambda: ops.moe_pack_1x128(X, SLOTS, IDS), ValueError, "must be given together"),
        (
            lambda: ops.moe_pack_1x128(X, SLOTS, weights=WEIGHTS),
            ValueError,
            r"got weights alone\)",
        ),
        (
            lambda: ops.moe_pack_1x128(X, SLOTS, IDS.float(), WEIGHTS),
            TypeError,
            "ids must be torch.int64 or",
        ),
        (
            lambda: ops.moe_pack_1x128(X, SLOTS, IDS[:3], WEIGHTS[:3]),
            ValueError,
            "ids must have shape .* T = 4",
        ),
        (
            lambda: ops.moe_pack_1x128(X, SLOTS, IDS, WEIGHTS.double()),
            TypeError,
            "weights must be torch.float32",
        ),
        (
            lambda: ops.moe_pack_1x128(X, SLOTS, IDS, WEIGHTS[:, :1]),
            ValueError,
            "weights must have the shape of ids",
        ),
        (lambda: ops.moe_pack_1x128(X, SLOTS, dtype=torch.int8), TypeError, "dtype must be"),
        (lambda: ops.moe_pack_1x128(X, SLOTS, num_sms=-1), ValueError, "num_sms must be"),
        (lambda: unpack(MESSAGE.float()), TypeError, "message must be torch.uint8"),
        (lambda: unpack(MESSAGE[0]), ValueError, r"message must have shape \[M, pitch\]"),
        (lambda: unpack(columns=300), ValueError, "must have 320 bytes in a row, for 300 columns"),
        (lambda: unpack(columns=-1), ValueError, "columns must be those"),
        (
            lambda: unpack(torch.zeros(4, 225, dtype=torch.uint8)[:, 1:]),
            ValueError,
            "contiguous rows that start at multiples of 16",
        ),
        (lambda: unpack(slots=ROWS[:2]), ValueError, "slots must have shape .* T = 4"),
        (lambda: unpack(slots=ROWS.long()), TypeError, "slots must be torch.int32"),
        (lambda: unpack(rows=7), ValueError, "below the number of rows, 7"),
        (lambda: unpack(offsets=OFFSETS.long()), TypeError, "offsets must be torch.int32"),
        (lambda: unpack(offsets=OFFSETS[:0]), ValueError, r"offsets must have shape \[E\]"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
