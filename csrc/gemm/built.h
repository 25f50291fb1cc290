// Which GEMM kernels this build has. TORCHEXT_ARCHS may leave generations out
// (csrc/build/generations.py); the launchers then link the stand-ins of mma/absent.cpp and
// sm90/absent.cpp.
#pragma once

#include "../runtime/architecture.h"

namespace torchext {

// Raises if this build lacks the kernels of `path`.
void require_built(Path path, const char* op);

}  // namespace torchext

// Whether this build has the kernels of the path with this number (architecture.h). The Python
// package calls it.
extern "C" __attribute__((visibility("default"))) bool torchext_is_path_built(std::int32_t path);
