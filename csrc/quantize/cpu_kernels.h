// The inner loops of the CPU quantisers, on at most a tile of FP32 values in cache.
// quantize_cpu.cpp includes this once for each instruction set, in a namespace and under a target
// of its own: hence no include guard, and no #include in here.

// Elements of x, `stride` apart, as FP32.
template <class Bits, class Convert>
inline void load(const void* source, int64_t stride, int64_t count, float* values,
                 const Convert& convert) {
  const Bits* bits = static_cast<const Bits*>(source);
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) values[i] = convert(bits[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] = convert(bits[i * stride]);
  }
}

// `count` elements of row `row` of x from column `column` on.
inline void load_row(const MatrixView& x, int64_t row, int64_t column, int64_t count,
                     float* values) {
  const int64_t offset = row * x.row_stride + column * x.col_stride;
  if (x.dtype == ScalarType::Float)
    load<float>(static_cast<const float*>(x.data) + offset, x.col_stride, count, values,
                [](float value) { return value; });
  else if (x.dtype == ScalarType::BFloat16)
    load<uint16_t>(static_cast<const uint16_t*>(x.data) + offset, x.col_stride, count, values,
                   float_of_bfloat16);
  else
    load<uint16_t>(static_cast<const uint16_t*>(x.data) + offset, x.col_stride, count, values,
                   float_of_half);
}

// As bits, NaN is above Inf is above every finite value.
inline uint32_t amax_bits(const float* values, int64_t count) {
  uint32_t amax = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bits_of(values[i]) & 0x7fffffff;
    amax = magnitude > amax ? magnitude : amax;
  }
  return amax;
}

inline void raise_amax_bits(const float* values, int64_t count, uint32_t* amax) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bits_of(values[i]) & 0x7fffffff;
    amax[i] = magnitude > amax[i] ? magnitude : amax[i];
  }
}

template <class Format>
inline void encode(const float* values, int64_t count, float scale, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) codes[i] = encode_fp8<Format>(values[i] / scale);
}

template <class Format>
inline void encode_each(const float* values, int64_t count, const float* scales, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) codes[i] = encode_fp8<Format>(values[i] / scales[i]);
}

// codes[rows][kGroup] to out[cols][rows], 16x16 at a time: each block stays in registers.
inline void transpose(const uint8_t* codes, int64_t rows, int64_t cols, uint8_t* out,
                      int64_t out_stride) {
  constexpr int64_t kBlock = 16;
  for (int64_t c = 0; c < cols; c += kBlock) {
    for (int64_t r = 0; r < rows; r += kBlock) {
      if (r + kBlock <= rows && c + kBlock <= cols) {
        uint8_t block[kBlock][kBlock];
        for (int64_t i = 0; i < kBlock; ++i)
          for (int64_t j = 0; j < kBlock; ++j) block[j][i] = codes[(r + i) * kGroup + c + j];
        for (int64_t j = 0; j < kBlock; ++j)
          std::memcpy(out + (c + j) * out_stride + r, block[j], kBlock);
      } else {
        for (int64_t i = r; i < std::min(r + kBlock, rows); ++i)
          for (int64_t j = c; j < std::min(c + kBlock, cols); ++j)
            out[j * out_stride + i] = codes[i * kGroup + j];
      }
    }
  }
}

// Rows [begin, end) of x into 1x128 groups.
template <class Format>
void groups_of_rows(const MatrixView& x, bool pow2, const QuantizedView& out, int64_t begin,
                    int64_t end) {
  alignas(64) float values[kGroup];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t column = 0; column < x.cols; column += kGroup) {
      const int64_t count = std::min(kGroup, x.cols - column);
      load_row(x, row, column, count, values);
      const float scale = scale_of(amax_bits(values, count), Format::kMax, pow2);
      out.scale[row * out.scale_row_stride + column / kGroup * out.scale_col_stride] = scale;
      encode<Format>(values, count, scale,
                     static_cast<uint8_t*>(out.data) + row * out.data_stride + column);
    }
  }
}

// Rows [begin, begin + kGroup) of x into 1x128 groups along the rows, transposed, and, where `row`
// is given, along the columns as well.
template <class Format>
void groups_both_ways(const MatrixView& x, bool pow2, const QuantizedView* row,
                      const QuantizedView& transposed, int64_t begin) {
  alignas(64) float tile[kGroup][kGroup];
  alignas(64) uint8_t codes[kGroup][kGroup];
  const int64_t rows = std::min(kGroup, x.rows - begin);
  for (int64_t column = 0; column < x.cols; column += kGroup) {
    const int64_t count = std::min(kGroup, x.cols - column);
    alignas(64) uint32_t amax[kGroup] = {};
    for (int64_t r = 0; r < rows; ++r) {
      load_row(x, begin + r, column, count, tile[r]);
      raise_amax_bits(tile[r], count, amax);
      if (row == nullptr) continue;
      const float scale = scale_of(amax_bits(tile[r], count), Format::kMax, pow2);
      row->scale[(begin + r) * row->scale_row_stride + column / kGroup * row->scale_col_stride] =
          scale;
      encode<Format>(tile[r], count, scale,
                     static_cast<uint8_t*>(row->data) + (begin + r) * row->data_stride + column);
    }
    alignas(64) float scales[kGroup];
    for (int64_t c = 0; c < count; ++c) {
      scales[c] = scale_of(amax[c], Format::kMax, pow2);
      transposed.scale[(column + c) * transposed.scale_row_stride +
                       begin / kGroup * transposed.scale_col_stride] = scales[c];
    }
    for (int64_t r = 0; r < rows; ++r) encode_each<Format>(tile[r], count, scales, codes[r]);
    transpose(codes[0], rows, count,
              static_cast<uint8_t*>(transposed.data) + column * transposed.data_stride + begin,
              transposed.data_stride);
  }
}

// Rows [begin, begin + kGroup) of x into 128x128 blocks and, where given, their transposes.
template <class Format>
void blocks_of_rows(const MatrixView& x, bool pow2, const QuantizedView& out, uint8_t* transposed,
                    int64_t transposed_stride, int64_t begin) {
  alignas(64) float tile[kGroup][kGroup];
  alignas(64) uint8_t codes[kGroup][kGroup];
  const int64_t rows = std::min(kGroup, x.rows - begin);
  for (int64_t column = 0; column < x.cols; column += kGroup) {
    const int64_t count = std::min(kGroup, x.cols - column);
    uint32_t amax = 0;
    for (int64_t r = 0; r < rows; ++r) {
      load_row(x, begin + r, column, count, tile[r]);
      amax = std::max(amax, amax_bits(tile[r], count));
    }
    const float scale = scale_of(amax, Format::kMax, pow2);
    out.scale[begin / kGroup * out.scale_row_stride + column / kGroup * out.scale_col_stride] =
        scale;
    for (int64_t r = 0; r < rows; ++r) {
      encode<Format>(tile[r], count, scale, codes[r]);
      std::memcpy(static_cast<uint8_t*>(out.data) + (begin + r) * out.data_stride + column,
                  codes[r], count);
    }
    if (transposed != nullptr)
      transpose(codes[0], rows, count, transposed + column * transposed_stride + begin,
                transposed_stride);
  }
}

// Largest |x| of a row, as bits.
inline uint32_t amax_bits_of_row(const MatrixView& x, int64_t row) {
  alignas(64) float values[kGroup];
  uint32_t amax = 0;
  for (int64_t column = 0; column < x.cols; column += kGroup) {
    const int64_t count = std::min(kGroup, x.cols - column);
    load_row(x, row, column, count, values);
    amax = std::max(amax, amax_bits(values, count));
  }
  return amax;
}

template <class Format>
void encode_row(const MatrixView& x, int64_t row, float scale, const QuantizedView& out) {
  alignas(64) float values[kGroup];
  for (int64_t column = 0; column < x.cols; column += kGroup) {
    const int64_t count = std::min(kGroup, x.cols - column);
    load_row(x, row, column, count, values);
    encode<Format>(values, count, scale,
                   static_cast<uint8_t*>(out.data) + row * out.data_stride + column);
  }
}

template <class Format>
void decode_row(const DequantizeView& view, int64_t row) {
  const float* table = fp8_table<Format>().data();
  const uint8_t* codes = static_cast<const uint8_t*>(view.data) + row * view.data_row_stride;
  const float* scales = view.scale + row / view.row_group * view.scale_row_stride;
  alignas(64) float values[kGroup];
  for (int64_t column = 0; column < view.cols; column += kGroup) {
    const int64_t count = std::min(kGroup, view.cols - column);
    const float scale = scales[column / view.col_group * view.scale_col_stride];
    for (int64_t i = 0; i < count; ++i)
      values[i] = table[codes[(column + i) * view.data_col_stride]] * scale;
    const int64_t offset = row * view.y_stride + column;
    if (view.y_dtype == ScalarType::Float) {
      std::memcpy(static_cast<float*>(view.y) + offset, values, count * sizeof(float));
    } else {
      uint16_t* y = static_cast<uint16_t*>(view.y) + offset;
      if (view.y_dtype == ScalarType::BFloat16)
        for (int64_t i = 0; i < count; ++i) y[i] = bfloat16_of(values[i]);
      else
        for (int64_t i = 0; i < count; ++i) y[i] = half_of(values[i]);
    }
  }
}
