// Loops whose index is a constant in every step.
#pragma once

#include <utility>

namespace torchext {

template <int value>
struct Constant {
  __device__ constexpr operator int() const { return value; }
};

template <class Body, int... indices>
__device__ __forceinline__ void unrolled(const Body& body, std::integer_sequence<int, indices...>) {
  (body(Constant<indices>()), ...);
}

// Calls body(Constant<i>()) for each i below `count`. An array stays in registers only if all its
// indices are constants: use this where the compiler would not unroll a `for` loop.
template <int count, class Body>
__device__ __forceinline__ void unrolled(const Body& body) {
  unrolled(body, std::make_integer_sequence<int, count>());
}

}  // namespace torchext
