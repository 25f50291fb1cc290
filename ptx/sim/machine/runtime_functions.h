// Functions that the CUDA runtime links into every kernel: vprintf, __assertfail, malloc, free.
#pragma once

#include <string>

#include "../frontend/decode.h"
#include "calls.h"

namespace torchext::sim {

// Decodes a call of a function without a body; fails if it is none that the runtime provides.
void decode_runtime_call(Decoder& d, const std::string& name, CallPlan plan);
bool is_runtime_function(const std::string& name);

}  // namespace torchext::sim
