// Warpgroup matrix multiply on FP8 (PTX ISA "Asynchronous Warpgroup Level Matrix
// Multiply-Accumulate Instructions"; PTX 8.0, sm_90a). Four consecutive warps, the first one's
// index divisible by 4, compute D[64, N] (+)= A[64, 32] * B[N, 32].T from shared memory into FP32
// registers.
//
// Accumulators of warp w, lane l: d[4 * j + 2 * h + i] is row 16 * w + l / 4 + 8 * h,
// column 8 * j + 2 * (l % 4) + i, for h, i in {0, 1}.
//
// Order of calls:
//   1. wgmma_fence(), after any other access to the accumulators;
//   2. the wgmmas of a batch;
//   3. wgmma_commit_group();
//   4. wgmma_wait_group<n>(), before the accumulators are accessed or the operands in shared memory
//      are overwritten.
// wgmma reads its operands in the async proxy. So either TMA wrote them and the warps waited on its
// mbarrier, or the threads that wrote them executed fence_proxy_async_shared() before a barrier.
#pragma once

#include "common.h"
#include "formats.h"
#include "generated/wgmma_shapes.h"

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

// Helper, no instruction: keeps the compiler from moving reads or writes of an accumulator across
// this call. The compiler does not know that the registers change while a group is in flight.
TORCHEXT_PTX void wgmma_pin(float& accumulator) {
  asm volatile("" : "+f"(accumulator)::"memory");
}

// Helpers, no instruction: the descriptor of a K-major operand with rows of 128 bytes under 128-byte
// swizzle, which is how TMA writes them: eight rows form an atom of 1024 bytes, atoms are adjacent,
// and the first is at a multiple of 1024. To advance by n bytes, along K within a row or to another
// atom, add n / 16 to the low word. Bits (PTX ISA "Matrix Descriptor"): 0-13 address >> 4; 16-29
// leading offset >> 4, unused in this layout; 32-45 stride offset >> 4; 62-63 swizzle mode.
TORCHEXT_PTX uint32_t wgmma_descriptor_low_word(const void* shared) {
  constexpr uint32_t kLeadingOffset = 1;
  return (shared_address(shared) & 0x3ffff) >> 4 | kLeadingOffset << 16;
}
TORCHEXT_PTX uint64_t wgmma_descriptor_k_major_128b(uint32_t low_word) {
  constexpr uint64_t kStrideOffset = 1024 >> 4, kSwizzle128B = 1;
  return low_word | kStrideOffset << 32 | kSwizzle128B << 62;
}
TORCHEXT_PTX uint64_t wgmma_descriptor_k_major_128b(const void* shared) {
  return wgmma_descriptor_k_major_128b(wgmma_descriptor_low_word(shared));
}

// The instructions themselves, wgmma_m64nNk32, are in generated/wgmma_shapes.h.

}  // namespace ptx
