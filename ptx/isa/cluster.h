// Clusters of CTAs and their distributed shared memory (PTX ISA "barrier.cluster", "mapa", "ld",
// special registers %cluster_ctarank and %cluster_nctaid; PTX 7.8, sm_90).
// A shared address of another CTA is a 32-bit address of the .shared::cluster state space.
#pragma once

#include "mbarrier.h"

namespace ptx {

TORCHEXT_PTX uint32_t cluster_ctarank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

TORCHEXT_PTX uint32_t cluster_nctarank() {
  uint32_t count;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
  return count;
}

// The cluster's barrier: all threads of all CTAs that have not exited arrive, then wait. Arrival
// releases and waiting acquires at cluster scope: after the wait, every thread sees what any thread
// wrote before it arrived.
TORCHEXT_PTX void barrier_cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// Arrival that releases nothing but what an earlier fence has released. Without the release, which
// waits until the GPU has performed all earlier writes, it takes no time.
TORCHEXT_PTX void barrier_cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
TORCHEXT_PTX void barrier_cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The cluster address of a variable in the CTA with that rank; `address` is the shared address of
// the same variable in this CTA.
TORCHEXT_PTX uint32_t mapa(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

TORCHEXT_PTX float4 ld_shared_cluster_v4_f32(uint32_t address) {
  float4 value;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// Helper, mapa and mbarrier.arrive: arrives at the mbarrier of the CTA of that rank; releases at
// cluster scope.
TORCHEXT_PTX void mbarrier_arrive_cluster(mbarrier* barrier, uint32_t rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                   mapa(shared_address(barrier), rank))
               : "memory");
}

// Helper, the same at the default scope: tells the other CTA that this thread has finished reading,
// so that shared memory may be overwritten. It passes no writes on. To release at cluster scope, the
// GPU first performs all of the thread's writes to any memory (MEMBAR.ALL.GPU in machine code): on
// an H200, that took longer than the tensor cores need for a K block. `address` is the barrier's
// cluster address.
TORCHEXT_PTX void mbarrier_arrive_done_reading(uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
}

// Helper, a loop of mbarrier.try_wait: mbarrier_wait() that acquires at cluster scope, for phases
// that threads of other CTAs complete with mbarrier_arrive_cluster().
TORCHEXT_PTX void mbarrier_wait_cluster(mbarrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

}  // namespace ptx
