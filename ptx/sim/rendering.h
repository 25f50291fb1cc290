// Reports as text: each finding with the PTX and CUDA lines it is about, as a compiler prints an
// error.
#pragma once

#include <string>

#include "launch.h"

namespace torchext::sim {

// `ptx` is the module's text, `module_name` what to call it. CUDA lines are quoted where the source
// file that -lineinfo names can be read.
std::string render(const Report& report, const std::string& kernel, const LaunchOptions& options,
                   const std::string& ptx, const std::string& module_name);

const char* name_of(LaunchOptions::Completion completion);

}  // namespace torchext::sim
