"""malloc and free in device code: what they return, and the findings for their misuse."""

import numpy as np
import pytest

from support.ptx_texts import ptxas_accepts, run, text_of
from torchext import sim

DECLARE = """.extern .func (.param .b64 r) malloc(.param .b64 n);
.extern .func free(.param .b64 p);
"""
HEAP_BYTES = 8 << 20


def malloc(size, to="%rd5") -> str:
    return f"""{{ .param .b64 n;\n.param .b64 q;\nst.param.b64 [n], {size};
    call.uni (q), malloc, (n);\nld.param.b64 {to}, [q]; }}\n"""


def free(pointer="%rd5") -> str:
    return f"{{ .param .b64 p;\nst.param.b64 [p], {pointer};\ncall.uni free, (p); }}\n"


def launch(code, block=1, **options):
    text = text_of(code, DECLARE)
    assert ptxas_accepts(text) == ""
    return run(text, block=block, **options)


def test_each_thread_has_its_own_block():
    code = f"""mov.u64 %rd9, 4;\n{malloc("%rd9")}st.u32 [%rd5], %r1;\nbar.sync 0;
    ld.u32 %r2, [%rd5];\n{free()}
    mul.wide.u32 %rd2, %r1, 4;\nadd.u64 %rd1, %rd1, %rd2;\nst.global.u32 [%rd1], %r2;"""
    report, out = launch(code, block=32, grid=1)
    assert report.ok and not report.findings, str(report)
    np.testing.assert_array_equal(out, np.arange(32))


def test_a_full_heap_returns_null():
    report, out = launch(
        malloc(HEAP_BYTES - 64) + malloc(64, "%rd6") + malloc(1 << 40, "%rd7")
        + "st.global.u64 [%rd1], %rd6;\nst.global.u64 [%rd1+8], %rd7;\n" + free() + free("%rd6"),
        dtype=np.uint64,
    )  # fmt: skip
    assert report.ok and not report.findings, str(report)
    assert out[0] == 0 and out[1] == 0


def test_freed_memory_is_used_again_when_nothing_else_is_left():
    again = malloc(HEAP_BYTES // 2) + "st.u32 [%rd5], 1;\n" + free()
    report, out = launch(again * 5 + "st.global.u64 [%rd1], %rd5;", dtype=np.uint64)
    assert report.ok and not report.findings, str(report)
    assert out[0] != 0


BLOCK = malloc(40)


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (
            "st.u32 [%rd5+40], 1;" + free(),
            "out of bounds",
            "0 bytes after the end of a block of 40",
        ),
        ("ld.u32 %r2, [%rd5+-4];" + free(), "out of bounds", "memory that malloc has not returned"),
        ("ld.u32 %r2, [%rd5+4];" + free(), "uninitialized memory", "nothing has written"),
        (free() + "st.u32 [%rd5+8], 1;", "freed memory", "byte 8 of a block of 40 bytes that has"),
        (free() + free(), "invalid free", "second free of byte 0 of a block of 40"),
        ("add.u64 %rd6, %rd5, 8;" + free("%rd6") + free(), "invalid free", "free of byte 8"),
        (free("%rd1") + free(), "invalid free", "free of memory that malloc has not returned"),
        ("mov.u64 %rd6, 0;" + free("%rd6"), "heap leak", "1 block of 40 bytes"),
    ],
)
def test_misuse(code, kind, message):
    report, _ = launch(BLOCK + code)
    assert [f.kind for f in report.findings] == [kind], str(report)
    assert message in report.findings[0].message
    assert report.ok == (kind == "heap leak")


def test_freeing_what_another_thread_still_uses_is_a_race():
    code = """.shared .align 8 .b64 where;\nsetp.ne.u32 %p1, %r1, 0;\n@%p1 bra WAIT;
    MALLOC st.u32 [%rd5], 1;\nst.shared.u64 [where], %rd5;\nWAIT: bar.sync 0;
    ld.shared.u64 %rd5, [where];\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 bra FREE;
    setp.ne.u32 %p2, %r1, 32;\n@%p2 bra END;\nld.u32 %r2, [%rd5];\nbra END;\nFREE: CALL END: """
    code = code.replace("MALLOC", malloc(40)).replace("CALL", free())
    kinds = set()
    for seed in range(8):
        report, _ = launch(code, block=64, seed=seed)
        kinds |= {f.kind for f in report.findings}
        assert not report.ok, "whichever comes first, nothing orders the load and the free"
    assert kinds <= {"data race", "freed memory"}


def test_blocks_outlive_the_launch():
    keep = text_of(BLOCK + "st.u32 [%rd5+4], 9;\nst.global.u64 [to], %rd5;",
                   DECLARE + ".visible .global .align 8 .u64 to;")  # fmt: skip
    use = "ld.global.u64 %rd5, [to];\nld.u32 %r2, [%rd5+4];\nst.global.u32 [%rd1], %r2;" + free()
    entry = text_of(use).split(".visible .entry")[1].replace(" k(", "use(", 1)
    module = sim.Module(keep + ".visible .entry " + entry)
    report, _ = run(module, block=1)
    assert report.ok and [f.kind for f in report.findings] == ["heap leak"]
    out = np.zeros(1, np.uint32)
    report = module.launch("use", grid=1, block=1, args=[out])
    assert report.ok and not report.findings, str(report)
    assert out[0] == 9
    report = module.launch("use", grid=1, block=1, args=[out])
    assert [f.kind for f in report.findings] == ["freed memory", "invalid free"]
    assert "in an earlier launch" in report.findings[0].message


def test_wrong_declarations_are_refused():
    text = text_of("call free, (%rd1, %rd1);", ".extern .func free(.param .b64 p, .param .b64 q);")
    with pytest.raises(
        sim.PtxError, match="'free' must be declared as the CUDA runtime has it, with 1"
    ):
        sim.Module(text).check("k")
