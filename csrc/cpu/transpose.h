// Transposes small matrices, such as tiles of a larger one, in vector registers.
#pragma once

#include <cstdint>
#include <cstring>

namespace torchext {

// A vector of 16 bytes, which every machine has. Vector types are a GNU extension.
template <class T>
struct Vector16 {
  static constexpr int kSize = 16 / sizeof(T);
  typedef T Type __attribute__((vector_size(16)));
};

// Writes x[0], y[0], x[1], y[1], ... to `low` and then `high`.
template <class V>
inline void interleave(const V& x, const V& y, V& low, V& high) {
  constexpr int n = sizeof(V) / sizeof(x[0]);
#ifdef __clang__
  if constexpr (n == 16) {
    low = __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high =
        __builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else if constexpr (n == 8) {
    low = __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    low = __builtin_shufflevector(x, y, 0, 4, 1, 5);
    high = __builtin_shufflevector(x, y, 2, 6, 3, 7);
  }
#else
  V from_low, from_high;
  for (int i = 0; i < n; ++i) {
    from_low[i] = i / 2 + i % 2 * n;
    from_high[i] = from_low[i] + n / 2;
  }
  low = __builtin_shuffle(x, y, from_low);
  high = __builtin_shuffle(x, y, from_high);
#endif
}

// Transposes a square with as many rows and columns as a vector has elements. Each round
// interleaves rows i and i + n/2 into rows 2i and 2i + 1, which moves one bit of each element's row
// index to its column index.
template <class T>
void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  using Vector = typename Vector16<T>::Type;
  constexpr int n = Vector16<T>::kSize;
  Vector rows[2][n];
  for (int i = 0; i < n; ++i) std::memcpy(&rows[0][i], from + i * from_stride, 16);
  int round = 0;
  for (int size = 1; size < n; size *= 2, round ^= 1)
    for (int i = 0; i < n / 2; ++i)
      interleave(rows[round][i], rows[round][i + n / 2], rows[round ^ 1][2 * i],
                 rows[round ^ 1][2 * i + 1]);
  for (int i = 0; i < n; ++i) std::memcpy(to + i * to_stride, &rows[round][i], 16);
}

// to[col, row] = from[row, col].
template <class T>
void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, int rows, int cols) {
  constexpr int n = Vector16<T>::kSize;
  const int whole_rows = rows / n * n, whole_cols = cols / n * n;
  for (int col = 0; col < whole_cols; col += n)
    for (int row = 0; row < whole_rows; row += n)
      transpose_square(from + row * from_stride + col, from_stride, to + col * to_stride + row,
                       to_stride);
  for (int row = 0; row < rows; ++row)
    for (int col = row < whole_rows ? whole_cols : 0; col < cols; ++col)
      to[col * to_stride + row] = from[row * from_stride + col];
}

}  // namespace torchext
