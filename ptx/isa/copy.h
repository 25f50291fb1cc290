// Asynchronous copies that each thread starts for itself (PTX ISA "Data Movement and Conversion
// Instructions: cp.async"; PTX 7.0, sm_80).
// Memory: a thread sees the data of its own copies after cp_async_wait_group(); other threads see
// them after a barrier that follows this wait. A barrier must also separate the last read of the
// old contents of the shared memory from the copy. The copies are generic-proxy accesses.
#pragma once

#include "common.h"

namespace ptx {

// Copies 16 bytes without keeping them in L1; both addresses are multiples of 16. Only the first
// `source_bytes` (0 to 16) are read; the other bytes of the destination become zero.
TORCHEXT_PTX void cp_async_cg_shared_global_16(uint32_t shared, const void* global,
                                               uint32_t source_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(source_bytes)
               : "memory");
}

// Ends this thread's current group of copies, which may be empty.
TORCHEXT_PTX void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the `pending` youngest of this thread's groups are incomplete.
template <int pending>
TORCHEXT_PTX void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace ptx
