"""Tensor maps: every rule of cuTensorMapEncodeTiled, and the addresses of a box."""

from typing import Any

import numpy as np
import pytest

from torchext import _sim

U8, U16, F16, F32, F64, BF16 = 0, 1, 6, 7, 8, 9
SIZE = {U8: 1, U16: 2, F16: 2, F32: 4, F64: 8, BF16: 2}


def encode(**changes):
    """Encodes a legal map of a 100 x 64 x 3 tensor of f16, with `changes` to the arguments."""
    arguments: dict[str, Any] = dict(
        data_type=F16, global_address=0x10000, global_dim=[100, 64, 3],
        global_strides=[208, 208 * 64], box_dim=[64, 32, 1], element_strides=[1, 1, 1],
        swizzle=3,
    )  # fmt: skip
    arguments.update(changes)
    return _sim.encode_tensor_map(**arguments)


def test_fields_survive_the_128_bytes():
    arguments: dict[str, Any] = dict(
        data_type=BF16, global_address=0x7FFFFFFFFFF0, global_dim=[1 << 32, 1, 7, 5, 9],
        global_strides=[16, (1 << 40) - 16, 32, 0], box_dim=[8, 256, 1, 2, 3],
        element_strides=[1, 8, 2, 3, 4], swizzle=1, l2_promotion=3, oob_fill=1,
    )  # fmt: skip
    packed = _sim.encode_tensor_map(**arguments)
    assert len(packed) == 128
    fields = _sim.decode_tensor_map(packed)
    assert {name: fields[name] for name in arguments} == arguments
    assert fields["box_bytes"] == 2 * 8 * 32 * 1 * 1 * 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(global_address=0x10008), r"globalAddress must be aligned to 16 bytes \(got 65544\)"),
        (dict(global_dim=[100, 0, 3]), r"globalDim\[1\] must be 1 to 2\^32 \(got 0\)"),
        (dict(global_dim=[(1 << 32) + 1, 64, 3]), r"globalDim\[0\] must be 1 to 2\^32"),
        (dict(global_strides=[200, 208 * 64]), r"globalStrides\[0\] must be a multiple of 16"),
        (dict(global_strides=[208, 1 << 40]), r"globalStrides\[1\] must be less than 2\^40"),
        (dict(box_dim=[64, 0, 1]), r"boxDim\[1\] must be 1 to 256 \(got 0\)"),
        (dict(box_dim=[64, 257, 1]), r"boxDim\[1\] must be 1 to 256 \(got 257\)"),
        (dict(box_dim=[63, 32, 1]), r"boxDim\[0\] times the element size must be a multiple of 16"),
        (dict(box_dim=[72, 32, 1]), r"must not exceed the swizzle span of 128 bytes \(got 144\)"),
        (dict(box_dim=[64, 32, 1], swizzle=2), r"the swizzle span of 64 bytes \(got 128\)"),
        (dict(box_dim=[32, 32, 1], swizzle=1), r"the swizzle span of 32 bytes \(got 64\)"),
        (dict(element_strides=[1, 9, 1]), r"elementStrides\[1\] must be 1 to 8 \(got 9\)"),
        (dict(element_strides=[0, 1, 1]), r"elementStrides\[0\] must be 1 to 8 \(got 0\)"),
        (dict(interleave=1), r"interleave must be NONE"),
        (dict(interleave=3), r"interleave must be a CUtensorMapInterleave"),
        (dict(swizzle=4), r"swizzle must be 0 to 3 .* need sm_100"),
        (dict(l2_promotion=4), r"l2Promotion must be"),
        (dict(oob_fill=2), r"oobFill must be"),
        (dict(data_type=13), r"tensorDataType must be 0 to 12 .* need sm_100"),
        (dict(data_type=U16, oob_fill=1), r"DataType must be floating-point for oobFill NAN_"),
        (dict(global_dim=[1] * 6, global_strides=[16] * 5, box_dim=[8] * 6,
              element_strides=[1] * 6), r"tensorRank must be 1 to 5 \(got 6\)"),
        (dict(global_dim=[], global_strides=[], box_dim=[], element_strides=[]),
         r"tensorRank must be 1 to 5 \(got 0\)"),
    ],
)  # fmt: skip
def test_rules(changes, message):
    encode()
    with pytest.raises(_sim.TensorMapError, match=message):
        encode(**changes)


def test_other_bytes_are_no_tensor_map():
    with pytest.raises(_sim.TensorMapError, match="__grid_constant__"):
        _sim.decode_tensor_map(bytes(128))


def test_replacing_every_field_makes_a_map_from_zeros():
    """Triton makes descriptors on the device this way: zero 128 bytes, then tensormap.replace."""
    packed = bytes(128)
    writes = [
        ("global_address", 0, 0x20000),
        ("rank", 0, 1),
        ("elemtype", 0, 0xA),
        ("interleave_layout", 0, 0),
        ("swizzle_mode", 0, 2),
        ("fill_mode", 0, 1),
    ]
    for d in range(2):
        writes += [("box_dim", d, 32 >> d), ("global_dim", d, 100 + d), ("element_stride", d, 1)]
    writes.append(("global_stride", 0, 208))
    for field, ordinal, value in writes:
        packed = _sim.replace_tensor_map_field(packed, field, ordinal, value)
    assert packed == _sim.encode_tensor_map(
        BF16, 0x20000, [100, 101], [208], [32, 16], [1, 1], swizzle=2, oob_fill=1
    )
    with pytest.raises(_sim.TensorMapError, match=r"boxDim\[0\] must be 1 to 256 \(got 300\)"):
        _sim.decode_tensor_map(_sim.replace_tensor_map_field(packed, "box_dim", 0, 300))
    for field, ordinal, value, message in [
        ("rank", 0, 5, "tensorRank - 1 must be less than 5"),
        ("elemtype", 0, 13, "elemtype must be less than 13"),
        ("swizzle_mode", 0, 4, "swizzle must be less than 4"),
        ("global_stride", 4, 16, r"the ordinal of tensormap.replace must be less than 4 \(got 4\)"),
    ]:
        with pytest.raises(_sim.TensorMapError, match=message):
            _sim.replace_tensor_map_field(packed, field, ordinal, value)
    with pytest.raises(_sim.TensorMapError, match="__grid_constant__"):
        _sim.replace_tensor_map_field(b"?" * 128, "rank", 0, 1)


def expected_image(tensor, corner, box, element_strides, span):
    """The box by index arithmetic, in C order: {offset in shared memory: value of that byte}.

    The swizzle follows the drawings of the PTX ISA: in every 128-byte line, chunk j moves to
    j XOR (the line's number modulo 8, 4 or 2).
    """
    element = tensor.dtype.itemsize
    counts = [box[0]] + [-(-b // s) for b, s in zip(box[1:], element_strides[1:], strict=True)]
    steps = [1, *element_strides[1:]]
    image = {}
    pitch = box[0] * element if span == 16 else span
    for row, index in enumerate(np.ndindex(*counts[:0:-1])):
        for i in range(counts[0]):
            offsets = (i, *index[::-1])
            at = [c + o * s for c, o, s in zip(corner, offsets, steps, strict=True)]
            inside = all(0 <= x < n for x, n in zip(at, tensor.shape[::-1], strict=True))
            raw = tensor[tuple(at[::-1])].tobytes() if inside else [None] * element
            for byte in range(element):
                offset = row * pitch + i * element + byte
                line, chunk = offset // 128, offset // 16 % 8
                chunk ^= line % (span // 16) if span > 16 else 0
                where = line * 128 + chunk * 16 + offset % 16
                image[where] = raw[byte]
    return image


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("data_type, dtype", [(U8, np.uint8), (F16, np.uint16), (F32, np.uint32)])
def test_boxes(rank, swizzle, data_type, dtype):
    rng = np.random.default_rng(rank * 100 + swizzle * 10 + data_type)
    element = SIZE[data_type]
    span = 16 << swizzle
    for _ in range(6):
        inner = int(rng.integers(1, span // 16 + 1 if swizzle else 5)) * 16 // element
        box = [inner] + [int(x) for x in rng.integers(1, 5, rank - 1)]
        shape = [int(x) for x in rng.integers(1, 9, rank)]
        shape[-1] = int(rng.integers(1, 40))
        element_strides = [1] + [int(x) for x in rng.integers(1, 4, rank - 1)]
        padded = [*shape[:-1], -(-shape[-1] * element // 16) * 16 // element]
        store = rng.integers(0, 256, int(np.prod(padded)) * element, dtype=np.uint8).view(dtype)
        store = store.reshape(padded)
        tensor = store[..., : shape[-1]]
        base = 0x40000
        packed = _sim.encode_tensor_map(
            data_type, base, tensor.shape[::-1], store.strides[-2::-1], box, element_strides,
            swizzle=swizzle,
        )  # fmt: skip
        corner = [int(rng.integers(-inner, shape[-1] + 2))]
        corner += [int(rng.integers(-2, n + 2)) for n in shape[-2::-1]]

        memory = store.tobytes()
        image = {}
        total = 0
        shared = 0x2000
        for address, count, source in _sim.box_runs(packed, corner, shared):
            total += count
            for i in range(count):
                assert address - shared + i not in image, "two runs write one byte"
                image[address - shared + i] = None if source is None else memory[source - base + i]
        fields = _sim.decode_tensor_map(packed)
        assert total == fields["box_bytes"]
        assert max(image) < fields["box_span_bytes"] or swizzle
        assert image == expected_image(tensor, corner, box, element_strides, span)


def test_the_swizzle_follows_the_address_not_the_box():
    """A box that begins 256 bytes into the 1024-byte pattern starts with line 2's permutation."""
    packed = encode(box_dim=[64, 2, 1])
    chunks = [address for address, _, _ in _sim.box_runs(packed, [0, 0, 0], 1024 + 256)]
    assert chunks[:3] == [1280 + 32, 1280 + 48, 1280]
    assert chunks[8:10] == [1408 + 48, 1408 + 32]


def test_whole_chunks_move_at_once():
    swizzled = _sim.box_runs(encode(), [0, 0, 0], 0)
    assert {count for _, count, _ in swizzled} == {16} and len(swizzled) == 8 * 32
    plain = _sim.box_runs(encode(swizzle=0), [0, 0, 0], 0)
    assert {count for _, count, _ in plain} == {128} and len(plain) == 32


def test_out_of_bounds_fill():
    assert _sim.oob_fill(encode(), 6) == bytes(6)
    nan = np.frombuffer(_sim.oob_fill(encode(oob_fill=1), 6), np.float16)
    assert np.isnan(nan).all()
    for data_type, dtype in ((F32, np.float32), (F64, np.float64)):
        filled = _sim.oob_fill(encode(data_type=data_type, box_dim=[8, 8, 1], oob_fill=1), 16)
        assert np.isnan(np.frombuffer(filled, dtype)).all()


def test_random_arguments_are_encoded_or_refused():
    """Whatever the arguments, the result is a map that decodes to them, or a TensorMapError."""
    rng = np.random.default_rng(0)

    def pick(*good_and_bad):
        return int(good_and_bad[rng.integers(len(good_and_bad))])

    encoded = refused = 0
    for _ in range(20000):
        rank = pick(1, 2, 2, 3, 4, 5, 0, 6)
        arguments: dict[str, Any] = dict(
            data_type=pick(*range(13), -1, 15), global_address=pick(0, 16, 1 << 47, 24, 2**64 - 16),
            global_dim=[pick(1, 100, 1 << 32, 1 << 20, 77, 5, 0) for _ in range(rank)],
            global_strides=[pick(0, 16, 128, 4096, 1 << 20, 8, 1 << 40) for _ in range(rank - 1)],
            box_dim=[pick(16, 32, 64, 16, 8, 1 if i else 16, 257) for i in range(rank)],
            element_strides=[pick(*[1] * 12, 8, 9) for _ in range(rank)],
            interleave=pick(*[0] * 12, 1, 7), swizzle=pick(0, 0, 1, 2, 3, 3, 4, -1),
            l2_promotion=pick(0, 1, 2, 3, 4), oob_fill=pick(*[0] * 6, 1, 2),
        )  # fmt: skip
        try:
            packed = _sim.encode_tensor_map(**arguments)
        except _sim.TensorMapError:
            refused += 1
            continue
        encoded += 1
        fields = _sim.decode_tensor_map(packed)
        assert {name: fields[name] for name in arguments} == arguments
        if fields["box_span_bytes"] <= 1 << 14:
            corner = [pick(-(2**31), -1, 0, 1, 50, 2**31 - 1) for _ in range(rank)]
            runs = _sim.box_runs(packed, corner, 0)
            assert sum(count for _, count, _ in runs) == fields["box_bytes"]
    assert encoded > 200 and refused > 200
