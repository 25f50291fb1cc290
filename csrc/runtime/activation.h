// The activations that fused kernels apply in FP32, on every device.
#pragma once

namespace torchext {

enum class Activation {
  kNone,
  kSwiGLU,    // silu(gate) * up
  kGELU,      // x / 2 * (1 + erf(x / sqrt(2)))
  kGELUTanh,  // its tanh approximation
  kReLU2,     // max(x, 0)^2
};

// A gated activation takes two operands, the gate and up, and gives one value.
constexpr bool is_gated(Activation activation) {
  return activation == Activation::kSwiGLU;
}

}  // namespace torchext
