// The wgmmas that a warp has issued. Each is a quarter of the warpgroup's product, and is computed
// when a warp of the warpgroup waits for it, or earlier.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "../check/clock.h"
#include "../frontend/ir.h"

namespace torchext::sim {

class Warp;

struct WgmmaShape;  // wgmma.cpp: the operands

struct PendingWgmma {
  const Instruction* instruction = nullptr;
  std::uint32_t pc = 0;
  std::uint32_t group = 0;
  std::uint64_t a_descriptor = 0, b_descriptor = 0;
  bool accumulate = false;
  bool done = false;
  // State of the warp when it issued the wgmma.
  std::uint32_t lanes = 0, clock = 0;
  Knowledge knowledge;
};

// A wgmma that some of the four warps of a warpgroup have issued.
struct WgmmaRecord {
  std::uint32_t pc = 0;
  std::uint64_t a = 0, b = 0;
  bool accumulate = false;
  std::vector<std::pair<Warp*, std::shared_ptr<PendingWgmma>>> parts;
};

// State that the warps of a warpgroup share.
struct Warpgroup {
  std::map<std::uint32_t, WgmmaRecord> open;     // by number in the sequence of wgmmas
  std::map<std::uint32_t, Knowledge> knowledge;  // by group: of all four warps at its last wgmma
  std::uint32_t waited_for[4] = {};              // last group, by warp

  // What a warp knows of the other warps after it has waited for the groups up to `group`.
  Knowledge waited(std::uint32_t warp, std::uint32_t group) {
    waited_for[warp] = group;
    const auto last = knowledge.upper_bound(group);
    const Knowledge known = last == knowledge.begin() ? Knowledge{} : std::prev(last)->second;
    const std::uint32_t all = *std::min_element(waited_for, waited_for + 4);
    if (const auto needed = knowledge.upper_bound(all); needed != knowledge.begin())
      knowledge.erase(knowledge.begin(), std::prev(needed));
    return known;
  }
};

void compute(Warp& warp, PendingWgmma& wgmma);

}  // namespace torchext::sim
