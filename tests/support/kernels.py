"""Hand-written PTX that the tests of torchext.sim launch."""

HEADER = ".version 8.0\n.target sm_90a\n.address_size 64\n"

# y[i] = a * x[i] for i < n
SCALE = (
    HEADER
    + """
.visible .entry scale(.param .u64 x, .param .u64 y, .param .f32 a, .param .u32 n)
{
    .reg .pred %p<2>;
    .reg .b32 %r<6>;
    .reg .f32 %f<4>;
    .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [x];
    ld.param.u64 %rd2, [y];
    ld.param.f32 %f1, [a];
    ld.param.u32 %r1, [n];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.s32 %r5, %r2, %r3, %r4;
    setp.ge.u32 %p1, %r5, %r1;
    @%p1 bra DONE;
    mul.wide.u32 %rd3, %r5, 4;
    add.s64 %rd4, %rd1, %rd3;
    ld.global.f32 %f2, [%rd4];
    mul.f32 %f3, %f2, %f1;
    add.s64 %rd5, %rd2, %rd3;
    st.global.f32 [%rd5], %f3;
DONE:
    ret;
}
"""
)

# The same for one thread, with the arguments in a struct { float* y; float a; unsigned n; }
STRUCT = (
    HEADER
    + """
.visible .entry by_struct(.param .align 8 .b8 p[16])
{
    .reg .b32 %r<2>;
    .reg .f32 %f<4>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [p];
    ld.param.f32 %f1, [p+8];
    ld.param.u32 %r1, [p+12];
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    ld.global.f32 %f2, [%rd3];
    mul.f32 %f3, %f2, %f1;
    st.global.f32 [%rd3], %f3;
    ret;
}
"""
)

# TMA brings a box of 8 x 16 f32 at (x, y) to shared memory; 128 threads copy it to out.
TMA = (
    HEADER
    + """
.visible .entry tma(.param .align 64 .b8 map[128], .param .u64 out, .param .u32 x, .param .u32 y)
{
    .reg .pred %p<3>;
    .reg .b32 %r<12>;
    .reg .f32 %f<2>;
    .reg .b64 %rd<6>;
    .shared .align 128 .b8 tile[512];
    .shared .align 8 .b8 full[8];
    mov.u64 %rd1, map;
    cvta.param.u64 %rd1, %rd1;
    ld.param.u64 %rd2, [out];
    ld.param.u32 %r1, [x];
    ld.param.u32 %r2, [y];
    mov.u32 %r3, tile;
    mov.u32 %r4, full;
    mov.u32 %r5, %tid.x;
    setp.ne.s32 %p1, %r5, 0;
    @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%r4], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], 512;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r3], [%rd1, {%r1, %r2}], [%r4];
READY:
    bar.sync 0;
WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r4], 0;
    @!%p2 bra WAIT;
    shl.b32 %r6, %r5, 2;
    add.s32 %r7, %r3, %r6;
    ld.shared.f32 %f1, [%r7];
    mul.wide.u32 %rd3, %r5, 4;
    add.s64 %rd4, %rd2, %rd3;
    st.global.f32 [%rd4], %f1;
    ret;
}
"""
)

# Each thread writes its slot of shared memory and reads its neighbor's; no barrier in between.
RACE = (
    HEADER
    + """
.visible .entry race(.param .u64 out)
{
    .reg .b32 %r<8>;
    .reg .b64 %rd<4>;
    .shared .align 4 .b8 slots[256];
    ld.param.u64 %rd1, [out];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, slots;
    shl.b32 %r3, %r1, 2;
    add.s32 %r4, %r2, %r3;
    st.shared.u32 [%r4], %r1;
    xor.b32 %r5, %r3, 128;
    add.s32 %r6, %r2, %r5;
    ld.shared.u32 %r7, [%r6];
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r7;
    ret;
}
"""
)

# One warp makes a tensor map over the 16 x 32 f32 at src, as Triton does, and has TMA bring the
# 8 x 16 box at (16, 8) to out.
MAKE_MAP = (
    HEADER.replace("8.0", "8.3")
    + """
.visible .entry make_map(.param .u64 src, .param .u64 scratch, .param .u64 out)
{
    .reg .pred %p<3>;
    .reg .b32 %r<12>;
    .reg .f32 %f<2>;
    .reg .b64 %rd<8>;
    .shared .align 128 .b8 map[128];
    .shared .align 128 .b8 tile[512];
    .shared .align 8 .b8 full[8];
    ld.param.u64 %rd1, [src];
    ld.param.u64 %rd2, [scratch];
    ld.param.u64 %rd3, [out];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, map;
    mov.u32 %r3, tile;
    mov.u32 %r4, full;
    shl.b32 %r5, %r1, 2;
    add.s32 %r6, %r2, %r5;
    st.shared.b32 [%r6], 0;
    bar.warp.sync -1;
    setp.ne.s32 %p1, %r1, 0;
    @%p1 bra MADE;
    cvt.u64.u32 %rd4, %r2;
    cvta.shared.u64 %rd5, %rd4;
    tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%rd4], %rd1;
    tensormap.replace.tile.rank.shared::cta.b1024.b32 [%rd4], 0x1;
    mov.u32 %r7, 16;
    tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%rd4], 0x0, %r7;
    tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%rd4], 0x1, 8;
    tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%rd4], 0x0, 32;
    tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%rd4], 0x1, 16;
    mov.u64 %rd6, 128;
    tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%rd4], 0x0, %rd6;
    tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [%rd4], 0x0, 1;
    tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [%rd4], 0x1, 1;
    tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [%rd4], 0x7;
    tensormap.replace.tile.interleave_layout.b1024.b32 [%rd5], 0x0;
    tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [%rd4], 0x0;
    tensormap.replace.tile.fill_mode.shared::cta.b1024.b32 [%rd4], 0x0;
MADE:
    bar.warp.sync -1;
    cvt.u64.u32 %rd4, %r2;
    tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned
        [%rd2], [%rd4], 128;
    fence.proxy.tensormap::generic.acquire.gpu [%rd2], 128;
    @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%r4], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], 512;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r3], [%rd2, {16, 8}], [%r4];
READY:
    bar.sync 0;
WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r4], 0;
    @!%p2 bra WAIT;
    mov.u32 %r8, 0;
COPY:
    shl.b32 %r9, %r8, 7;
    add.s32 %r9, %r9, %r5;
    add.s32 %r10, %r3, %r9;
    ld.shared.f32 %f1, [%r10];
    cvt.u64.u32 %rd7, %r9;
    add.s64 %rd7, %rd3, %rd7;
    st.global.f32 [%rd7], %f1;
    add.s32 %r8, %r8, 1;
    setp.lt.s32 %p2, %r8, 4;
    @%p2 bra COPY;
    ret;
}
"""
)

# All 32 lanes store one box of 8 x 16 f32 at (0, 0), as CUTLASS's epilogues do.
STORE = (
    HEADER
    + """
.visible .entry store(.param .u32 step, .param .align 64 .b8 map[128])
{
    .reg .b32 %r<8>;
    .reg .b64 %rd<2>;
    .shared .align 128 .b8 tile[512];
    ld.param.u32 %r1, [step];
    mov.u64 %rd1, map;
    cvta.param.u64 %rd1, %rd1;
    mov.u32 %r2, %tid.x;
    mov.u32 %r3, tile;
    shl.b32 %r4, %r2, 4;
    add.s32 %r5, %r3, %r4;
    st.shared.v4.b32 [%r5], {%r2, %r2, %r2, %r2};
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    mul.lo.s32 %r6, %r1, %r2;
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r6, 0}], [%r3];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    ret;
}
"""
)

# Two CTAs of a cluster: each initializes an mbarrier, stores a number, and arrives at the other's
# mbarrier; then it waits for its own. Tests replace FENCE and READ.
PEERS = (
    HEADER
    + """
.visible .entry peers(.param .u64 out)
{
    .reg .pred %p<2>;
    .reg .b32 %r<12>;
    .reg .b64 %rd<2>;
    .shared .align 8 .b8 full[8];
    .shared .align 4 .b8 number[4];
    ld.param.u64 %rd1, [out];
    mov.u32 %r1, full;
    mov.u32 %r2, number;
    mov.u32 %r3, %cluster_ctarank;
    xor.b32 %r4, %r3, 1;
    mbarrier.init.shared::cta.b64 [%r1], 1;
    st.shared.u32 [%r2], %r3;
    FENCE
    barrier.cluster.arrive.relaxed;
    barrier.cluster.wait;
    mapa.shared::cluster.u32 %r5, %r1, %r4;
    mapa.shared::cluster.u32 %r6, %r2, %r4;
    READ
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r5];
WAIT:
    mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p1, [%r1], 0;
    @!%p1 bra WAIT;
    barrier.cluster.arrive;
    barrier.cluster.wait;
    ret;
}
"""
)

# A kernel with calls through a table, recursion, alloca, malloc, initializers and expressions.
CALLS = (
    HEADER
    + """
.extern .func (.param .b64 r) malloc(.param .b64 n);
.extern .func free(.param .b64 p);
.func (.param .b32 r) up(.param .b32 a)
{ .reg .b32 x; .reg .pred q; .local .align 4 .u32 mine; .param .b32 b; .param .b32 s;
  ld.param.b32 x, [a]; st.local.u32 [mine], x; setp.lt.u32 q, x, 2; @q bra END;
  sub.u32 x, x, 1; st.param.b32 [b], x; call (s), up, (b); ld.param.b32 x, [s];
END: st.param.b32 [r], x; ret; }
.func (.param .b32 r) half(.param .b32 a)
{ .reg .b32 x; ld.param.b32 x, [a]; shr.u32 x, x, (2+1)/3; st.param.b32 [r], x; ret; }
.global .align 8 .u64 table[2][2] = {{up, half}, {generic(count)+0, 7}};
.const .align 4 .f32 scales[3] = {1.5e-3, 0f3F800000, 2.5};
.visible .global .align 4 .u32 count = 1<<4|3;
.visible .entry calls(.param .u64 out)
.maxntid 64 .pragma "nounroll";
{ .reg .pred %p<3>; .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .v2 .u32 v;
  ld.param.u64 %rd1, [out]; mov.v2.u32 v, {%r1, %r1}; mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 1;
  mul.wide.u32 %rd2, %r2, 8; mov.u64 %rd3, table; add.u64 %rd3, %rd3, %rd2;
  ld.global.u64 %rd4, [%rd3]; and.b32 %r3, %r1, 7;
  { .param .b32 p; .param .b32 q; st.param.b32 [p], %r3;
    proto: .callprototype (.param .b32 _) _ (.param .b32 _);
    call (q), %rd4, (p), proto; ld.param.b32 %r4, [q]; }
  mov.u64 %rd5, 16; alloca.u64 %rd6, %rd5, 16; st.local.u32 [%rd6+4*2], %r4;
  { .param .b64 n; .param .b64 m; st.param.b64 [n], 24; call (m), malloc, (n);
    ld.param.b64 %rd7, [m]; st.u32 [%rd7+4], %r4; call free, (m); }
  shl.b32 %r5, %r1, 2; cvt.u64.u32 %rd8, %r5; add.u64 %rd1, %rd1, %rd8;
  st.global.u32 [%rd1], %r4; ret; }
"""
)
