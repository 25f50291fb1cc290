// Checks the CPU kernels of one architecture without torch: exit status 0 if all are right.
#include <cstdio>

#include "numbers.h"

namespace cross {
void check_gemm_levels();
void check_quantize_levels();
void check_quantize_tiles();
}  // namespace cross

int main() {
  cross::check_quantize_levels();
  cross::check_quantize_tiles();
  cross::check_gemm_levels();
  std::printf("%d failures\n", cross::failures());
  return cross::failures() != 0;
}
