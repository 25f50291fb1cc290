// Matrices as kernels see them: structs passed by value. Kernels read and write 16 elements at a
// time, with 16-byte accesses where the layout allows, and element by element at ragged edges. Host
// code makes the structs from the views of csrc/runtime/views.h.
#pragma once

#include "../runtime/check.h"
#include "../runtime/device.h"
#include "../runtime/views.h"
#include "formats.cuh"

namespace torchext::quantizers {

struct Source {
  const uint8_t* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;  // bytes
  bool aligned;                    // rows are contiguous and start at multiples of 16 bytes

  __device__ const uint8_t* at(int64_t row, int64_t col) const {
    return data + row * row_stride + col * col_stride;
  }
};

struct Sink {
  uint8_t* data;
  int64_t data_stride;  // bytes between rows, a multiple of 16
  float* scale;
  int64_t scale_row_stride, scale_col_stride;

  __device__ uint8_t* at(int64_t row, int64_t col) const { return data + row * data_stride + col; }
  __device__ float* scale_at(int64_t row, int64_t col) const {
    return scale + row * scale_row_stride + col * scale_col_stride;
  }
};

// How many of the `count` positions that begin at `first` are below `end`.
__device__ inline int valid_of(int64_t first, int64_t end, int count) {
  return int(max(int64_t(0), min(end - first, int64_t(count))));
}

// Loads the first `valid` of 16 elements of a row, `stride` bytes apart; the others are zero.
// `aligned`: the elements are contiguous and `address` is a multiple of 16.
template <class In>
__device__ Elements16<In> load16(const uint8_t* address, int64_t stride, bool aligned, int valid) {
  Elements16<In> e = {};
  if (aligned && valid == 16) {
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
    if (i < valid) {
      if constexpr (In::kPerWord == 4)
        e.words[i / 4] |= uint32_t(__ldg(address)) << i % 4 * 8;
      else if constexpr (In::kPerWord == 2)
        e.words[i / 2] |= uint32_t(__ldg(reinterpret_cast<const uint16_t*>(address))) << i % 2 * 16;
      else
        e.words[i] = __ldg(reinterpret_cast<const uint32_t*>(address));
    }
    address += stride;
  }
  return e;
}

// Calls use(i, load(i)) for every i below n. `together`: all loads are in flight before the first
// use. Otherwise they run one after another, which is less code, for edges.
template <class In, int n, bool together, class Load, class Use>
__device__ void for_each_loaded(Load load, Use use) {
  if constexpr (together) {
    Elements16<In> e[n];
#pragma unroll
    for (int i = 0; i < n; ++i) e[i] = load(i);
#pragma unroll
    for (int i = 0; i < n; ++i) use(i, e[i]);
  } else {
#pragma unroll 1
    for (int i = 0; i < n; ++i) use(i, load(i));
  }
}

// Stores the first `valid` of 16 bytes; `address` is a multiple of 16. Bytes after a row's last
// element are not written, since they need not belong to the tensor.
__device__ inline void store16(uint8_t* address, int valid, const uint4& bytes) {
  if (valid == 16) {
    *reinterpret_cast<uint4*>(address) = bytes;
    return;
  }
  const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
  for (int i = 0; i < 16; ++i)
    if (i < valid) address[i] = uint8_t(words[i / 4] >> i % 4 * 8);
}

// Stores the first `valid` of 16 elements. `aligned`: the address is a multiple of 16.
template <class In>
__device__ void store_elements16(uint8_t* address, bool aligned, int valid,
                                 const Elements16<In>& e) {
  if (aligned && valid == 16) {
#pragma unroll
    for (int i = 0; i < Elements16<In>::kWords; i += 4)
      reinterpret_cast<uint4*>(address)[i / 4] = {e.words[i], e.words[i + 1], e.words[i + 2],
                                                  e.words[i + 3]};
    return;
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (i >= valid) continue;
    if constexpr (In::kPerWord == 2)
      reinterpret_cast<uint16_t*>(address)[i] = uint16_t(e.words[i / 2] >> i % 2 * 16);
    else
      reinterpret_cast<uint32_t*>(address)[i] = e.words[i];
  }
}

inline bool is_aligned(const void* data, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_bytes % 16 == 0;
}

inline Source source_of(const MatrixView& x) {
  const int64_t row_stride = x.row_stride * element_size(x.dtype);
  const int64_t col_stride = x.col_stride * element_size(x.dtype);
  return {static_cast<const uint8_t*>(x.data),
          x.rows,
          x.cols,
          row_stride,
          col_stride,
          x.col_stride == 1 && is_aligned(x.data, row_stride)};
}

inline Sink sink_of(const QuantizedView& out) {
  TORCHEXT_CHECK(is_aligned(out.data, out.data_stride),
                 "quantized rows must start at multiples of 16 bytes");
  return {static_cast<uint8_t*>(out.data), out.data_stride, out.scale, out.scale_row_stride,
          out.scale_col_stride};
}

// A grid of enough CTAs for `tiles`. Kernels count tiles in 32 bits, which no tensor that fits in
// memory exceeds.
inline Dim3 grid_of(int64_t tiles, int64_t tiles_per_block) {
  TORCHEXT_CHECK(tiles <= INT32_MAX, "quantizer launch of ", tiles, " tiles: too large");
  return {uint32_t(ceil_div(tiles, tiles_per_block))};
}

}  // namespace torchext::quantizers
