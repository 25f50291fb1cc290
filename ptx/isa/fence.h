// Fences between proxies (PTX ISA "membar / fence"; PTX 8.0, sm_90).
// A barrier alone does not order accesses of the generic proxy (loads and stores) with accesses of
// the async proxy (TMA, and wgmma's reads of shared memory), in either direction: one of these
// fences must stand in between.
#pragma once

#include "common.h"

namespace ptx {

// Orders this thread's earlier generic-proxy accesses to shared memory before later async-proxy
// ones. Every thread that wrote executes this fence, then a barrier; the thread that starts the
// async operation takes part in that barrier, too.
TORCHEXT_PTX void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Makes mbarrier.init visible to the async proxy and, in a cluster, to the other CTAs.
TORCHEXT_PTX void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

}  // namespace ptx
