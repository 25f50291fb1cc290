// The loops of kernels.h, which the compiler vectorizes for the instruction set of the file that
// includes this one, under its `#pragma GCC target` and inside an unnamed namespace. There is no
// include guard. Products and sums round one by one: the including file forbids the compiler to fuse
// them.

template <int count>
inline __attribute__((always_inline)) void add_neighbors(const float* __restrict from,
                                                         float* __restrict to) {
  for (int i = 0; i < count; ++i) to[i] = from[2 * i] + from[2 * i + 1];
}

// The tree over a segment, from its sums of two neighbors.
inline __attribute__((always_inline)) float tree(float (&pairs)[kSegment / 2]) {
  alignas(64) float sums[kSegment / 4];
  static_assert(kSegment == 512);
  add_neighbors<128>(pairs, sums);
  add_neighbors<64>(sums, pairs);
  add_neighbors<32>(pairs, sums);
  add_neighbors<16>(sums, pairs);
  add_neighbors<8>(pairs, sums);
  add_neighbors<4>(sums, pairs);
  add_neighbors<2>(pairs, sums);
  add_neighbors<1>(sums, pairs);
  return pairs[0];
}

// The pairwise sum of term(i) for i below n. A segment's terms beyond n are +0.
template <class Term>
inline __attribute__((always_inline)) float pairwise_sum(int64_t n, const Term& term) {
  alignas(64) float terms[kSegment], pairs[kSegment / 2];
  float sum = 0;
  for (int64_t first = 0; first < n; first += kSegment) {
    if (first + kSegment <= n) {
      for (int i = 0; i < kSegment; ++i) terms[i] = term(first + i);
    } else {
      for (int i = 0; i < kSegment; ++i) terms[i] = first + i < n ? term(first + i) : 0.0f;
    }
    add_neighbors<kSegment / 2>(terms, pairs);
    sum += tree(pairs);
  }
  return sum;
}

// The same for terms of neighboring BF16 elements, which share a word.
template <class Term>
inline __attribute__((always_inline)) float pairwise_sum_bf16(const uint16_t* x, int64_t n,
                                                              const Term& term) {
  alignas(64) float pairs[kSegment / 2];
  float sum = 0;
  int64_t first = 0;
  for (; first + kSegment <= n; first += kSegment) {
    for (int i = 0; i < kSegment / 2; ++i) {
      uint32_t word;
      std::memcpy(&word, x + first + 2 * i, sizeof word);
      pairs[i] = term(float_of(word << 16)) + term(float_of(word & 0xffff0000));
    }
    sum += tree(pairs);
  }
  if (first == n) return sum;
  return sum +
         pairwise_sum(n - first, [&](int64_t i) { return term(BFloat16::to_float(x[first + i])); });
}

template <class In>
struct Rows {
  using Bits = typename In::Bits;

  template <class Term>
  static inline __attribute__((always_inline)) float sum_of(const void* h, int64_t n,
                                                            const Term& term) {
    const auto* from = static_cast<const Bits*>(h);
    if constexpr (std::is_same_v<In, BFloat16>)
      return pairwise_sum_bf16(from, n, term);
    else
      return pairwise_sum(n, [&](int64_t i) { return term(In::to_float(from[i])); });
  }

  static void add(const void* x, const void* residual, int64_t n, void* sum) {
    const auto* __restrict a = static_cast<const Bits*>(x);
    const auto* __restrict b = static_cast<const Bits*>(residual);
    auto* __restrict to = static_cast<Bits*>(sum);
    for (int64_t i = 0; i < n; ++i) to[i] = In::from_float(In::to_float(a[i]) + In::to_float(b[i]));
  }

  static float sum(const void* h, int64_t n) {
    return sum_of(h, n, [](float value) { return value; });
  }

  static float sum_squares(const void* h, int64_t n) {
    return sum_of(h, n, [](float value) { return value * value; });
  }

  static float sum_squared_deviations(const void* h, int64_t n, float mean) {
    return sum_of(h, n, [mean](float value) {
      const float deviation = value - mean;
      return deviation * deviation;
    });
  }

  static void normalize(const void* h, int64_t n, float mean, float rstd, const float* w,
                        const float* bias, float* y) {
    const auto* __restrict from = static_cast<const Bits*>(h);
    const float* __restrict factors = w;
    const float* __restrict shifts = bias;
    float* __restrict to = y;
    if (bias == nullptr) {
      for (int64_t i = 0; i < n; ++i) to[i] = ((In::to_float(from[i]) - mean) * rstd) * factors[i];
    } else {
      for (int64_t i = 0; i < n; ++i)
        to[i] = ((In::to_float(from[i]) - mean) * rstd) * factors[i] + shifts[i];
    }
  }

  static void round(float* y, int64_t n, void* rounded) {
    float* __restrict values = y;
    auto* __restrict to = static_cast<Bits*>(rounded);
    for (int64_t i = 0; i < n; ++i) {
      to[i] = In::from_float(values[i]);
      values[i] = In::to_float(to[i]);
    }
  }

  static float sum_weighted(const void* g, const float* w, int64_t n) {
    const auto* from = static_cast<const Bits*>(g);
    return pairwise_sum(n, [&](int64_t i) { return In::to_float(from[i]) * w[i]; });
  }

  static float sum_products(const void* g, const void* h, const float* w, int64_t n, float mean,
                            float rstd) {
    const auto* grad = static_cast<const Bits*>(g);
    const auto* from = static_cast<const Bits*>(h);
    return pairwise_sum(n, [&](int64_t i) {
      return (In::to_float(grad[i]) * w[i]) * ((In::to_float(from[i]) - mean) * rstd);
    });
  }

  template <bool kResidual, bool kBias>
  static void gradient_loop(const Bits* __restrict grad, const Bits* __restrict from,
                            const float* __restrict w, int64_t n, float mean, float rstd,
                            float first, float second, const Bits* __restrict residual,
                            Bits* __restrict to, float* __restrict dweight,
                            float* __restrict dbias) {
    for (int64_t i = 0; i < n; ++i) {
      const float gradient = In::to_float(grad[i]);
      const float normed = (In::to_float(from[i]) - mean) * rstd;
      const float result = rstd * ((gradient * w[i] - first) - normed * second);
      dweight[i] += gradient * normed;
      if constexpr (kBias) dbias[i] += gradient;
      if constexpr (kResidual)
        to[i] = In::from_float(result + In::to_float(residual[i]));
      else
        to[i] = In::from_float(result);
    }
  }

  static void gradient(const void* g, const void* h, const float* w, int64_t n, float mean,
                       float rstd, float first, float second, const void* residual_grad, void* dx,
                       float* dweight, float* dbias) {
    const auto loop = residual_grad
                          ? (dbias ? gradient_loop<true, true> : gradient_loop<true, false>)
                      : dbias ? gradient_loop<false, true>
                              : gradient_loop<false, false>;
    loop(static_cast<const Bits*>(g), static_cast<const Bits*>(h), w, n, mean, rstd, first, second,
         static_cast<const Bits*>(residual_grad), static_cast<Bits*>(dx), dweight, dbias);
  }

  static constexpr RowKernels kernels() {
    return {add,          sum,          sum_squares, sum_squared_deviations, normalize, round,
            sum_weighted, sum_products, gradient};
  }
};

constexpr Kernels make_kernels() {
  return {{Rows<BFloat16>::kernels(), Rows<Half>::kernels(), Rows<Float>::kernels()}};
}
