"""Device variables that the host reads and writes, and what they keep between launches."""

import re

import numpy as np
import pytest
import torch

from support.ptx_texts import run, text_of
from torchext import sim

BEFORE = """
.visible .const .align 4 .f32 scale[2] = {1.5, 2.0};
.visible .global .align 4 .u32 counter;
.visible .global .align 8 .b8 config[16];
.visible .global .v4 .s16 vectors[2];
.visible .global .align 4 .u32 table[2][3] = {{1, 2, 3}, {4}};
.visible .global .align 2 .b16 halves[2];
"""
CODE = """
ld.const.f32 %f1, [scale+4];
atom.global.add.u32 %r3, [counter], 1;
mul.wide.u32 %rd2, %r1, 4;
add.u64 %rd1, %rd1, %rd2;
st.global.f32 [%rd1], %f1;
"""


@pytest.fixture
def module():
    return sim.Module(text_of(CODE, BEFORE))


def test_variables_are_listed(module):
    found = {v.name: v for v in module.variables()}
    assert list(found) == ["scale", "counter", "config", "vectors", "table", "halves"]
    assert [v.space for v in found.values()] == ["const", *["global"] * 5]
    assert [v.shape for v in found.values()] == [(2,), (), (16,), (2, 4), (2, 3), (2,)]
    assert [v.type for v in found.values()] == ["f32", "u32", "b8", "s16", "u32", "b16"]
    assert [v.size for v in found.values()] == [8, 4, 16, 16, 24, 4]
    assert all(v.address % v.alignment == 0 for v in found.values())
    assert found["config"].alignment == 8


def test_the_host_reads_initial_values(module):
    np.testing.assert_array_equal(module.variable("scale").get(), np.array([1.5, 2], np.float32))
    np.testing.assert_array_equal(module.variable("table").get(), [[1, 2, 3], [4, 0, 0]])
    assert module.variable("counter").get().shape == () and module.variable("counter").get() == 0
    assert module.variable("table").get(np.uint64).tolist() == [1 | 2 << 32, 3 | 4 << 32, 0]


def test_the_host_fills_constant_memory(module):
    module.variable("scale").set(np.array([3, 4], np.float32))
    report, out = run(module, dtype=np.float32)
    assert report.ok, str(report)
    assert (out == 4).all()


def test_values_stay_between_launches_until_they_are_reset(module):
    counter = module.variable("counter")
    for launches in (1, 2):
        assert run(module)[0].ok
        assert counter.get() == 32 * launches
    counter.set(5)
    assert run(module)[0].ok and counter.get() == 37
    module.variable("table").set(np.zeros((2, 3), np.uint32))
    module.reset_variables()
    assert counter.get() == 0
    np.testing.assert_array_equal(module.variable("table").get(), [[1, 2, 3], [4, 0, 0]])


def test_modules_do_not_share_variables(module):
    other = sim.Module(text_of(CODE, BEFORE))
    module.variable("counter").set(9)
    assert other.variable("counter").get() == 0


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("scale", [1, 2.5], np.array([1, 2.5], np.float32)),
        ("scale", torch.tensor([5.0, 6.0]), np.array([5, 6], np.float32)),
        ("scale", np.array([7, 0, 8, 0], np.float32)[::2], np.array([7, 8], np.float32)),
        ("scale", torch.arange(4.0)[::2], np.array([0, 2], np.float32)),
        ("scale", b"\0\0\x80\x3f\0\0\0\x40", np.array([1, 2], np.float32)),
        ("counter", 4294967295, 4294967295),
        ("counter", np.int32(-1), 4294967295),
        ("counter", True, 1),
        ("config", np.array([1, 2], np.float64), np.array([1, 2], np.float64).view(np.uint8)),
        ("config", bytes(range(16)), np.arange(16)),
        ("vectors", np.arange(8, dtype=np.int16), np.arange(8).reshape(2, 4)),
        ("halves", torch.ones(2, dtype=torch.float16), [0x3C00, 0x3C00]),
        ("halves", torch.ones(2, dtype=torch.bfloat16), [0x3F80, 0x3F80]),
    ],
)
def test_set(module, name, value, expected):
    variable = module.variable(name)
    variable.set(value)
    np.testing.assert_array_equal(variable.get(), expected)


def test_set_of_a_part(module):
    table = module.variable("table")
    table.set(np.array([9, 8], np.uint32), offset=8)
    np.testing.assert_array_equal(table.get(), [[1, 2, 9], [8, 0, 0]])
    table.set(b"", offset=24)
    with pytest.raises(ValueError, match=r"24 bytes \(got 8 bytes at offset 20\)"):
        table.set(np.array([9, 8], np.uint32), offset=20)
    with pytest.raises(ValueError, match="got 8 bytes at offset -4"):
        table.set(np.array([9, 8], np.uint32), offset=-4)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        (
            "scale",
            np.array([1], np.float32),
            ValueError,
            r"must have 8 bytes \(got 4\); pass offset=",
        ),
        ("scale", np.array([1], np.float64), TypeError, r"type .f32 \(got float64\); convert them"),
        ("scale", np.array([1, 2], np.int32), TypeError, r"type .f32 \(got int32\)"),
        ("scale", torch.ones(2, dtype=torch.float16), TypeError, "got float16"),
        ("table", np.zeros(6, np.float32), TypeError, r"type .u32 \(got float32\)"),
        ("counter", 1.5, TypeError, r"type .u32 \(got float64 from float\)"),
        ("counter", "one", TypeError, "from str"),
        ("counter", -1, OverflowError, r"range of .u32 \(got -1\)"),
        ("counter", 1 << 32, OverflowError, r"range of .u32 \(got 4294967296\)"),
        ("halves", 1 << 16, OverflowError, "in the range of .b16"),
    ],
)
def test_values_that_do_not_fit(module, name, value, error, message):
    before = module.variable(name).get()
    with pytest.raises(error, match=f"torchext.sim.Variable.set of {name}: .*{message}"):
        module.variable(name).set(value)
    np.testing.assert_array_equal(module.variable(name).get(), before)


def test_an_unknown_variable_lists_the_others(module):
    with pytest.raises(ValueError, match=re.escape("has scale, counter, config")):
        module.variable("nothing")
    with pytest.raises(ValueError, match="the module has none"):
        sim.Module(text_of("")).variable("nothing")
    with pytest.raises(ValueError, match=r"divide the variable's 17 bytes \(got complex"):
        sim.Module(text_of("", ".global .b8 x[17];")).variable("x").get(np.complex64)


def test_pointers_to_variables():
    """The host puts the address of x into the variable `to`; a store through `to` reaches x."""
    before = ".visible .global .align 8 .u64 to;\n.visible .global .align 4 .u32 x[2];"
    module = sim.Module(text_of("ld.global.u64 %rd3, [to];\nst.u32 [%rd3], 7;", before))
    module.variable("to").set(module.variable("x").address + 4)
    report, _ = run(module, block=1)
    assert report.ok, str(report)
    assert module.variable("x").get().tolist() == [0, 7]


def test_constants_are_read_only_to_kernels():
    text = text_of("mov.u64 %rd3, c;\nst.global.u32 [%rd3], 1;", ".const .u32 c;")
    assert {f.kind for f in run(text, block=1)[0].findings} == {"read-only memory"}


def test_a_variable_outlives_its_module():
    variable = sim.Module(text_of(CODE, BEFORE)).variable("scale")
    assert variable.get().tolist() == [1.5, 2]
