"""setmaxnreg: how many registers a kernel starts with, and the register pool of its CTA."""

import numpy as np
import pytest

from support.opcodes import HEADER, kinds
from torchext import sim


def launch(roles, attributes=""):
    """Launches one warpgroup for each role. A role lists what the warpgroup executes: setmaxnreg
    instructions ("dec 40"), or "exit"."""
    body = []
    for number, role in enumerate(roles):
        body += [f"setp.eq.u32 %p1, %r1, {number};", f"@!%p1 bra NEXT{number};"]
        for change in role:
            setting = "setmaxnreg." + change.replace(" ", ".sync.aligned.u32 ")
            body.append("exit;" if change == "exit" else f"{setting};")
        body += ["bra END;", f"NEXT{number}:"]
    text = (
        HEADER.format(target="sm_90a")
        + f".visible .entry kernel(.param .u64 out)\n{attributes}\n{{\n.reg .pred %p<2>;\n"
        + ".reg .b32 %r<2>;\nmov.u32 %r1, %tid.x;\nshr.u32 %r1, %r1, 7;\n"
        + "\n".join(body)
        + "\nEND:\nbar.sync 0;\nret;\n}\n"
    )
    block = 128 * len(roles)
    return sim.Module(text).launch("kernel", grid=1, block=block, args=[np.zeros(1)])


BOUNDS = ".maxntid {threads}, 1, 1"


@pytest.mark.parametrize("attributes", ["", BOUNDS, BOUNDS + "\n.minnctapersm 1"])
@pytest.mark.parametrize(("producers", "consumers", "down", "up"), [
    (1, 1, 24, 160), (1, 1, 40, 232), (1, 1, 40, 240), (1, 1, 24, 256), (1, 1, 56, 248),
    (1, 2, 40, 232), (1, 2, 24, 240), (1, 2, 40, 160), (1, 2, 32, 232),
    (1, 3, 32, 160), (1, 3, 24, 160), (2, 2, 24, 216), (1, 1, 120, 208),
])  # fmt: skip
def test_shipping_splits(producers, consumers, down, up, attributes):
    threads = 128 * (producers + consumers)
    roles = [[f"dec {down}"]] * producers + [[f"inc {up}"]] * consumers
    for ordered in (roles, roles[::-1]):
        report = launch(ordered, attributes.format(threads=threads))
        assert report.ok, str(report)


def test_a_warpgroup_may_change_more_than_once():
    assert launch([["dec 40", "inc 168"], ["inc 168"], ["dec 160", "inc 168"]]).ok
    assert launch([["dec 40", "dec 24"], ["inc 232"]]).ok


@pytest.mark.parametrize(("attributes", "start"), [
    ("", 168), (".maxnreg 128", 128), (".maxntid 512, 1, 1", 128),
    (".maxntid 384, 1, 1\n.minnctapersm 2", 80), (".reqntid 384, 1, 1", 168),
])  # fmt: skip
def test_what_a_kernel_starts_with(attributes, start):
    report = launch([["dec 24"], ["inc 248"], ["inc 248"]], attributes)
    (finding,) = report.findings
    assert finding.kind == "deadlock"
    assert f"setmaxnreg to 248 from {start}" in finding.message
    assert launch([["dec 24"], [f"inc {start}"], [f"inc {start}"]], attributes).ok


def test_the_pool_is_what_the_cta_started_with():
    assert launch([["dec 40"], ["inc 232"], ["inc 232"]]).ok
    for down in (40, 32):  # the pool is 3 x 168 = 504 registers, not the 512 of a whole SM
        report = launch([[f"dec {down}"], ["inc 240"], ["inc 240"]])
        (finding,) = report.findings
        assert finding.kind == "deadlock"
        assert "setmaxnreg to 240 from 168, but the CTA's pool has" in finding.message


def test_a_warp_that_exits_leaves_nothing():
    """PTX documents that setmaxnreg.dec returns registers to the pool, not that an exit does."""
    report = launch([["exit"], ["inc 232"], ["inc 168"]])
    (finding,) = report.findings
    assert finding.kind == "deadlock"
    assert launch([["dec 40", "exit"], ["inc 232"], ["inc 168"]]).ok


def test_the_wrong_direction():
    assert kinds(launch([["dec 200"], ["inc 232"], ["inc 232"]])) == {"deadlock", "register pool"}
    report = launch([["inc 120"], ["inc 160"]])
    (finding,) = report.findings
    assert finding.kind == "register pool"
    assert "setmaxnreg.inc to 120 of a warp with 160" in finding.message


@pytest.mark.parametrize("count", [25, 264, 16])
def test_counts_that_ptx_does_not_allow(count):
    with pytest.raises(Exception, match="multiple of 8 from 24 to 256"):
        launch([[f"inc {count}"]])
