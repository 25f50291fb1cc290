// The operands of an activation in registers, 16 columns at a time, and the activation of them.
#pragma once

#include "../../device/quantize_groups.cuh"
#include "../activation.h"

namespace torchext::quantizers {

using activation_math::Curve;
using activation_math::multiply;

// Calls body(Curve()) for a function that is only known at run time: one branch for all the
// elements in `body`.
template <class Body>
__device__ __forceinline__ void with_curve(Function function, const Body& body) {
  switch (function) {
    case Function::kSiLU:
      return body(Curve<Function::kSiLU>());
    case Function::kGELU:
      return body(Curve<Function::kGELU>());
    case Function::kGELUTanh:
      return body(Curve<Function::kGELUTanh>());
    default:
      return body(Curve<Function::kReLU2>());
  }
}

// An activation's operands in memory. `x` has the gates; `up_offset` bytes after a gate lies its up.
struct Operands {
  Source x;
  int64_t up_offset;
  Function function;
  bool gated;
};

inline Operands operands_of(const ActivationView& x) {
  const int64_t size = element_size(x.dtype);
  Operands operands{source_of({x.data, x.dtype, x.rows, x.cols, x.row_stride, x.col_stride}),
                    x.cols * x.col_stride * size, x.function, x.gated};
  if (x.gated) operands.x.aligned &= operands.up_offset % 16 == 0;
  return operands;
}

template <class In>
struct Loaded {
  Elements16<In> gate, up;
};

// Calls use(i, load(i)) for every i below n, with the next load under way. A rolled loop: the code
// of an activation of 16 elements is long.
template <int n, class Load, class Use>
__device__ void for_each_ahead(const Load& load, const Use& use) {
  auto next = load(0);
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    const auto now = next;
    if (i + 1 < n) next = load(i + 1);
    use(i, now);
  }
}

template <class In>
__device__ Elements16<f32> activated(const Operands& operands, const Loaded<In>& loaded) {
  Elements16<f32> y;
  with_curve(operands.function, [&](auto curve) {
#pragma unroll
    for (int i = 0; i < 16; ++i) y.words[i] = bits_of(curve.value(loaded.gate.at(i)));
  });
  if (operands.gated) {
#pragma unroll
    for (int i = 0; i < 16; ++i)
      y.words[i] = bits_of(multiply(float_of(y.words[i]), loaded.up.at(i)));
  }
  return y;
}

}  // namespace torchext::quantizers
