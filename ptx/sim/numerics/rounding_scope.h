// Arithmetic of this thread in one of IEEE 754's rounding modes.
#pragma once

#include <cfenv>

namespace torchext::sim {

// Between construction and destruction, f32 and f64 operations round by `mode` (FE_TONEAREST, ...);
// before and after, to nearest. Operands must be loaded from memory that the compiler cannot see
// through, and results stored there, so that no operation is moved out of the scope: the register
// file is such memory.
class RoundingScope {
 public:
  explicit RoundingScope(int mode) : directed_(mode != FE_TONEAREST) {
    if (directed_) std::fesetround(mode);
  }
  ~RoundingScope() {
    if (directed_) std::fesetround(FE_TONEAREST);
  }
  RoundingScope(const RoundingScope&) = delete;
  RoundingScope& operator=(const RoundingScope&) = delete;

 private:
  bool directed_;
};

}  // namespace torchext::sim
