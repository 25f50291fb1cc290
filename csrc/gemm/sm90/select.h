// Which Hopper kernel computes a problem: a table of measured verdicts (tuned.inc) where it has
// one, else a cost model, whose inputs and verdict torchext.explain_gemm shows.
#pragma once

#include <string>
#include <vector>

#include "params.h"

namespace torchext::sm90 {

// A kernel, and what its cluster does.
struct Choice {
  const GemmKernel* kernel = nullptr;
  uint32_t split_k = 1;    // CTAs that share K, for swapped tiles
  bool multicast = false;  // pairs of CTAs share rows of a, for the others
  uint32_t cluster() const { return multicast ? 2 : split_k; }
};

struct Candidate {
  Choice choice;
  int64_t tiles;  // of the output; an estimate where groups are counted on the device
  int64_t waves;  // rounds in which the CTAs compute them
  // Cycles of an SM for one K block: the most of the four that follow.
  double k_block_cycles;
  double tensor_cycles, issue_cycles, shared_cycles, load_cycles;
  double memory_cycles;  // for the whole product: to move its bytes, a lower bound
  double cycles;         // for the whole product
};

struct Selection {
  std::vector<Candidate> candidates;  // by cycles, the fewest first
  Choice choice;
  const char* source;  // "cost model", "tuned table" or "forced"
};

// Clusters that run at a time on so many SMs. A cluster lies within a GPC. Hopper's GPCs have 16 or
// 18 SMs, and clusters of four and eight leave two of 18 unused.
constexpr int64_t clusters_at_a_time(int64_t sms, int64_t cluster) {
  return cluster > 2 && sms >= 16 ? sms / 16 * (16 / cluster) : sms / cluster;
}

Selection explain(const GemmProblem& problem, int sm_count);

// The same choice, remembered for problems that come again.
Choice select(const GemmProblem& problem, int sm_count);

}  // namespace torchext::sm90
