// Named barriers of a CTA: bar.sync (PTX ISA "Parallel Synchronization and Communication
// Instructions: bar, barrier"; PTX 1.0 / sm_20 for named barriers with a thread count).
// Memory: a barrier orders all generic-proxy accesses among the threads that take part, but not
// those of the async proxy: see fence.h.
#pragma once

#include "common.h"

namespace ptx {

// Waits until `threads` (a multiple of 32) threads have arrived at barrier `id` (0 to 15).
TORCHEXT_PTX void bar_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace ptx
