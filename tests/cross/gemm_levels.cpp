// Checks every level of the CPU GEMM that this machine has (csrc/gemm/cpu/kernel.h): results against
// float64 within the bound of docs/numerics.md, and that an element's bits depend on K alone.
#include <algorithm>
#include <memory>
#include <vector>

#include "../../csrc/gemm/cpu/kernel.h"
#include "../../csrc/gemm/cpu/split_half.h"
#include "numbers.h"

namespace cross {
namespace {

using namespace torchext::cpu_gemm;
using torchext::cpu_level;
using torchext::CpuLevel;

const NumberFormat& number_format(Format format) {
  switch (format) {
    case Format::e4m3:
      return kE4M3;
    case Format::e5m2:
      return kE5M2;
    case Format::bf16:
      return kBF16;
    case Format::fp16:
      return kFP16;
    default:
      return kFP32;
  }
}

// A matrix with a scale for every 128 columns of row_group rows.
struct Matrix {
  Format format;
  int64_t rows, columns, stride, groups, row_group;
  std::vector<uint8_t> data;
  std::vector<float> scale;

  Matrix(Format format, int64_t rows, int64_t columns, int64_t row_group, Random& random)
      : format(format),
        rows(rows),
        columns(columns),
        stride(columns + 5),
        groups((columns + 127) / 128),
        row_group(row_group) {
    const NumberFormat& f = number_format(format);
    // Nothing lies behind the last row, so that a sanitizer sees reads beyond it.
    const int64_t count = (rows - 1) * stride + columns;
    data.resize(size_t(count * f.bytes));
    // Any FP8 number; wider numbers between 2^-4 and 2^4.
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) {
      uint32_t code;
      if (f.bytes == 1) {
        do code = random() & 0xff;
        while (!std::isfinite(decode(f, code)));
      } else {
        const float x = std::ldexp(1.0f + float(random() % 1024) / 1024, int(random() % 8) - 4);
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        code = f.bytes == 4      ? bits
               : f.mantissa == 7 ? bits >> 16
                                 : ((bits >> 23) - 127 + 15) << 10 | (bits >> 13 & 0x3ff);
        if (random() % 2) code |= 1u << (8 * f.bytes - 1);
      }
      std::memcpy(&data[size_t(i * f.bytes)], &code, size_t(f.bytes));
    }
    for (int64_t i = 0; i < (rows + row_group - 1) / row_group * groups; ++i)
      scale.push_back(std::ldexp(1.0f + float(random() % 1000) / 1000, int(random() % 16) - 8));
  }

  Operand operand() const {
    return {data.data(), stride, format, scale.data(), groups, 1, row_group};
  }
  double number(int64_t row, int64_t column) const {
    const NumberFormat& f = number_format(format);
    return decode(f, code_at(f, data.data(), row * stride + column));
  }
  double value(int64_t row, int64_t column) const {
    return number(row, column) * scale[size_t(row / row_group * groups + column / 128)];
  }
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
std::unique_ptr<void, Free> aligned(int64_t bytes) {
  return std::unique_ptr<void, Free>(
      std::aligned_alloc(64, size_t(torchext::round_up(bytes + 1, 64))));
}

// Rows of an FP16 matrix, each split into two of BF16.
struct SplitRows {
  int64_t columns, groups;
  std::vector<uint16_t> data;
  std::vector<float> scale;

  SplitRows(const Matrix& a, const Rows& rows)
      : columns(a.columns), groups(a.groups), data(size_t(2 * rows.count * columns)) {
    const auto* from = reinterpret_cast<const uint16_t*>(a.data.data());
    for (int64_t i = 0; i < 2 * rows.count; ++i) {
      const int64_t row = rows[i / 2];
      SplitHalf::run(from + row * a.stride, columns, int(i % 2), &data[size_t(i * columns)]);
      scale.insert(scale.end(), &a.scale[size_t(row * groups)],
                   &a.scale[size_t(row * groups)] + groups);
    }
  }
  Operand operand() const {
    return {data.data(), columns, Format::bf16, scale.data(), groups, 1, 1};
  }
};

// a[rows] times b[columns], by `level`: [rows.count, columns[0].count + columns[1].count].
std::vector<float> multiply(const Level& level, const Operand& left, const Rows& rows,
                            const Matrix& b, const Rows (&columns)[2], const Depth& k,
                            bool is_split = false) {
  const Operand right = b.operand();
  const int64_t segments = k.segments(), padded = padded_columns(level, columns);
  const auto packed = aligned(rows.count * segments * Depth::kSegment * level.element_bytes);
  std::vector<float> scales(size_t(rows.count * segments));
  const PackedRows out{packed.get(), scales.data()};
  const Division tiles = level.tiles(rows.count);
  for (int64_t t = 0; t < tiles.parts; ++t) {
    const int64_t row = tiles.begin(t), offset = row * segments;
    level.pack(left, rows.part(row, tiles.begin(t + 1)), k,
               {static_cast<char*>(out.data) + offset * Depth::kSegment * level.element_bytes,
                out.scales + offset});
  }
  const auto scratch = aligned(scratch_bytes(level, rows.count, k, padded));
  const int64_t stride = padded + 3;
  std::vector<float> total(size_t(rows.count * stride), std::nanf(""));
  Product product{};
  product.a = out;
  product.rows = rows.count;
  product.k = k;
  product.b = &right;
  product.columns[0] = columns[0];
  product.columns[1] = columns[1];
  product.total = total.data();
  product.total_stride = stride;
  product.scratch = scratch.get();
  level.multiply(product);
  if (is_split) join_split(total.data(), stride, rows.count / 2);
  std::vector<float> result;
  for (int64_t i = 0; i < (is_split ? rows.count / 2 : rows.count); ++i) {
    int64_t first = 0;
    for (const Rows& list : columns) {
      const float* from = &total[size_t(i * stride + first)];
      result.insert(result.end(), from, from + list.count);
      first += torchext::round_up(list.count, level.panel);
    }
  }
  return result;
}

std::vector<float> multiply(const Level& level, const Matrix& a, const Rows& rows, const Matrix& b,
                            const Rows (&columns)[2], const Depth& k) {
  if (a.format != Format::fp16 || level.element_bytes != 2)
    return multiply(level, a.operand(), rows, b, columns, k);
  const SplitRows split(a, rows);
  return multiply(level, split.operand(), {0, 2 * rows.count}, b, columns, k, true);
}

struct Checker {
  const char* name;
  const Level& level;
  Random random{7};
  int products = 0;

  // Every element within (K + 4) 2^-24 sum |a b|, the E_sum of docs/numerics.md.
  void check(const Matrix& a, const Rows& rows, const Matrix& b, const Rows (&columns)[2],
             const Depth& k) {
    const std::vector<float> result = multiply(level, a, rows, b, columns, k);
    const int64_t width = columns[0].count + columns[1].count;
    for (int64_t i = 0; i < rows.count; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        const int64_t n = j < columns[0].count ? columns[0][j] : columns[1][j - columns[0].count];
        double exact = 0, size = 0;
        for (int64_t c = k.begin; c < k.end; ++c) {
          const double term = a.value(rows[i], c) * b.value(n, c);
          exact += term;
          size += std::abs(term);
        }
        const double error = std::abs(double(result[size_t(i * width + j)]) - exact);
        if (!(error <= size * double(k.end - k.begin + 4) * std::ldexp(1.0, -24)))
          fail("%s: %d x %d, K [%d, %d), element (%d, %d): %g, not %g", name, int(rows.count),
               int(width), int(k.begin), int(k.end), int(i), int(j),
               double(result[size_t(i * width + j)]), exact);
      }
    }
    alone(result, a, rows, b, columns, k);
    ++products;
  }

  // The first, a middle and the last row, and the last column, each as a product of its own.
  void alone(const std::vector<float>& result, const Matrix& a, const Rows& rows, const Matrix& b,
             const Rows (&columns)[2], const Depth& k) {
    const int64_t width = columns[0].count + columns[1].count;
    for (int64_t i : {int64_t(0), rows.count / 2, rows.count - 1}) {
      const std::vector<float> row = multiply(level, a, rows.part(i, i + 1), b, columns, k);
      if (std::memcmp(row.data(), &result[size_t(i * width)], row.size() * sizeof(float)) != 0)
        fail("%s: row %d of %d has other bits alone", name, int(i), int(rows.count));
    }
    const Rows& list = columns[1].count > 0 ? columns[1] : columns[0];
    const Rows last[2] = {list.part(list.count - 1, list.count), {0, 0}};
    const std::vector<float> column = multiply(level, a, rows, b, last, k);
    for (int64_t i = 0; i < rows.count; ++i)
      if (std::memcmp(&column[size_t(i)], &result[size_t((i + 1) * width - 1)], sizeof(float)) != 0)
        fail("%s: column %d of %d has other bits alone", name, int(width - 1), int(width));
  }

  void run() {
    std::vector<Format> formats = {Format::e4m3, Format::e5m2, Format::bf16, Format::fp16};
    if (level.element_bytes == 4) formats.push_back(Format::fp32);
    const Depth depths[] = {{0, 1},   {0, 127},   {0, 128},   {0, 131}, {5, 300},
                            {64, 66}, {250, 640}, {128, 384}, {0, 640}};
    for (Format format : formats) {
      for (Format weight : {Format::e4m3, Format::e5m2}) {
        const Matrix a(format, 120, 640, 1, random), b(weight, 300, 640, 128, random),
            fine(weight, 300, 640, 1, random);
        std::vector<int32_t> list(120);
        for (int i = 0; i < 120; ++i) list[size_t(i)] = 119 - i;
        for (const Depth& k : depths) {
          const Rows few[2] = {{130, 19}, {0, 0}}, pairs[2] = {{0, 33}, {150, 17}};
          check(a, {0, 1}, b, few, k);
          check(a, {3, 2}, fine, pairs, k);
          check(a, {1, 17, list.data()}, b, pairs, k);
        }
        const Rows wide[2] = {{1, 131}, {0, 0}};
        for (int64_t rows : {3, 5, 6, 7, 12, 13, 29, 48, 49, 101})
          check(a, {2, rows}, b, wide, depths[4]);
      }
    }
    nan();
    nan_of_b();
    large();
    const Matrix a(Format::e4m3, 3, 128, 1, random), b(Format::e4m3, 5, 128, 128, random);
    const Rows columns[2] = {{0, 5}, {0, 0}};
    for (float x : multiply(level, a, {0, 3}, b, columns, {0, 0}))
      if (x != 0) fail("%s: an empty sum is %g", name, double(x));
  }

  // A NaN code of b reaches its column of the result and no other, however few the rows.
  void nan_of_b() {
    for (Format weight : {Format::e4m3, Format::e5m2}) {
      const Matrix a(Format::e4m3, 7, 640, 1, random);
      Matrix b(weight, 36, 640, 128, random);
      b.data[size_t(21 * b.stride + 300)] = 0xff;
      const Rows columns[2] = {{0, 36}, {0, 0}};
      for (int64_t rows : {1, 2, 3, 4, 6, 7}) {
        const std::vector<float> result = multiply(level, a, {0, rows}, b, columns, {0, 640});
        for (int i = 0; i < rows * 36; ++i)
          if (std::isnan(result[size_t(i)]) != (i % 36 == 21))
            fail("%s: a NaN of column 21 and element %d of row %d", name, i % 36, i / 36);
      }
    }
  }

  // Numbers near FP32's largest, which a level may not multiply by anything before the product.
  void large() {
    for (Format format : {Format::fp32, Format::bf16}) {
      if (format == Format::fp32 && level.element_bytes != 4) continue;
      Matrix a(format, 7, 640, 1, random), b(Format::e4m3, 36, 640, 128, random);
      a.scale.assign(a.scale.size(), 1.0f);
      for (float& scale : b.scale) scale = 0x1p-9f;
      for (uint8_t& code : b.data) code &= 0xbf;  // below 2
      const uint32_t near = 0x7e800000;           // 2^126
      for (int64_t at : {0, 300, 3 * int(a.stride) + 5})
        std::memcpy(&a.data[size_t(at) * (format == Format::fp32 ? 4 : 2)],
                    reinterpret_cast<const char*>(&near) + (format == Format::fp32 ? 0 : 2),
                    format == Format::fp32 ? 4 : 2);
      const Rows columns[2] = {{0, 36}, {0, 0}};
      for (int64_t rows : {1, 4, 7}) check(a, {0, rows}, b, columns, {0, 640});
    }
  }

  // A NaN code, or a NaN scale, reaches its row of the result and no other.
  void nan() {
    for (bool in_scale : {false, true}) {
      Matrix a(Format::e4m3, 9, 200, 1, random);
      const Matrix b(Format::e5m2, 20, 200, 128, random);
      if (in_scale)
        a.scale[size_t(4 * a.groups + 1)] = std::nanf("");
      else
        a.data[size_t(4 * a.stride + 130)] = 0x7f;
      const Rows columns[2] = {{0, 20}, {0, 0}};
      const std::vector<float> result = multiply(level, a, {0, 9}, b, columns, {0, 200});
      for (int i = 0; i < 9 * 20; ++i)
        if (std::isnan(result[size_t(i)]) != (i / 20 == 4))
          fail("%s: a NaN of row 4 and element %d of row %d", name, i % 20, i / 20);
    }
  }
};

}  // namespace

void check_gemm_levels() {
  struct Named {
    const char* name;
    const Level* level;
    bool here;
  };
  const CpuLevel best = cpu_level();
  const Named levels[] = {
      {"portable", &portable, true},
#ifdef TORCHEXT_X86_LEVELS
      {"avx2", &avx2, best >= CpuLevel::avx2},
      {"avx512", &avx512, best >= CpuLevel::avx512},
      {"avx512_bf16", &avx512_bf16, best >= CpuLevel::avx512_bf16},
      {"avx512_bf16_vbmi", &avx512_bf16_vbmi,
       best >= CpuLevel::avx512_bf16 && torchext::uses_avx512_vbmi()},
      {"amx", &amx, best >= CpuLevel::avx512_bf16 && torchext::uses_avx512_vbmi()},  // emulated
#endif
#ifdef TORCHEXT_ARM_LEVELS
      {"neon", &neon, best == CpuLevel::neon},
#endif
  };
  for (const Named& named : levels) {
    if (!named.here) {
      std::printf("gemm %s: skipped: this machine lacks it\n", named.name);
      continue;
    }
    Checker checker{named.name, *named.level};
    checker.run();
    std::printf("gemm %s: %d products\n", named.name, checker.products);
  }
}

}  // namespace cross
