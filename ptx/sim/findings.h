// What the checker reports: one struct per fault, collected across threads, one per kind and line.
#pragma once

#include <cstdint>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
#include <vector>

namespace torchext::sim {

struct Finding {
  std::string kind;     // "data race", "out of bounds", ...
  std::string message;  // one sentence
  std::string kernel;
  std::uint32_t ptx_line = 0;
  std::string opcode;
  std::string file;  // of the CUDA source, with -lineinfo
  std::uint32_t source_line = 0;
  std::uint32_t cta[3] = {0, 0, 0};
  std::uint32_t warp = 0;
  std::uint32_t lanes = 0;  // mask
  std::uint64_t address = 0;
  std::string other;  // the access or event it collides with; empty if none
  std::uint32_t other_ptx_line = 0;
  std::string remedy;
  std::uint64_t seed = 0;
};

// The usual remedy for a kind of finding, in one sentence.
const char* remedy_for(const std::string& kind);

class FindingSink {
 public:
  explicit FindingSink(std::size_t cap) : cap_(cap) {}
  void add(Finding finding);
  std::vector<Finding> take();  // in a stable order
  bool full() const { return full_; }

 private:
  std::mutex mutex_;
  std::size_t cap_;
  bool full_ = false;
  std::set<std::tuple<std::string, std::uint32_t, std::uint32_t>> seen_;
  std::vector<Finding> findings_;
};

}  // namespace torchext::sim
