// Arithmetic of this thread in one of IEEE 754's rounding modes.
#pragma once

#include <cfenv>

namespace torchext::sim {

// From construction to destruction, f32 and f64 operations round by `mode` (FE_TONEAREST, ...).
// Before and after, they round to nearest. The compiler must not move operations out of the scope,
// so operands must come from memory that it cannot see through, such as the register file, and
// results must go there.
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
