"""The hash of a weight's bytes: every bit and position counts, the number of threads does not."""

from __future__ import annotations

import pytest
import torch

from torchext.nn.weight_cache import _content_hash


def hash_of(tensor: torch.Tensor) -> int:
    return _content_hash(tensor.data_ptr(), tensor.nbytes)


@pytest.mark.parametrize("size", [1, 7, 8, 4095, 4096, 4097, 20_000])
def test_each_bit_counts(size):
    data = torch.randint(256, (size,), dtype=torch.uint8)
    seen = {hash_of(data)}
    places = range(size) if size <= 8 else torch.randint(size, (40,)).tolist()
    flips = [(place, bit) for place in {*places, 0, size - 1} for bit in range(8)]
    for place, bit in flips:
        data[place] ^= 1 << bit
        seen.add(hash_of(data))
        data[place] ^= 1 << bit
    assert len(seen) == 1 + len(flips)
    assert hash_of(data) in seen


def test_lengths_and_zeros_count():
    zeros = torch.zeros(20_000, dtype=torch.uint8)
    lengths = [1, 2, 8, 16, 4095, 4096, 4097, 8192, 20_000]
    assert len({hash_of(zeros[:length]) for length in lengths}) == len(lengths)


@pytest.mark.parametrize("value", [0.0, 1.0], ids=str)
def test_order_and_sign_count_where_values_are_few(value):
    # A hash that is linear in positions would miss changes such as +d, -2d, +d, or xyyx to yxxy.
    seen, n = set(), 0
    for pattern in ((1, -1), (1, -2, 1), (1, -1, -1, 1), (1, -3, 3, -1)):
        for step in (1, 2, 4, 512, 1024, 2048):
            for sign in (1, -1):
                for start in range(0, 64, 3):
                    x = torch.full((16_384,), value)
                    bits = x.view(torch.int32)
                    for i, factor in enumerate(pattern):
                        bits[start + i * step] += sign * factor
                    seen.add(hash_of(x))
                    n += 1
    assert len(seen) == n


def test_hash_does_not_depend_on_threads():
    data = torch.randint(256, ((3 << 20) + 5,), dtype=torch.uint8)
    threads = torch.get_num_threads()
    seen = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        seen.add(hash_of(data))
    torch.set_num_threads(threads)
    assert len(seen) == 1
    data[1 << 20], data[2 << 20] = data[2 << 20] + 1, data[1 << 20]
    assert hash_of(data) not in seen
