// CPU quantisers: the loops of cpu_kernels.h compiled for three instruction sets, the best that the
// machine has picked once, rows spread over torch's threads.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "../runtime/formats.h"
#include "quantize.h"

namespace torchext {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TORCHEXT_X86
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace avx512 {
#include "cpu_kernels.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#include "cpu_kernels.h"
}
#pragma GCC pop_options
#endif
namespace baseline {
#include "cpu_kernels.h"
}

namespace {

// The outer functions of cpu_kernels.h for one format, as compiled for one instruction set.
struct Kernels {
  decltype(&baseline::groups_of_rows<E4M3>) groups_of_rows;
  decltype(&baseline::groups_both_ways<E4M3>) groups_both_ways;
  decltype(&baseline::blocks_of_rows<E4M3>) blocks_of_rows;
  decltype(&baseline::amax_bits_of_row) amax_bits_of_row;
  decltype(&baseline::encode_row<E4M3>) encode_row;
  decltype(&baseline::decode_row<E4M3>) decode_row;
};

#define TORCHEXT_KERNELS(ISA)                                                                   \
  Kernels {                                                                                     \
    &ISA::groups_of_rows<Format>, &ISA::groups_both_ways<Format>, &ISA::blocks_of_rows<Format>, \
        &ISA::amax_bits_of_row, &ISA::encode_row<Format>, &ISA::decode_row<Format>              \
  }

template <class Format>
Kernels pick() {
#ifdef TORCHEXT_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512cd"))
    return TORCHEXT_KERNELS(avx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2"))
    return TORCHEXT_KERNELS(avx2);
#endif
  return TORCHEXT_KERNELS(baseline);
}

const Kernels& kernels(bool e5m2) {
  static const Kernels of_e4m3 = pick<E4M3>(), of_e5m2 = pick<E5M2>();
  return e5m2 ? of_e5m2 : of_e4m3;
}

// body(begin, end) over [0, rows), in shares of at least `kElements` elements.
template <class Body>
void parallel_rows(int64_t rows, int64_t cols, const Body& body) {
  constexpr int64_t kElements = 1 << 15;
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kElements / std::max<int64_t>(cols, 1)),
                              body);
}

// body(begin) for every kGroup-th row.
template <class Body>
void parallel_tile_rows(const MatrixView& x, const Body& body) {
  parallel_rows(ceil_div(x.rows, kGroup), x.cols * kGroup, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i * kGroup);
  });
}

}  // namespace

void quantize_groups_cpu(const MatrixView& x, const QuantizeOptions& options,
                         const QuantizedView* row, const QuantizedView* transposed) {
  const Kernels& k = kernels(options.e5m2);
  if (transposed == nullptr) {
    parallel_rows(x.rows, x.cols, [&](int64_t begin, int64_t end) {
      k.groups_of_rows(x, options.pow2_scale, *row, begin, end);
    });
  } else {
    parallel_tile_rows(x, [&](int64_t begin) {
      k.groups_both_ways(x, options.pow2_scale, row, *transposed, begin);
    });
  }
}

void quantize_blocks_cpu(const MatrixView& x, const QuantizeOptions& options,
                         const QuantizedView& out, void* transposed_data,
                         int64_t transposed_stride) {
  const Kernels& k = kernels(options.e5m2);
  parallel_tile_rows(x, [&](int64_t begin) {
    k.blocks_of_rows(x, options.pow2_scale, out, static_cast<uint8_t*>(transposed_data),
                     transposed_stride, begin);
  });
}

void quantize_rowwise_cpu(const MatrixView& x, const QuantizeOptions& options,
                          const QuantizedView& out) {
  const Kernels& k = kernels(options.e5m2);
  const float fp8_max = options.e5m2 ? E5M2::kMax : E4M3::kMax;
  parallel_rows(x.rows, x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float scale = scale_of(k.amax_bits_of_row(x, row), fp8_max, options.pow2_scale);
      out.scale[row * out.scale_row_stride] = scale;
      k.encode_row(x, row, scale, out);
    }
  });
}

void quantize_tensorwise_cpu(const MatrixView& x, const QuantizeOptions& options,
                             const QuantizedView& out) {
  const Kernels& k = kernels(options.e5m2);
  std::atomic<uint32_t> amax{0};
  parallel_rows(x.rows, x.cols, [&](int64_t begin, int64_t end) {
    uint32_t share = 0;
    for (int64_t row = begin; row < end; ++row) share = std::max(share, k.amax_bits_of_row(x, row));
    uint32_t seen = amax.load();
    while (share > seen && !amax.compare_exchange_weak(seen, share)) {
    }
  });
  const float scale =
      scale_of(amax.load(), options.e5m2 ? E5M2::kMax : E4M3::kMax, options.pow2_scale);
  out.scale[0] = scale;
  parallel_rows(x.rows, x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) k.encode_row(x, row, scale, out);
  });
}

void dequantize_cpu(const DequantizeView& view) {
  const Kernels& k = kernels(view.e5m2);
  parallel_rows(view.rows, view.cols, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) k.decode_row(view, row);
  });
}

}  // namespace torchext
