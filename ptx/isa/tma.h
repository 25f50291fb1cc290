// The bulk tensor copy engine (PTX ISA "Data Movement and Conversion Instructions: Bulk Tensor
// copy"; PTX 8.0, sm_90). One thread starts a copy. The engine, which belongs to the async proxy,
// computes addresses from a tensor map. For the part of a box outside the tensor, loads give zeros
// and stores write nothing. Coordinates count elements, innermost dimension first. Alignment in
// shared memory: 128 bytes, or 1024 with 128-byte swizzle. Maps come from cuTensorMapEncodeTiled;
// they are 64-byte aligned, in __grid_constant__ parameters.
#pragma once

#include "common.h"
#include "mbarrier.h"

namespace ptx {

TORCHEXT_PTX void prefetch_tensormap(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Loads a box from global to shared memory. All bytes of the box, zeros included, count toward the
// expect_tx of `barrier`. Threads that have waited for that phase see the data, in either proxy.
TORCHEXT_PTX void cp_async_bulk_tensor_2d_load(void* shared, const void* map, mbarrier* barrier,
                                               int32_t x, int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

// The same load into every CTA of the cluster whose bit in `ctas` is set, at the same offset in its
// shared memory. Each CTA counts the bytes on its own mbarrier, at the offset of `barrier`.
TORCHEXT_PTX void cp_async_bulk_tensor_2d_load_multicast(void* shared, const void* map,
                                                         mbarrier* barrier, int32_t x, int32_t y,
                                                         uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(ctas)
      : "memory");
}

// Stores a box from shared to global memory, in this thread's current bulk group. The threads that
// wrote `shared` must have executed fence_proxy_async_shared() and met this thread at a barrier.
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

// Adds a box of FP32 numbers in shared memory to global memory, in this thread's current bulk group;
// otherwise as the store. Each element is one atomic add, rounded to nearest even.
TORCHEXT_PTX void cp_reduce_async_bulk_tensor_3d_add(const void* map, const void* shared, int32_t x,
                                                     int32_t y, int32_t z) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group"
      " [%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

TORCHEXT_PTX void cp_async_bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most `pending` of this thread's bulk groups still have shared memory to read.
template <int pending>
TORCHEXT_PTX void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// Waits until at most `pending` of this thread's bulk groups are incomplete. A complete group has
// also written to global memory.
template <int pending>
TORCHEXT_PTX void cp_async_bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace ptx
