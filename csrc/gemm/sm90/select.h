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
  int64_t tiles;  // of the output, or, where rows of groups are counted on the device, expected
  int64_t waves;  // rounds of the CTAs to compute them
  double k_block_cycles;  // the slowest of what a K block asks of an SM:
  double tensor_cycles, issue_cycles, shared_cycles, load_cycles;
  double memory_cycles;  // of the whole product: to move its bytes, and not less can it take
  double cycles;         // of the whole product
};

struct Selection {
  std::vector<Candidate> candidates;  // by cycles, the fewest first
  Choice choice;
  const char* source;  // "cost model", "tuned table" or "forced"
};

// Features of the output: SwiGLU's b has the gate's and up's.
inline int64_t features(const GemmProblem& p) {
  return p.activation == Activation::kSwiGLU ? p.n / 2 : p.n;
}

// Clusters that run at a time on so many SMs. One lies within a GPC, of which Hopper's have 16 or
// 18 SMs: of 18, two are left over by clusters of four and eight.
constexpr int64_t clusters_at_a_time(int64_t sms, int64_t cluster) {
  return cluster > 2 && sms >= 16 ? sms / 16 * (16 / cluster) : sms / cluster;
}

Selection explain(const GemmProblem& problem, int sm_count);

// The same choice, remembered for problems that come again.
Choice select(const GemmProblem& problem, int sm_count);

}  // namespace torchext::sm90
