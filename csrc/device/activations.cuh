// The activations of csrc/runtime/activation.h on FP32 values in registers. There are two sets: one
// uses the math library, for kernels that wait for memory anyway; the other uses approximate
// instructions, for epilogues whose issue slots are scarce. NaN stays NaN in both. Errors:
// docs/numerics.md.
#pragma once

#include "../runtime/activation.h"

namespace torchext {

// `gate` is the gate of SwiGLU; other activations do not use it.
__device__ __forceinline__ float activate(Activation activation, float gate, float x) {
  switch (activation) {
    case Activation::kSwiGLU:
      return gate / (1.0f + expf(-gate)) * x;
    case Activation::kGELU:
      return 0.5f * x * erfcf(x * -0.70710678f);  // exact in the tail
    case Activation::kGELUTanh:
      // (1 + tanh u) / 2 = 1 / (1 + e^(-2u))
      return x / (1.0f + expf(-1.5957691f * (x + 0.044715f * x * x * x)));
    case Activation::kReLU2:
      return x > 0 ? x * x : x == x ? 0.0f : x;
    default:
      return x;
  }
}

// x * sigmoid(argument), within a few units in the last place: exp by ex2.approx, the quotient by
// div.approx.
__device__ __forceinline__ float times_sigmoid_approximate(float x, float argument) {
  return __fdividef(x, 1.0f + __expf(-argument));
}

// SwiGLU: gate * sigmoid(gate) * up.
__device__ __forceinline__ float swiglu_approximate(float gate, float up) {
  return times_sigmoid_approximate(gate, gate) * up;
}

// The activations that take one operand.
__device__ __forceinline__ float activate_approximate(Activation activation, float x) {
  switch (activation) {
    case Activation::kGELU:
      return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::kGELUTanh:  // (1 + tanh(u)) / 2 is the sigmoid of 2 u
      return times_sigmoid_approximate(x, 1.5957691f * fmaf(0.044715f * x * x, x, x));
    default: {
      const float positive = x < 0 ? 0 : x;
      return positive * positive;
    }
  }
}

}  // namespace torchext
