// A wgmma that a warp has issued: its quarter of the warpgroup's product, computed when a warp of
// the warpgroup waits for it (or earlier).
#pragma once

#include <cstdint>
#include <vector>

#include "ir.h"

namespace torchext::sim {

class Warp;

struct WgmmaShape;  // wgmma.cpp: what the instruction says

struct PendingWgmma {
  const Instruction* instruction = nullptr;
  std::uint32_t pc = 0;
  std::uint32_t group = 0;
  std::uint64_t a_descriptor = 0, b_descriptor = 0;
  bool accumulate = false;
  bool done = false;
};

void compute(Warp& warp, PendingWgmma& wgmma);

}  // namespace torchext::sim
