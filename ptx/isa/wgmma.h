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
// the point of the call. It does not know that registers change while a group is in flight.
TORCHEXT_PTX void wgmma_pin(float& accumulator) {
  asm volatile("" : "+f"(accumulator)::"memory");
}

// Helper, no instruction: descriptor of a K-major operand whose rows are 128 bytes under 128-byte
// swizzle, as TMA lays them down: eight rows to a 1024-byte atom, atoms 1024 bytes apart, the first
// at a multiple of 1024. Advancing along K within the 128 bytes adds the bytes to the address, that
// is bytes / 16 here. (PTX ISA "Matrix Descriptor": address >> 4 in bits 0-13, leading offset >> 4
// in 16-29, unused in this layout, stride offset >> 4 in 32-45, swizzle mode in 62-63.)
TORCHEXT_PTX uint64_t wgmma_descriptor_k_major_128b(const void* shared) {
  constexpr uint64_t kLeadingOffset = 1, kStrideOffset = 1024 >> 4, kSwizzle128B = 1;
  return uint64_t((shared_address(shared) & 0x3ffff) >> 4) | kLeadingOffset << 16 |
         kStrideOffset << 32 | kSwizzle128B << 62;
}

// The products themselves, wgmma_m64nNk32, are in generated/wgmma_shapes.h.

}  // namespace ptx
