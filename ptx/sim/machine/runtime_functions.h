// Functions that the CUDA runtime provides to kernels: vprintf, __assertfail, malloc, free.
#pragma once

#include <string>

#include "../frontend/decode.h"
#include "calls.h"

namespace torchext::sim {

// Decodes a call of a function without a body. Fails if the runtime does not provide it.
void decode_runtime_call(Decoder& d, const std::string& name, CallPlan plan);
bool is_runtime_function(const std::string& name);

}  // namespace torchext::sim
