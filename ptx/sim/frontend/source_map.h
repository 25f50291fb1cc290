// Maps PTX lines to the CUDA lines they come from, by .file and .loc, through inlined functions.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "../machine/launch.h"

namespace torchext::sim {

struct SourceFrame {
  std::string file;  // relative, if below the working directory
  std::uint32_t line = 0;
};

class SourceMap {
 public:
  // Line numbers continue from text to text, as in a linked module.
  explicit SourceMap(const std::vector<SourceText>& texts);

  // The module, and the line in its own text.
  std::pair<std::string, std::uint32_t> place(std::uint32_t number) const;
  // Line `number` (from 1) without its indentation; empty if there is none.
  std::string text(std::uint32_t number) const;
  // CUDA lines of PTX line `number`, innermost inlined function first; empty without -lineinfo.
  std::vector<SourceFrame> frames(std::uint32_t number) const;

 private:
  void add(const std::string& ptx, std::uint32_t module);
  struct Location {
    std::uint32_t ptx_line = 0;
    std::uint32_t module = 0;  // files are numbered in each
    std::uint32_t file = 0, line = 0, column = 0;
    bool inlined = false;
    std::uint32_t at_file = 0, at_line = 0, at_column = 0;
  };

  std::vector<std::string> lines_;
  std::vector<Location> locations_;  // in the order of the text
  std::map<std::pair<std::uint32_t, std::uint32_t>, std::string> files_;  // by module and number
  std::vector<std::pair<std::string, std::uint32_t>> modules_;            // name, lines before it
};

// Line `number` of a source file, without its indentation; empty if it cannot be read.
std::string source_text(const SourceFrame& frame);

}  // namespace torchext::sim
