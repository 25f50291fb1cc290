// Memory barriers with phases and transaction counts (PTX ISA "mbarrier"; init, arrive: PTX 7.0,
// sm_80; try_wait, expect_tx: PTX 7.8 / 8.0, sm_90).
// Memory: arrive releases and a successful try_wait acquires at CTA scope. So every thread that has
// waited for a phase sees what other threads wrote before they arrived in that phase. It also sees
// the writes of the TMA copies whose complete_tx counted in that phase.
#pragma once

#include "common.h"

namespace ptx {

// One per pipeline slot, in shared memory, 8-byte aligned.
using mbarrier = uint64_t;

// `arrivals` is the number of arrivals that complete a phase. One thread initializes the mbarrier
// and executes fence_mbarrier_init(); a barrier follows before any thread uses the mbarrier.
TORCHEXT_PTX void mbarrier_init(mbarrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

TORCHEXT_PTX void mbarrier_arrive(mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and makes the phase wait for `bytes` more bytes of TMA traffic.
TORCHEXT_PTX void mbarrier_arrive_expect_tx(mbarrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Helper, a loop of mbarrier.try_wait: waits until the phase with that parity is complete. A new
// mbarrier is in phase 0; a wait for parity 1 on it returns at once, because the phase before the
// first counts as complete.
TORCHEXT_PTX void mbarrier_wait(mbarrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

}  // namespace ptx
