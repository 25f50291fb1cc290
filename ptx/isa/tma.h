// The bulk tensor copy engine (PTX ISA "Data Movement and Conversion Instructions: Bulk Tensor
// copy"; PTX 8.0, sm_90). One thread starts a copy; the engine, in the async proxy, computes
// addresses from a tensor map, fills what lies outside the tensor with zeros on loads and leaves it
// out on stores. Coordinates are in elements, innermost first. Shared memory: 128-byte aligned,
// 1024 under 128B swizzle. Maps: cuTensorMapEncodeTiled, 64-byte aligned, in __grid_constant__
// parameters.
#pragma once

#include "common.h"
#include "mbarrier.h"

namespace ptx {

TORCHEXT_PTX void prefetch_tensormap(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Global to shared. Its bytes (the whole box, filled part included) count against `barrier`'s
// expect_tx; data is visible to whoever waits for that phase, in either proxy.
TORCHEXT_PTX void cp_async_bulk_tensor_2d_load(void* shared, const void* map, mbarrier* barrier,
                                               int32_t x, int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

// The same to the same place in every CTA of the cluster whose bit of `ctas` is set: each counts
// the bytes on the mbarrier at `barrier`'s place in its own shared memory.
TORCHEXT_PTX void cp_async_bulk_tensor_2d_load_multicast(void* shared, const void* map,
                                                         mbarrier* barrier, int32_t x, int32_t y,
                                                         uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(ctas)
      : "memory");
}

// Shared to global, part of this thread's current bulk group. Writers of `shared` must have run
// fence_proxy_async_shared() and met this thread at a barrier.
TORCHEXT_PTX void cp_async_bulk_tensor_2d_store(const void* map, const void* shared, int32_t x,
                                                int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(shared_address(shared)), "r"(x), "r"(y)
      : "memory");
}

TORCHEXT_PTX void cp_async_bulk_tensor_3d_store(const void* map, const void* shared, int32_t x,
                                                int32_t y, int32_t z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
          map),
      "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

TORCHEXT_PTX void cp_async_bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most `pending` of this thread's bulk groups have yet to read their shared memory.
template <int pending>
TORCHEXT_PTX void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// The same until at most `pending` groups are not yet complete, global writes included.
template <int pending>
TORCHEXT_PTX void cp_async_bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace ptx
