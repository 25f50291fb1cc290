// Warpgroup matrix multiply on FP8 (PTX ISA "Asynchronous Warpgroup Level Matrix
// Multiply-Accumulate Instructions"; PTX 8.0, sm_90a). Four consecutive warps, the first one's
// index divisible by 4, compute D[64, N] (+)= A[64, 32] * B[N, 32].T from shared memory into FP32
// registers.
//
// Accumulators of warp w, lane l: d[4 * j + 2 * h + i] is row 16 * w + l / 4 + 8 * h,
// column 8 * j + 2 * (l % 4) + i, for h, i in {0, 1}.
//
// Order: wgmma_fence() before the first of a batch and after any other access to the accumulators;
// the batch; wgmma_commit_group(); wgmma_wait_group<n>() before the accumulators or the shared
// operands are touched again. Operands are read in the async proxy: written by TMA and waited for
// on an mbarrier, or followed by fence_proxy_async_shared() and a barrier.
#pragma once

#include "common.h"

namespace ptx {

TORCHEXT_PTX void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

TORCHEXT_PTX void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `pending` groups of this warpgroup are in flight.
template <int pending>
TORCHEXT_PTX void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from moving reads or writes of an accumulator across the point of the call: it
// does not know that registers change while a group is in flight.
TORCHEXT_PTX void wgmma_pin(float& accumulator) {
  asm volatile("" : "+f"(accumulator)::"memory");
}

// Descriptor of a K-major operand whose rows are 128 bytes under 128-byte swizzle, as TMA lays them
// down: eight rows to a 1024-byte atom, atoms 1024 bytes apart, the first at a multiple of 1024.
// Advancing along K within the 128 bytes adds the bytes to the address, that is bytes / 16 here.
// (PTX ISA "Matrix Descriptor": address >> 4 in bits 0-13, leading offset >> 4 in 16-29, unused in
// this layout, stride offset >> 4 in 32-45, swizzle mode in 62-63.)
TORCHEXT_PTX uint64_t wgmma_descriptor_k_major_128b(const void* shared) {
  constexpr uint64_t kLeadingOffset = 1, kStrideOffset = 1024 >> 4, kSwizzle128B = 1;
  return uint64_t((shared_address(shared) & 0x3ffff) >> 4) | kLeadingOffset << 16 |
         kStrideOffset << 32 | kSwizzle128B << 62;
}

// The FP8 formats as wgmma's operand types.
struct e4m3 {};
struct e5m2 {};

// scale_d = 0 overwrites D, 1 adds to it.
#define TORCHEXT_WGMMA_M64N128K32(A, B)                                                           \
  TORCHEXT_PTX void wgmma_m64n128k32(A, B, float (&d)[64], uint64_t a, uint64_t b, int scale_d) { \
    asm volatile(                                                                                 \
        "{\n"                                                                                     \
        ".reg .pred accumulate;\n"                                                                \
        "setp.ne.b32 accumulate, %66, 0;\n"                                                       \
        "wgmma.mma_async.sync.aligned.m64n128k32.f32." #A "." #B                                  \
        " {"                                                                                      \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                  \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "        \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "        \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "       \
        "%64, %65, accumulate, 1, 1;\n"                                                           \
        "}"                                                                                       \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),     \
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), \
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),           \
          "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]),           \
          "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),           \
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]),           \
          "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),           \
          "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),           \
          "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),           \
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]),           \
          "+f"(d[62]), "+f"(d[63])                                                                \
        : "l"(a), "l"(b), "r"(scale_d));                                                          \
  }
TORCHEXT_WGMMA_M64N128K32(e4m3, e4m3)
TORCHEXT_WGMMA_M64N128K32(e4m3, e5m2)
TORCHEXT_WGMMA_M64N128K32(e5m2, e4m3)
TORCHEXT_WGMMA_M64N128K32(e5m2, e5m2)
#undef TORCHEXT_WGMMA_M64N128K32

}  // namespace ptx
