// The transposes of kernels.h for any instruction set: a part of loops.h, which includes this file. Each
// lane holds rows of another square of 16 bytes; log2(16) rounds of interleaving transpose it.

template <class V, int kSize>
inline __attribute__((always_inline)) void interleave(typename V::I a, typename V::I b,
                                                      typename V::I& low, typename V::I& high) {
  if constexpr (kSize == 1) {
    low = V::zip8_low(a, b);
    high = V::zip8_high(a, b);
  } else if constexpr (kSize == 2) {
    low = V::zip16_low(a, b);
    high = V::zip16_high(a, b);
  } else {
    low = V::zip32_low(a, b);
    high = V::zip32_high(a, b);
  }
}

// Transposes a square of n = 16 / kSize rows in each lane. Each round
// interleaves rows i and i + n/2 into rows 2i and 2i + 1, which moves one bit
// of each element's row index to its column index.
template <class V, int kSize>
inline __attribute__((always_inline)) void transpose_lanes(typename V::I (&rows)[16 / kSize]) {
  constexpr int n = 16 / kSize;
  for (int size = 1; size < n; size *= 2) {
    typename V::I next[n];
    for (int i = 0; i < n / 2; ++i)
      interleave<V, kSize>(rows[i], rows[i + n / 2], next[2 * i], next[2 * i + 1]);
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

// to[c * to_stride + r] = from[r * from_stride + c], strides in bytes. Whole
// registers only: rows and cols are multiples of V::kBytes / kSize and of 16 /
// kSize.
template <class V, int kSize>
void transpose_whole(const uint8_t* from, int64_t from_stride, int rows, int cols, uint8_t* to,
                     int64_t to_stride, bool stream) {
  constexpr int n = 16 / kSize, kRows = V::kBytes / kSize;
  for (int row = 0; row < rows; row += kRows) {
    const uint8_t* part = from + row * from_stride;
    for (int col = 0; col < cols; col += n) {
      typename V::I square[n];
      for (int i = 0; i < n; ++i)
        square[i] = V::load_lanes(part + i * from_stride + col * kSize, n * from_stride);
      transpose_lanes<V, kSize>(square);
      for (int i = 0; i < n; ++i)
        put<V>(to + (col + i) * to_stride + row * kSize, square[i], stream);
    }
  }
}

template <class V, class Bits>
void transpose_part(const Bits* from, int64_t from_stride, int rows, int cols, Bits* to,
                    int64_t to_stride, bool stream) {
  constexpr int kSize = int(sizeof(Bits)), n = 16 / kSize, kRows = V::kBytes / kSize;
  const int whole_rows = rows / kRows * kRows, whole_cols = cols / n * n;
  transpose_whole<V, kSize>(reinterpret_cast<const uint8_t*>(from), from_stride * kSize, whole_rows,
                            whole_cols, reinterpret_cast<uint8_t*>(to), to_stride * kSize, stream);
  for (int row = 0; row < rows; ++row)
    for (int col = row < whole_rows ? whole_cols : 0; col < cols; ++col)
      to[col * to_stride + row] = from[row * from_stride + col];
}

template <class V, class Bits>
void transpose_tile(const void* from, int64_t stride, int rows, int cols, void* to) {
  transpose_part<V, Bits>(static_cast<const Bits*>(from), stride, rows, cols,
                          static_cast<Bits*>(to), kTile, false);
}

template <class V>
void transpose_codes(const uint8_t* from, int rows, int cols, uint8_t* to, int64_t to_stride,
                     bool stream) {
  if (stream)
    transpose_part<V, uint8_t>(from, kTile, rows, cols, to, to_stride, true);
  else
    transpose_part<V, uint8_t>(from, kTile, rows, cols, to, to_stride, false);
}

template <class V>
void copy_codes(const uint8_t* from, int rows, int cols, uint8_t* to, int64_t to_stride,
                bool stream) {
  for (int row = 0; row < rows; ++row, from += kTile, to += to_stride) {
    if (cols == kTile && stream)
      for (int i = 0; i < kTile; i += V::kBytes) V::stream(to + i, V::load(from + i));
    else
      std::memcpy(to, from, size_t(cols));
  }
}
