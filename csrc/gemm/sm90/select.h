// Which Hopper kernel computes a problem on a GPU. A table of measured verdicts (tuned.inc) decides if
// it has the problem, otherwise a cost model. torchext.explain_gemm shows the model's inputs and
// verdict.
#pragma once

#include <string>
#include <vector>

#include "params.h"

namespace torchext::sm90 {

// The facts about a GPU on which the choice depends.
struct Gpu {
  int sm_count;
  int memory_gigabytes_per_second;  // rated; runtime/memory_rate.h
};

// A kernel, and what its cluster does.
struct Choice {
  const GemmKernel* kernel = nullptr;
  uint32_t split_k = 1;    // CTAs that share K, for swapped tiles
  bool multicast = false;  // pairs of CTAs share rows of a, for the others
  uint32_t cluster() const { return multicast ? 2 : split_k; }
};

struct Candidate {
  Choice choice;
  int64_t tiles;  // of the output; an estimate if only the device knows the groups
  int64_t waves;  // in how many rounds the CTAs compute the tiles
  // Cycles that an SM takes for one K block: the largest of the next four.
  double k_block_cycles;
  double tensor_cycles, issue_cycles, shared_cycles, load_cycles;
  double tile_cycles;    // that an SM takes for its tiles of the whole GEMM, if memory keeps up
  double memory_cycles;  // to move the bytes of the whole GEMM: a lower bound
  double cycles;         // for the whole GEMM
};

struct Selection {
  std::vector<Candidate> candidates;  // by cycles, the fewest first
  Choice choice;
  const char* source;  // "cost model", "tuned table" or "forced"
};

// How many clusters run at a time on `sms` SMs. A cluster runs within one GPC. Hopper's GPCs have
// 16 or 18 SMs; clusters of four and eight leave two of 18 SMs unused.
constexpr int64_t clusters_at_a_time(int64_t sms, int64_t cluster) {
  return cluster > 2 && sms >= 16 ? sms / 16 * (16 / cluster) : sms / cluster;
}

Selection explain(const GemmProblem& problem, const Gpu& gpu);

// explain()'s choice. It is remembered for problems that come again.
Choice select(const GemmProblem& problem, const Gpu& gpu);

}  // namespace torchext::sm90
