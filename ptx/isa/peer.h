// Flags and bulk copies between GPUs that may use each other's memory (PTX ISA "ld", "st", "red",
// "membar / fence": PTX 6.0, sm_70; "cp.async.bulk": PTX 8.0, sm_90).
// Memory: of all scopes only .sys includes threads of other GPUs. What a thread has written before a
// release at .sys, or knows to be written (through a barrier, for example), is visible to a thread of
// another GPU whose acquire at .sys reads the released value. A bulk copy belongs to the async proxy:
// fence_proxy_async_global() stands between the acquire of a flag and a bulk load of what it announces.
#pragma once

#include "common.h"
#include "mbarrier.h"

namespace ptx {

TORCHEXT_PTX uint32_t ld_acquire_sys(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

TORCHEXT_PTX void st_release_sys(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// Adds to a flag. Several GPUs may add to the same one.
TORCHEXT_PTX void red_release_sys_add(uint32_t* flag, uint32_t value) {
  asm volatile("red.release.sys.global.add.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// Nanoseconds, of a clock that all SMs of a GPU share; its steps may be as long as a microsecond.
TORCHEXT_PTX uint64_t globaltimer() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

// For relaxed accesses to flags at .sys: releases before them, and acquires after them.
TORCHEXT_PTX void fence_acq_rel_sys() {
  asm volatile("fence.acq_rel.sys;" ::: "memory");
}

// Orders generic-proxy accesses to global memory that this thread knows of before its later bulk
// copies, and those of threads that it releases to.
TORCHEXT_PTX void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Loads `bytes` bytes, a multiple of 16, from global to shared memory; both are 16-byte aligned. The
// bytes count toward the expect_tx of `barrier`.
TORCHEXT_PTX void cp_async_bulk_load(void* shared, const void* global, uint32_t bytes,
                                     mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Stores `bytes` bytes, a multiple of 16, from shared to global memory, in this thread's current bulk
// group (tma.h); both are 16-byte aligned. The writers of `shared` must have executed
// fence_proxy_async_shared() and met this thread at a barrier. A flag that announces the bytes is
// released after cp_async_bulk_wait_group, not after the wait for the source alone.
TORCHEXT_PTX void cp_async_bulk_store(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

}  // namespace ptx
