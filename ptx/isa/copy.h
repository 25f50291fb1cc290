// Asynchronous copies that each thread starts for itself (PTX ISA "Data Movement and Conversion
// Instructions: cp.async"; PTX 7.0, sm_80).
// Memory: a thread sees the data of its own copies after cp_async_wait_group; other threads see
// them after a barrier that follows it. The same barrier must come between the last read of what
// was in that shared memory and the copy. These are generic-proxy accesses.
#pragma once

#include "common.h"

namespace ptx {

// 16 bytes past L1, both addresses multiples of 16: the first `source_bytes` (0 to 16) are read,
// the others become zero.
TORCHEXT_PTX void cp_async_cg_shared_global_16(uint32_t shared, const void* global,
                                               uint32_t source_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(source_bytes)
               : "memory");
}

// Closes this thread's current group of copies; it may be empty.
TORCHEXT_PTX void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the `pending` youngest of this thread's groups are incomplete.
template <int pending>
TORCHEXT_PTX void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace ptx
