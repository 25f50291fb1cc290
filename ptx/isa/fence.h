// Fences between proxies (PTX ISA "membar / fence"; PTX 8.0, sm_90).
// The async proxy (TMA, wgmma reading shared memory) does not see generic-proxy accesses, nor the
// other way round, merely because a barrier ordered them; one of these must stand in between.
#pragma once

#include "common.h"

namespace ptx {

// Orders this thread's earlier generic-proxy accesses to shared memory before later async-proxy
// ones. Each thread that wrote runs it, then a barrier, then the thread that starts the async
// operation.
TORCHEXT_PTX void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Makes mbarrier.init visible to the async proxy and, in a cluster, to the other CTAs.
TORCHEXT_PTX void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

}  // namespace ptx
