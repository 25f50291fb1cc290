"""Arguments of a simulated launch: Python numbers, and .ptx and .cu files in their usual forms."""

import contextlib
import ctypes
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from support.kernels import SCALE
from support.opcodes import HEADER
from torchext import sim
from torchext.sim.__main__ import main as command_line
from torchext.sim.ptx_file import read_ptx


# Launches a kernel that stores the bytes of its parameter, and returns them.
def echo(parameter: str, value, size: int) -> bytes:
    words = "\n".join(
        f"ld.param.u8 %h1, [value+{i}];\nst.global.u8 [%rd1+{i}], %h1;" for i in range(size)
    )
    module = sim.Module(
        HEADER.format(target="sm_90a")
        + f".visible .entry k(.param .u64 out, .param {parameter})\n{{\n"
        + ".reg .b16 %h<2>;\n.reg .b64 %rd<2>;\nld.param.u64 %rd1, [out];\n"
        + words
        + "\nret;\n}\n"
    )
    out = np.zeros(size, np.uint8)
    report = module.launch("k", grid=1, block=1, args=[sim.output(out), value])
    assert report.ok, str(report)
    return out.tobytes()


@pytest.mark.parametrize(
    "type, value, expected",
    [
        ("u32", 5, struct.pack("<I", 5)),
        ("u32", -1, struct.pack("<i", -1)),  # nvcc declares int as .u32
        ("u32", 2**32 - 1, struct.pack("<I", 2**32 - 1)),
        ("s32", -(2**31), struct.pack("<i", -(2**31))),
        ("b32", 2**31, struct.pack("<I", 2**31)),
        ("u64", 2**64 - 1, b"\xff" * 8),
        ("u64", -(2**63), struct.pack("<q", -(2**63))),
        ("s64", 2**63 - 1, struct.pack("<q", 2**63 - 1)),
        ("b64", 1, struct.pack("<q", 1)),
        ("u16", 65535, b"\xff\xff"),
        ("s16", -2, struct.pack("<h", -2)),
        ("u8", 255, b"\xff"),
        ("s8", -128, b"\x80"),
        ("u8", True, b"\x01"),
        ("u32", False, bytes(4)),
        ("f32", 0.1, struct.pack("<f", 0.1)),
        ("f32", 3, struct.pack("<f", 3)),
        ("f32", float("inf"), struct.pack("<f", float("inf"))),
        ("f32", -0.0, struct.pack("<f", -0.0)),
        ("f32", 1e-46, bytes(4)),
        ("f64", 0.1, struct.pack("<d", 0.1)),
        ("f64", 2**53, struct.pack("<d", 2.0**53)),
        ("f16", 0.5, struct.pack("<e", 0.5)),
        ("u32", np.int32(-7), struct.pack("<i", -7)),
        ("f32", ctypes.c_float(2), struct.pack("<f", 2)),
        ("u64", np.uint64(9), struct.pack("<q", 9)),
        ("u64 .ptr .global .align 1", np.uint64(9), struct.pack("<q", 9)),
    ],
    ids=str,
)
def test_numbers_take_the_type_of_the_parameter(type, value, expected):
    assert echo(f".{type} value", value, len(expected)) == expected


@pytest.mark.parametrize(
    "parameter, value, error, message",
    [
        (".u32 value", 2**32, ValueError, r"u32, -2147483648 to 4294967295 \(got 4294967296"),
        (".u32 value", -(2**31) - 1, ValueError, "in the range of u32"),
        (".s32 value", 2**31, ValueError, r"range of s32, -2147483648 to 2147483647 \("),
        (".u8 value", 256, ValueError, "in the range of u8"),
        (".u64 value", 2**64, ValueError, "in the range of u64"),
        (".u32 value", 1.0, TypeError, r"must be an integer of type u32 \(got the float 1.0\)"),
        (".u64 value", float("nan"), TypeError, "must be an integer of type u64"),
        (".f32 value", 1e39, ValueError, r"range of f32 \(got 1e\+39\)"),
        (".f16 value", 65520.0, ValueError, "in the range of f16"),
        (".f32 value", 2**24 + 1, ValueError, r"int that f32 holds exactly \(got 16777217\)"),
        (".f64 value", 10**400, ValueError, "in the range of f64"),
        (".f32 value", True, TypeError, r"a number of type f32 \(got the bool True\)"),
        (".u64 .ptr .align 1 value", 0, TypeError, r"must be a pointer: .* \(got the Python int 0"),
        (".u64 .ptr .global .align 4 value", 1.0, TypeError, "must be a pointer"),
        (".align 4 .b8 value[4]", 1, TypeError, "an array of 4 bytes .*; pass sim.struct"),
        (".align 8 .b8 value[8]", 1.0, TypeError, r"sim.struct\(np.float32\(0.5\)"),
        (".u32 value", None, TypeError, r"a number, .* \(got NoneType"),
        (".u32 value", 1 + 2j, TypeError, "got complex"),
        (".u32 value", "5", TypeError, "got str"),
        (".u32 value", np.int64(5), ValueError, r"must have 4 bytes, .* value \(got 8\)"),
        (".u32 value", np.zeros(1), ValueError, r"must have 4 bytes, .* value \(got 8\)"),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_do_not_fit_are_refused(parameter, value, error, message):
    with pytest.raises(error, match=message) as raised:
        echo(parameter, value, 4)
    assert "torchext.sim.Module.launch of k: argument 1" in str(raised.value)


def test_members_of_a_struct_need_a_type():
    with pytest.raises(TypeError, match=r"sim.struct: member 1 must be a value with a C type"):
        sim.struct(np.zeros(4), 5)
    assert echo(".align 4 .b8 value[8]", sim.struct(np.int32(5), np.float32(1)), 8) == struct.pack(
        "<if", 5, 1
    )


# ---- files --------------------------------------------------------------------------------------


def launches(module):
    x, y = np.ones(4, np.float32), np.zeros(4, np.float32)
    return module.launch("scale", grid=1, block=32, args=[x, y, 2, 4]).ok and (y == 2).all()


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + SCALE.encode(),
        SCALE.replace("\n", "\r\n").encode(),
        ("// caf\u00e9\n" + SCALE).encode(),
        b"// caf\xe9 in Latin-1\n" + SCALE.encode(),
        SCALE.encode() + b"\n\f\n",
    ],
    ids=["byte-order mark", "CRLF", "UTF-8", "Latin-1", "form feed"],
)
def test_files_as_editors_leave_them(tmp_path, data):
    path = tmp_path / "scale.ptx"
    path.write_bytes(data)
    # ptxas 13.0: "Unexpected non-ASCII character encountered on line 1"
    warned: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if not data.isascii():
        warned = pytest.warns(UserWarning, match=r"scale\.ptx:1: .* ptxas refuses the file")
    with warned:
        assert launches(sim.Module(path)) and launches(sim.Module(str(path)))


def test_text_with_a_byte_order_mark():
    with pytest.warns(UserWarning, match="<ptx>:1: PTX must be ASCII text"):
        assert launches(sim.Module("\ufeff" + SCALE))


@pytest.mark.parametrize(
    "data, message",
    [
        (SCALE.encode("utf-16"), r"UTF-16 text\); save it as UTF-8"),
        (SCALE.encode("utf-16-be"), "byte 0x00, which no text has, at offset 0"),
        (b"\x7fELF\x02\x01" + bytes(99), "an ELF file .* pass the PTX itself"),
        (b"\x50\xed\x55\xba" + bytes(99), "a fatbin"),
        (SCALE.encode() + b"\x00", "which no text has"),
        (gzip.compress(SCALE.encode())[:-9], "got damaged gzip data"),
        (gzip.compress(b"\x7fELF"), "an ELF file"),
        (b"\n \n", "got an empty file"),
        (b"", "got an empty file"),
        (b"__global__ void k() {}\n", ""),
    ],
    ids=[
        "UTF-16",
        "UTF-16 without a mark",
        "cubin",
        "fatbin",
        "zero",
        "half of a gzip file",
        "gzip of a cubin",
        "blank",
        "empty",
        "CUDA",
    ],
)
def test_files_that_are_no_ptx_are_named(tmp_path, capsys, data, message):
    path = tmp_path / "kernel.ptx"
    path.write_bytes(data)
    with pytest.raises(sim.PtxError, match=rf"kernel\.ptx.*{message}"):
        sim.Module(path)
    assert command_line([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("torchext.sim: ") and "kernel.ptx" in error


def test_ptx_may_be_compressed(tmp_path, capsys):
    path = tmp_path / "scale.ptx.gz"
    path.write_bytes(gzip.compress(SCALE.encode()))
    assert [k.name for k in sim.Module(path).kernels()] == [
        k.name for k in sim.Module(SCALE).kernels()
    ]
    assert command_line([str(path)]) == 0
    assert "scale" in capsys.readouterr().out


def test_paths_that_cannot_be_read_are_named(tmp_path, capsys):
    for path, error, message in (
        (tmp_path / "none.ptx", FileNotFoundError, "there is no such file"),
        (tmp_path, IsADirectoryError, "is a folder"),
    ):
        with pytest.raises(error, match=message) as raised:
            sim.Module(path)
        assert str(path) in str(raised.value)
    assert command_line([str(tmp_path / "none.ptx")]) == 2
    assert "none.ptx" in capsys.readouterr().err


def test_a_missing_cuda_file_is_named_before_nvcc_starts(tmp_path, monkeypatch, capsys):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho started >&2\nexit 3\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"must be a CUDA file .*none\.cu', which does not exist"
    ):
        sim.compile_cuda(tmp_path / "none.cu")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        sim.compile_cuda(tmp_path)
    assert command_line([str(tmp_path / "none.cu")]) == 2
    assert "none.cu" in capsys.readouterr().err


def test_ptx_files_of_ops_may_have_a_byte_order_mark(tmp_path):
    import torchext

    files = [Path(file) for file in sim.ops._kernels(90)]
    build = next((file for file in files if "quantize_1x128_f32_e4m3(" in read_ptx(file)), None)
    if build is None:
        pytest.skip("this build has no PTX")
    path = tmp_path / "quantize.ptx"
    path.write_bytes(b"\xef\xbb\xbf" + read_ptx(build).encode())
    with sim.simulate(ptx=[path]) as simulation:
        torchext.ops.quantize_1x128(torch.ones(4, 128))
    assert simulation.reports and simulation.reports[0].ok
