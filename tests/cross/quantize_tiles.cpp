// Checks csrc/cpu/quantize_tiles.h: the tiles of a producer, quantized along rows, columns or both, have
// the bits of groups quantized one by one, and sums of columns have their documented order. The walk
// must not depend on how threads share the tiles: this file stands in for torch's threads.
#include "../../csrc/cpu/quantize_tiles.h"

#include <vector>

#include "numbers.h"

namespace {
int64_t parts_of_work = 1;
}  // namespace

// torch::stable::parallel_for calls this. It runs the parts from the last to the first, on this thread.
extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc body,
                                             void* context) {
  const int64_t size = (end - begin + parts_of_work - 1) / parts_of_work;
  for (int64_t part = parts_of_work - 1; part >= 0; --part) {
    const int64_t first = begin + part * size, last = std::min(first + size, end);
    if (first < last) body(first, last, context);
  }
  return AOTI_TORCH_SUCCESS;
}

namespace cross {
namespace {

using namespace torchext;
using namespace torchext::cpu;

struct Matrix {
  int64_t rows, cols;
  std::vector<float> data;
  float at(int64_t row, int64_t col) const { return data[size_t(row * cols + col)]; }
};

struct Quantized {
  Quantized(int64_t rows, int64_t cols)
      : stride(round_up(cols, 16)),
        scale_stride(round_up(rows, 4)),
        data(size_t(rows * stride), 0xee),
        scale(size_t(scale_stride * ceil_div(cols, kTile)), -1.0f) {}
  QuantizedView view() { return {data.data(), stride, scale.data(), 1, scale_stride}; }
  bool operator==(const Quantized& other) const {
    return data == other.data && scale == other.scale;
  }
  int64_t stride, scale_stride;
  std::vector<uint8_t> data;
  std::vector<float> scale;
};

// Groups one by one.
Quantized expected_groups(const Matrix& x, const QuantizeOptions& options) {
  Quantized out(x.rows, x.cols);
  for (int64_t row = 0; row < x.rows; ++row)
    for (int64_t col = 0; col < x.cols; col += kTile)
      portable_kernels.quantize[2][options.e5m2].groups(
          &x.data[size_t(row * x.cols + col)], 0, 1, int(std::min<int64_t>(kTile, x.cols - col)),
          dropped_mantissa(options), &out.data[size_t(row * out.stride + col)], 0,
          &out.scale[size_t(row + col / kTile * out.scale_stride)], 0, Ahead(), false);
  return out;
}

// The documented order, a column at a time.
std::vector<float> expected_sums(const Matrix& x) {
  std::vector<float> sums;
  for (int64_t col = 0; col < x.cols; ++col) {
    float total = 0;
    for (int64_t tile = 0; tile < x.rows; tile += 128) {
      float run[8];
      for (int i = 0; i < 8; ++i)
        for (int r = 0; r < 16; ++r) {
          const int64_t row = tile + 16 * i + r;
          const float value = row < x.rows ? x.at(row, col) : 0.0f;
          run[i] = r == 0 ? value : run[i] + value;
        }
      const float sum =
          ((run[0] + run[1]) + (run[2] + run[3])) + ((run[4] + run[5]) + (run[6] + run[7]));
      total = tile == 0 ? sum : total + sum;
    }
    sums.push_back(total);
  }
  return sums;
}

// Copies from a matrix. It overwrites its scratch memory for each tile.
struct Copier {
  struct Scratch {
    alignas(64) float tile[kTile * kTile];
  };
  const Matrix& x;
  const ScalarType dtype = ScalarType::Float;

  Tile operator()(Scratch& scratch, const TilePosition& at, const TilePosition& next) const {
    if (next.row + next.rows > x.rows || next.col + next.cols > x.cols) fail("next is outside");
    for (int r = 0; r < at.rows; ++r)
      for (int c = 0; c < at.cols; ++c) scratch.tile[r * kTile + c] = x.at(at.row + r, at.col + c);
    return {scratch.tile, kTile, at.rows, at.cols, {}};
  }
};

// Adds the first element of each row, which it reads in prepare, to a matrix without it.
struct RowsFirst {
  struct Scratch : Copier::Scratch {
    float first[kTile];
    int64_t row, rows;
  };
  const Matrix& x;
  const ScalarType dtype = ScalarType::Float;

  void prepare(Scratch& scratch, int64_t row, int64_t rows) const {
    scratch.row = row;
    scratch.rows = rows;
    for (int64_t r = 0; r < rows; ++r) scratch.first[r] = x.at(row + r, 0);
  }
  Tile operator()(Scratch& scratch, const TilePosition& at, const TilePosition& next) const {
    if (scratch.row != at.row || scratch.rows != at.rows)
      fail("rows %d were not prepared", int(at.row));
    const Tile tile = Copier{x}(scratch, at, next);
    if (at.col == 0)
      for (int r = 0; r < at.rows; ++r) scratch.tile[r * kTile] = scratch.first[r];
    return tile;
  }
};

int64_t checked = 0;

template <class Producer>
void check(const Producer& producer, const Matrix& x, const Matrix& x_t,
           const QuantizeOptions& options) {
  const Quantized row = expected_groups(x, options), column = expected_groups(x_t, options);
  const std::vector<float> sums = expected_sums(x);
  for (int wanted = 1; wanted < 8; ++wanted) {
    Quantized got(x.rows, x.cols), got_t(x.cols, x.rows);
    std::vector<float> got_sums(size_t(x.cols), -1.0f);
    const QuantizedView view = got.view(), view_t = got_t.view();
    quantize_produced_groups(x.rows, x.cols, options, producer, wanted & 1 ? &view : nullptr,
                             wanted & 2 ? &view_t : nullptr,
                             wanted & 4 ? got_sums.data() : nullptr);
    const bool right = (!(wanted & 1) || got == row) && (!(wanted & 2) || got_t == column) &&
                       (!(wanted & 4) || got_sums == sums);
    if (!right)
      fail("tiles of %d x %d in %d parts, outputs %d", int(x.rows), int(x.cols), int(parts_of_work),
           wanted);
    checked += x.rows * x.cols;
  }
}

}  // namespace

void check_quantize_tiles() {
  Random random{12};
  constexpr int kShapes[][2] = {{1, 1}, {15, 128}, {17, 130}, {128, 128}, {129, 7}, {300, 1300}};
  for (const auto& [rows, cols] : kShapes) {
    Matrix x{rows, cols, {}}, x_t{cols, rows, std::vector<float>(size_t(rows * cols))};
    for (int i = 0; i < rows * cols; ++i) {
      const float value = std::ldexp(float(int(random() % 65536) - 32768), int(random() % 20) - 25);
      x.data.push_back(value);
      x_t.data[size_t(i % cols * rows + i / cols)] = value;
    }
    for (int64_t parts : {1, 3, 1000}) {
      parts_of_work = parts;
      check(Copier{x}, x, x_t, {false, false});
      check(RowsFirst{x}, x, x_t, {true, true});
    }
  }
  std::printf("quantize tiles: %lld elements\n", (long long)checked);
}

}  // namespace cross
