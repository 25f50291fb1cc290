"""What the simulator knows about an opcode: its row in the table, and its instructions' traits."""

import re
from pathlib import Path

import pytest

from support.opcodes import HEADER
from torchext import _sim

ROOT = Path(__file__).resolve().parents[2]
SIMULATOR = ROOT / "ptx" / "sim"


def test_the_opcode_table_of_the_readme(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import opcode_table

    readme = opcode_table.README.read_text()
    assert opcode_table.with_table(readme) == readme, (
        "run `python tools/opcode_table.py --write` and commit ptx/sim/README.md"
    )


def test_every_row_names_its_file():
    sources = [path for path in SIMULATOR.glob("*/*.cpp") if path.parent.name != "timing"]
    files = {path.name: path.read_text() for path in sources}
    for row in _sim.opcodes():
        assert f't["{row["opcode"]}"] =' in files[row["file"]]
        assert row["classes"] and row["units"]


# An opcode's text is compared or looked up.
COMPARES = re.compile(
    r"""(?:\bopcode(?:\(\))?|\bparts\[0\]|\bopcodes\[[^\]]*\])\s*(?:==|!=|\.r?find\(|\.compare\()\s*[\w"]*
    |(?:==|!=)\s*[\w.>-]*(?:\bopcode\b|\bparts\[0\])
    |\b[\w()]+\.(?:find|count|at)\([^()]*(?:\bopcode\b|\bparts\[0\])""",
    re.VERBOSE,
)


def test_only_decoders_read_opcodes():
    """An opcode's text is for messages: outside instructions/ and api/ nothing compares it, except
    that the frontend knows a call and looks opcodes up in the tables of decoders and of targets."""
    found = []
    for folder in ("frontend", "machine", "check", "numerics"):
        files = sorted((SIMULATOR / folder).glob("*"))
        assert files, folder
        for path in files:
            text = re.sub(r"//.*", "", path.read_text())
            found += [(path.name, match) for match in COMPARES.findall(text)]
    assert found == [
        ("call_graph.cpp", 'parts[0] == "call"'),
        ("call_graph.cpp", 'parts[0] == "call"'),
        ("parse_instructions.cpp", 'parts[0] == "call"'),
        ("program.cpp", "table.find(raw.parts[0]"),
        ("targets.cpp", "forms().find(opcode"),
        ("targets.cpp", "forms().find(i.parts[0]"),
    ]


def traits_of(code: str) -> dict:
    """The traits of the first instruction of `code`."""
    text = (
        HEADER.format(target="sm_90a")
        + ".shared .align 1024 .b8 tile[1024];\n.visible .entry kernel(.param .u64 out)\n{\n"
        + ".reg .pred %p;\n.reg .b32 %r<8>;\n.reg .f32 %f<8>;\n"
        + ".reg .b64 %rd<8>;\n.reg .f64 %d<4>;\n"
        + "L: "
        + code
        + "\nret;\n}\n"
    )
    return _sim.Module([("kernel.ptx", text)]).traits("kernel")[0]


GENERIC = {"flow": "next", "wait": "nothing", "times_out": False, "completion": "at_once"}
NO_MEMORY = {"reads": None, "writes": None, "proxy": "generic", "bytes": 0}
QUIET = GENERIC | NO_MEMORY


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("add.s32 %r0, %r1, 1;", {"class": "alu", "unit": "alu"} | QUIET),
        ("mul.lo.s32 %r0, %r1, 3;", {"class": "multiply", "unit": "fma"} | QUIET),
        ("fma.rn.f32 %f0, %f1, %f2, %f3;", {"class": "fp32", "unit": "fma"} | QUIET),
        ("max.f32 %f0, %f1, %f2;", {"class": "alu"} | QUIET),
        ("div.rn.f32 %f0, %f1, %f2;", {"class": "special"} | QUIET),
        ("add.f64 %d0, %d1, %d2;", {"class": "fp64", "unit": "fp64"} | QUIET),
        ("setp.lt.f64 %p, %d1, %d2;", {"class": "fp64"} | QUIET),
        ("ex2.approx.f32 %f0, %f1;", {"class": "special", "unit": "special"} | QUIET),
        ("cvt.rn.f32.s32 %f0, %r0;", {"class": "convert", "unit": "special"} | QUIET),
        ("bra L;", {"class": "control", "flow": "branch"}),
        ("bra.uni L;", {"class": "control", "flow": "branch"}),
        ("exit;", {"class": "control", "flow": "exit"}),
        ("trap;", {"flow": "trap"}),
        ("ret.uni;", {"flow": "ret"}),
        (
            "ld.global.nc.v4.u32 {%r0, %r1, %r2, %r3}, [%rd0];",
            {"class": "load", "reads": "global", "proxy": "noncoherent", "bytes": 16},
        ),
        ("st.shared.u32 [tile], %r0;", {"class": "store", "writes": "shared", "bytes": 4}),
        (
            "atom.global.add.u32 %r0, [%rd0], 1;",
            {"class": "atomic", "reads": "global", "writes": "global", "bytes": 4},
        ),
        (
            "shfl.sync.bfly.b32 %r0, %r1, 1, 31, -1;",
            {"class": "shuffle", "unit": "load_store", "wait": "members"},
        ),
        ("bar.warp.sync -1;", {"class": "warp", "wait": "members"}),
        ("bar.sync 0;", {"class": "barrier", "unit": "sync", "wait": "barrier", "aligned": True}),
        ("barrier.arrive 1, 64;", {"class": "barrier", "wait": "nothing"}),
        ("barrier.cluster.arrive;", {"class": "cluster_barrier", "wait": "nothing"}),
        ("barrier.cluster.wait;", {"class": "cluster_barrier", "wait": "cluster_barrier"}),
        (
            "mbarrier.try_wait.parity.shared::cta.b64 %p, [tile], 0;",
            {"class": "mbarrier", "wait": "mbarrier", "times_out": True, "reads": "shared"},
        ),
        (
            "mbarrier.test_wait.parity.shared::cta.b64 %p, [tile], 0;",
            {"class": "mbarrier", "wait": "nothing", "times_out": False},
        ),
        (
            "cp.async.ca.shared.global [tile], [%rd0], 8;",
            {"class": "async_copy", "completion": "copy_group", "reads": "global"}
            | {"writes": "shared", "proxy": "generic", "bytes": 8},
        ),
        ("cp.async.commit_group;", {"class": "async_group", "wait": "nothing"}),
        ("cp.async.wait_group 0;", {"class": "async_group", "wait": "copy_group"}),
        ("cp.async.wait_all;", {"class": "async_group", "wait": "copy_group"}),
        (
            "cp.async.mbarrier.arrive.shared.b64 [tile];",
            {"class": "mbarrier", "completion": "mbarrier"},
        ),
        (
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
            "[tile], [%rd0], 16, [tile];",
            {"class": "bulk_copy", "unit": "tma", "completion": "mbarrier", "proxy": "async"}
            | {"reads": "global", "writes": "shared::cluster"},
        ),
        (
            "cp.async.bulk.global.shared::cta.bulk_group [%rd0], [tile], 16;",
            {"class": "bulk_copy", "completion": "bulk_group", "reads": "shared"},
        ),
        (
            "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd0, {%r0, %r1}], [tile];",
            {"class": "bulk_copy", "completion": "bulk_group", "writes": "global"},
        ),
        ("cp.async.bulk.wait_group.read 0;", {"class": "async_group", "wait": "bulk_group"}),
        (
            "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%f0, %f1, %f2, %f3}, "
            "%rd0, %rd1, 1, 1, 1;",
            {"class": "wgmma", "unit": "tensor", "completion": "wgmma_group", "aligned": True}
            | {"reads": "shared", "proxy": "async"},
        ),
        ("wgmma.wait_group.sync.aligned 0;", {"class": "async_group", "wait": "wgmma_group"}),
        ("wgmma.fence.sync.aligned;", {"class": "fence", "wait": "nothing"}),
        ("setmaxnreg.inc.sync.aligned.u32 240;", {"class": "machine", "wait": "registers"}),
        ("setmaxnreg.dec.sync.aligned.u32 40;", {"class": "machine", "wait": "nothing"}),
        ("fence.proxy.async;", {"class": "fence", "unit": "sync"} | QUIET),
    ],
)
def test_traits(code, expected):
    traits = traits_of(code)
    assert {name: traits[name] for name in expected} == expected
