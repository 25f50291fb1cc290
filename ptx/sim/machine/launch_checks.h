// The checks that CUDA makes before it starts a kernel.
#pragma once

#include "../frontend/ir.h"
#include "launch.h"

namespace torchext::sim {

struct LaunchShape {
  Dim3 cluster;                    // CTAs
  std::uint32_t shared_bytes = 0;  // of a CTA: end of its addresses
  bool reuses_shared = false;      // more CTAs than the GPU holds at once
};

// Throws std::invalid_argument, which names the limit, for a launch that the GPU would refuse.
LaunchShape check_launch(const Program& program, const LaunchOptions& options);

}  // namespace torchext::sim
