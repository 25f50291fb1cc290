// Matrices as kernels see them: plain structs passed by value, read and written 16 elements at a
// time, 16 bytes an access where the layout allows and element by element at ragged edges.
#pragma once

#include "../../runtime/check.h"
#include "formats.cuh"

namespace torchext::sm90 {

struct Source {
  const uint8_t* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;  // elements
  bool aligned;                    // rows are contiguous and start at multiples of 16 bytes
};

struct Sink {
  uint8_t* data;
  int64_t data_stride;  // bytes between rows, a multiple of 16
  float* scale;
  int64_t scale_row_stride, scale_col_stride;

  __device__ void store_scale(int64_t row, int64_t col, float value) const {
    scale[row * scale_row_stride + col * scale_col_stride] = value;
  }
};

// Elements (row, col) to (row, col + 15); zeros beyond the edges.
template <class In>
__device__ Elements16<In> load16(const Source& x, int64_t row, int64_t col) {
  constexpr int kBytes = 4 / In::kPerWord;
  Elements16<In> e = {};
  if (row >= x.rows) return e;
  const uint8_t* address = x.data + (row * x.row_stride + col * x.col_stride) * kBytes;
  if (x.aligned && col + 16 <= x.cols) {
#pragma unroll
    for (int i = 0; i < Elements16<In>::kWords / 4; ++i) {
      const uint4 chunk = __ldg(reinterpret_cast<const uint4*>(address) + i);
      e.words[4 * i] = chunk.x;
      e.words[4 * i + 1] = chunk.y;
      e.words[4 * i + 2] = chunk.z;
      e.words[4 * i + 3] = chunk.w;
    }
    return e;
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (col + i < x.cols) {
      const uint8_t* element = address + i * x.col_stride * kBytes;
      if constexpr (In::kPerWord == 2)
        e.words[i / 2] |= uint32_t(__ldg(reinterpret_cast<const uint16_t*>(element))) << i % 2 * 16;
      else
        e.words[i] = __ldg(reinterpret_cast<const uint32_t*>(element));
    }
  }
  return e;
}

// Bytes col to col + 15 of a row of `cols` bytes that starts at `row`, a multiple of 16. What
// follows the row's last element is left alone: nothing there need belong to the tensor.
__device__ inline void store16(uint8_t* row, int64_t col, int64_t cols, const uint4& bytes) {
  if (col + 16 <= cols) {
    *reinterpret_cast<uint4*>(row + col) = bytes;
    return;
  }
  const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
  for (int i = 0; i < 16; ++i)
    if (col + i < cols) row[col + i] = uint8_t(words[i / 4] >> i % 4 * 8);
}

inline bool is_aligned(const void* data, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_bytes % 16 == 0;
}

inline Source source_of(const MatrixView& x) {
  return {static_cast<const uint8_t*>(x.data),
          x.rows,
          x.cols,
          x.row_stride,
          x.col_stride,
          x.col_stride == 1 && is_aligned(x.data, x.row_stride * element_size(x.dtype))};
}

inline Sink sink_of(const QuantizedView& out) {
  TORCHEXT_CHECK(is_aligned(out.data, out.data_stride),
                 "quantised rows must start at multiples of 16 bytes");
  return {static_cast<uint8_t*>(out.data), out.data_stride, out.scale, out.scale_row_stride,
          out.scale_col_stride};
}

// Kernels count tiles in 32 bits; memory ends long before they do.
inline Dim3 grid_of(int64_t blocks) {
  TORCHEXT_CHECK(blocks <= INT32_MAX, "quantiser launch of ", blocks, " blocks: too large");
  return {uint32_t(blocks)};
}

}  // namespace torchext::sm90
