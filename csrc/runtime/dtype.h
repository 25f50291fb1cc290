// torch's dtypes. nvcc compiles a .cu file once for each architecture (the device passes) and once for
// the host. torch's headers take a device pass longer than a kernel does, so it gets stand-ins.
#pragma once

#include <cstdint>

// The dtypes that the library uses, with torch's numbers.
#define TORCHEXT_DTYPES(APPLY) \
  APPLY(Half, 5) APPLY(Float, 6) APPLY(BFloat16, 15) APPLY(Float8_e5m2, 23) APPLY(Float8_e4m3fn, 24)

#ifdef __CUDA_ARCH__
namespace torch::headeronly {
enum class ScalarType : int8_t {
#define NUMBER(name, number) name = number,
  TORCHEXT_DTYPES(NUMBER)
#undef NUMBER
};
}  // namespace torch::headeronly
#else
#include <torch/headeronly/core/ScalarType.h>
#define NUMBER(name, number) \
  static_assert(torch::headeronly::ScalarType::name == torch::headeronly::ScalarType(number));
TORCHEXT_DTYPES(NUMBER)
#undef NUMBER
#endif

namespace torchext {
using torch::headeronly::ScalarType;
}
