// Reports as text: each finding with the PTX and CUDA lines it is about, as a compiler prints an
// error.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../frontend/source_map.h"
#include "../machine/launch.h"

namespace torchext::sim {

// The lines that the report's findings quote. Without findings it is empty, because reading a large
// file takes longer than a small launch.
std::shared_ptr<const SourceMap> map_of(const Report& report, const std::vector<SourceText>& ptx);

// `ptx` has the texts of the module; a linked module has several. A CUDA line is quoted if the
// source file that -lineinfo names can be read.
std::string render(const Report& report, const std::string& kernel, const LaunchOptions& options,
                   const std::vector<SourceText>& ptx);

// The same for a grid of a group. `maps` has the texts of all grids' modules, `gpu` is this grid's.
std::string render(const Report& report, const std::string& kernel, const LaunchOptions& options,
                   const std::vector<std::shared_ptr<const SourceMap>>& maps, std::size_t gpu,
                   int device);

const char* name_of(LaunchOptions::Completion completion);

}  // namespace torchext::sim
