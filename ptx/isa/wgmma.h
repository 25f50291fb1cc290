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
#include "formats.h"

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

// wgmma_m64nNk32(A, B, d, a, b, scale_d) for N = 16, 32, 64, 128, 192, told by d's N / 2 registers.
// scale_d = 0 overwrites D, 1 adds to it.
// clang-format off
#define TORCHEXT_NAMES_16 \
  "%0, %1, %2, %3, %4, %5, %6, %7"
#define TORCHEXT_NAMES_32 TORCHEXT_NAMES_16 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TORCHEXT_NAMES_64 TORCHEXT_NAMES_32 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TORCHEXT_NAMES_128 TORCHEXT_NAMES_64 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TORCHEXT_NAMES_192 TORCHEXT_NAMES_128 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define TORCHEXT_DESCRIPTORS_16 "%8, %9"
#define TORCHEXT_SCALE_D_16 "%10"
#define TORCHEXT_DESCRIPTORS_32 "%16, %17"
#define TORCHEXT_SCALE_D_32 "%18"
#define TORCHEXT_DESCRIPTORS_64 "%32, %33"
#define TORCHEXT_SCALE_D_64 "%34"
#define TORCHEXT_DESCRIPTORS_128 "%64, %65"
#define TORCHEXT_SCALE_D_128 "%66"
#define TORCHEXT_DESCRIPTORS_192 "%96, %97"
#define TORCHEXT_SCALE_D_192 "%98"
#define TORCHEXT_REGISTERS(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
  "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define TORCHEXT_REGISTERS_16 TORCHEXT_REGISTERS(0)
#define TORCHEXT_REGISTERS_32 TORCHEXT_REGISTERS_16, TORCHEXT_REGISTERS(8)
#define TORCHEXT_REGISTERS_64 TORCHEXT_REGISTERS_32, TORCHEXT_REGISTERS(16), TORCHEXT_REGISTERS(24)
#define TORCHEXT_REGISTERS_128 TORCHEXT_REGISTERS_64, TORCHEXT_REGISTERS(32), \
  TORCHEXT_REGISTERS(40), TORCHEXT_REGISTERS(48), TORCHEXT_REGISTERS(56)
#define TORCHEXT_REGISTERS_192 TORCHEXT_REGISTERS_128, TORCHEXT_REGISTERS(64), \
  TORCHEXT_REGISTERS(72), TORCHEXT_REGISTERS(80), TORCHEXT_REGISTERS(88)
#define TORCHEXT_WGMMA(N, A, B)                                                                    \
  TORCHEXT_PTX void wgmma_m64nNk32(A, B, float (&d)[N / 2], uint64_t a, uint64_t b, int scale_d) { \
    asm volatile(                                                                                  \
        "{\n"                                                                                      \
        ".reg .pred accumulate;\n"                                                                 \
        "setp.ne.b32 accumulate, " TORCHEXT_SCALE_D_##N ", 0;\n"                                                 \
        "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32." #A "." #B " {" TORCHEXT_NAMES_##N "},"   \
        " " TORCHEXT_DESCRIPTORS_##N ", accumulate, 1, 1;\n"                                                         \
        "}"                                                                                        \
        : TORCHEXT_REGISTERS_##N                                                                   \
        : "l"(a), "l"(b), "r"(scale_d));                                         \
  }
#define TORCHEXT_WGMMA_FORMATS(N) \
  TORCHEXT_WGMMA(N, e4m3, e4m3)   \
  TORCHEXT_WGMMA(N, e4m3, e5m2)   \
  TORCHEXT_WGMMA(N, e5m2, e4m3)   \
  TORCHEXT_WGMMA(N, e5m2, e5m2)
TORCHEXT_WGMMA_FORMATS(16)
TORCHEXT_WGMMA_FORMATS(32)
TORCHEXT_WGMMA_FORMATS(64)
TORCHEXT_WGMMA_FORMATS(128)
TORCHEXT_WGMMA_FORMATS(192)
#undef TORCHEXT_WGMMA_FORMATS
#undef TORCHEXT_WGMMA
#undef TORCHEXT_REGISTERS
#undef TORCHEXT_REGISTERS_16
#undef TORCHEXT_REGISTERS_32
#undef TORCHEXT_REGISTERS_64
#undef TORCHEXT_REGISTERS_128
#undef TORCHEXT_REGISTERS_192
#undef TORCHEXT_NAMES_16
#undef TORCHEXT_NAMES_32
#undef TORCHEXT_NAMES_64
#undef TORCHEXT_NAMES_128
#undef TORCHEXT_NAMES_192
#undef TORCHEXT_DESCRIPTORS_16
#undef TORCHEXT_SCALE_D_16
#undef TORCHEXT_DESCRIPTORS_32
#undef TORCHEXT_SCALE_D_32
#undef TORCHEXT_DESCRIPTORS_64
#undef TORCHEXT_SCALE_D_64
#undef TORCHEXT_DESCRIPTORS_128
#undef TORCHEXT_SCALE_D_128
#undef TORCHEXT_DESCRIPTORS_192
#undef TORCHEXT_SCALE_D_192
// clang-format on

}  // namespace ptx
