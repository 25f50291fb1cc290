// From PTX lines to the CUDA lines they were compiled from: .file and .loc, inlining included.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace torchext::sim {

struct SourceFrame {
  std::string file;  // relative to the working directory where it lies below it
  std::uint32_t line = 0;
};

class SourceMap {
 public:
  explicit SourceMap(const std::string& ptx);

  // Line `number` (from 1) without its indentation; empty if there is none.
  std::string text(std::uint32_t number) const;
  // Where PTX line `number` comes from, innermost inlined function first; empty without -lineinfo.
  std::vector<SourceFrame> frames(std::uint32_t number) const;

 private:
  struct Location {
    std::uint32_t ptx_line = 0;
    std::uint32_t file = 0, line = 0, column = 0;
    bool inlined = false;
    std::uint32_t at_file = 0, at_line = 0, at_column = 0;
  };

  std::vector<std::string> lines_;
  std::vector<Location> locations_;  // in the order of the text
  std::map<std::uint32_t, std::string> files_;
};

// Line `number` of a source file, without its indentation; empty if it cannot be read.
std::string source_text(const SourceFrame& frame);

}  // namespace torchext::sim
