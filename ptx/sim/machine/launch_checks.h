// What CUDA checks before it starts a kernel.
#pragma once

#include "../frontend/ir.h"
#include "launch.h"

namespace torchext::sim {

struct LaunchShape {
  Dim3 cluster;                    // CTAs
  std::uint32_t shared_bytes = 0;  // of a CTA: end of its addresses
  bool reuses_shared = false;      // more CTAs than the GPU holds at once
};

// Throws std::invalid_argument, with the limit that is exceeded, for a launch that the GPU refuses.
LaunchShape check_launch(const Program& program, const LaunchOptions& options);

}  // namespace torchext::sim
