// The checker's findings: one struct per fault. Equal faults are kept once per kind and lines.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace torchext::sim {

enum class FindingKind : std::uint8_t {
#define FINDING(identifier, ...) identifier,
#include "finding_kinds.inc"
#undef FINDING
};

enum class Grade : std::uint8_t { error, note };

// A row of finding_kinds.inc.
struct KindRow {
  FindingKind kind;
  Grade grade;
  const char* name;    // in reports: "data race"
  const char* remedy;  // one sentence
  const char* example;
};

const std::vector<KindRow>& finding_kinds();  // in the order of FindingKind
const KindRow& row_of(FindingKind kind);
const char* name_of(Grade grade);
std::string hex(std::uint64_t value);  // "0x1f", for messages

// The other access or event of a finding: the one that the instruction conflicts with.
struct OtherAccess {
  std::string what;  // empty if there is none
  std::uint32_t ptx_line = 0;
  int device = -1;        // in a group of GPUs
  std::uint32_t gpu = 0;  // the place of its grid in the group: whose module ptx_line is of
  std::optional<std::array<std::uint32_t, 3>> cta;  // the parts that are known
  std::int32_t warp = -1, lane = -1;
};

struct Finding {
  FindingKind kind = FindingKind::invalid_operand;
  std::string message;  // one sentence
  std::string kernel;
  std::uint32_t ptx_line = 0;
  std::string opcode;
  std::string file;  // of the CUDA source, with -lineinfo
  std::uint32_t source_line = 0;
  int device = -1;  // in a group of GPUs
  std::uint32_t cta[3] = {0, 0, 0};
  std::uint32_t warp = 0;
  std::uint32_t lanes = 0;  // mask
  std::uint64_t address = 0;
  OtherAccess other;
  std::string remedy;  // if empty, the kind's remedy applies
  std::uint64_t seed = 0;

  Grade grade() const { return row_of(kind).grade; }
};

class FindingSink {
 public:
  // Keeps up to `cap` errors and as many notes, so that notes never crowd out an error. Of more, the
  // last in a report of the kind that has the most is dropped; of equal findings, that of the larger
  // CTA. Neither depends on which host thread is the first.
  explicit FindingSink(std::size_t cap) : cap_(cap) {}
  void add(Finding finding);
  std::vector<Finding> take();  // errors first, in a stable order
  bool full() const { return full_; }

 private:
  std::mutex mutex_;
  std::size_t cap_;
  bool full_ = false;
  std::size_t kept_[2] = {0, 0};  // by grade
  std::vector<Finding> findings_;
};

}  // namespace torchext::sim
