"""PTX instructions that the simulator lacks: it refuses each by name and says why."""

import numpy as np
import pytest

from support.opcodes import lanes


@pytest.mark.parametrize("code,message", [
    ("multimem.ld_reduce.global.add.u32 %z, [%u0];", "several GPUs"),
    ("tex.1d.v4.f32.f32 {%t0, %t1, %t2, %t3}, [%u0, {%t4}];", "textures"),
    ("suld.b.1d.b32.trap {%t0}, [%u0, {%t4}];", "surfaces"),
    ("istypep.texref %p, %u0;", "textures"),
    ("tcgen05.fence::before_thread_sync;", "sm_100"),
    ("mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%t0}, {%t0}, {%t0}, {%t0}, %t1, 0;",
     "sparse mma is not supported"),
    ("fma.rn.oob.f16 %h0, %h1, %h2, %h3;", "'.oob'"),
    ("cvt.rn.satfinite.e2m1x2.f32 %h0, %t0, %t1;", "e2m1x2"),
    ("add.rn.f32x2 %u0, %u1, %u2;", "f32x2"),
    ("redux.sync.min.f32 %t0, %t1, 0xffffffff;", "f32"),
    ("frobnicate.u32 %z, %z;", "unknown instruction"),
])  # fmt: skip
def test_refused_by_name(code, message):
    with pytest.raises(ValueError, match=message) as caught:
        lanes(code, np.uint32, block=32)
    assert code.split(" ", maxsplit=1)[0].rstrip(";") in str(caught.value)


@pytest.mark.parametrize("level", ["L1", "L2", "L2::evict_last", "L2::evict_normal"])
def test_prefetch_levels(level):
    code = f"ld.param.u64 %u0, [in_a];\nprefetch.global.{level} [%u0];\nmov.b32 %z, %a;"
    a = np.arange(32, dtype=np.uint32)
    np.testing.assert_array_equal(lanes(code, np.uint32, a), a)
