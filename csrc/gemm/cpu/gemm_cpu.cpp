// The CPU GEMM. A problem becomes parts, one for each group: rows of a, a matrix of b, columns of K.
// The rows of the parts are packed, and then multiplied in jobs: some rows by some columns of a part,
// over all of K. Bias and old output are added in FP32. The sum is rounded once, or goes through an
// activation and is quantized (activation.h). The kernels are in the level's file (kernel.h).
//
//   for each batch of parts whose packed rows fit into most_packed() bytes:
//     on all threads: pack the rows            Level::pack
//     on all threads: for each job             Level::multiply, then finish()
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../../runtime/check.h"
#include "../../runtime/cpu.h"
#include "../../runtime/formats.h"
#include "../gemm.h"
#include "activation.h"
#include "kernel.h"
#include "split_half.h"

namespace torchext {
namespace {

using cpu_gemm::Depth;
using cpu_gemm::Division;
using cpu_gemm::Format;
using cpu_gemm::Level;
using cpu_gemm::Operand;
using cpu_gemm::PackedRows;
using cpu_gemm::Product;
using cpu_gemm::Rows;

// Rows and columns of a job. One job's packed columns and sums stay in the L2 cache (1 MiB).
constexpr int64_t kJobRows = 512, kJobColumns = 128;
// Bytes of rows that are packed before they are multiplied: those of a product of few rows stay in
// the L2 caches of the threads until then.
constexpr int64_t kMostPacked = 64 << 20, kMostPackedByThread = 1 << 20;
constexpr int64_t kMostKept = 2 << 20;  // bytes of memory that a thread keeps for its next call

// Uninitialized memory, aligned to cache lines.
class Memory {
 public:
  char* resized(int64_t bytes) {
    if (bytes > size_) {
      data_.reset();
      data_.reset(static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 64))));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return data_.get();
  }
  void shrink() {
    if (size_ <= kMostKept) return;
    data_.reset();
    size_ = 0;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t size_ = 0;
};

Format format_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float8_e4m3fn:
      return Format::e4m3;
    case ScalarType::Float8_e5m2:
      return Format::e5m2;
    case ScalarType::BFloat16:
      return Format::bf16;
    case ScalarType::Half:
      return Format::fp16;
    default:
      return Format::fp32;
  }
}

Operand operand_a(const GemmProblem& p) {
  return {p.a, p.a_stride, format_of(p.a_dtype), p.a_scale, p.a_scale_row, p.a_scale_k_block, 1};
}

// The matrix of b that a group is multiplied by.
Operand operand_b(const GemmProblem& p, int64_t group) {
  return {static_cast<const uint8_t*>(p.b) + group * p.n * p.b_stride,
          p.b_stride,
          format_of(p.b_dtype),
          p.b_scale + group * p.b_scale_group,
          p.b_scale_row,
          p.b_scale_k_block,
          p.granularity == Granularity::k1D2D ? kScaleGroup : 1};
}

// A GEMM of some rows of a and one matrix of b, over columns k of both.
struct Part {
  Rows rows;
  int64_t group;  // selects the matrix of b and the bias
  Depth k;
  void* out;  // first row of the output, even if `rows` lacks it
};

// Rows of a part, packed.
struct Block {
  const Part* part;
  Rows rows;
  PackedRows packed;
};

struct Job {
  const Block* block;
  int64_t column, columns;
};

// Finishes rows of a product: out = total + bias (+ out). `first_out` is the output's first row.
template <class Out>
struct Finish {
  static void run(const float* total, int64_t total_stride, const float* bias, void* first_out,
                  int64_t out_stride, bool accumulate, const Rows& rows, int64_t col,
                  int64_t cols) {
    using Bits = typename Out::Bits;
    for (int64_t i = 0; i < rows.count; ++i) {
      const float* __restrict from = total + i * total_stride;
      Bits* __restrict to = static_cast<Bits*>(first_out) + rows[i] * out_stride + col;
      if (accumulate) {
        for (int64_t j = 0; j < cols; ++j)
          to[j] = Out::from_float(from[j] + bias[j] + Out::to_float(to[j]));
      } else {
        for (int64_t j = 0; j < cols; ++j) to[j] = Out::from_float(from[j] + bias[j]);
      }
    }
  }
};

class Multiplier {
 public:
  explicit Multiplier(const GemmProblem& p)
      : p_(p),
        a_(operand_a(p)),
        splits_(a_.format == Format::fp16 &&
                multiplies_bf16(cpu_gemm::level_for(Format::bf16, format_of(p.b_dtype)))),
        level_(cpu_gemm::level_for(splits_ ? Format::bf16 : a_.format, format_of(p.b_dtype))),
        gated_(is_gated(p.activation)) {}

  void run(const std::vector<Part>& parts) const {
    thread_local std::vector<Block> blocks;
    blocks.clear();
    int64_t bytes = 0;
    for (const Part& part : parts) {
      const Division division(part.rows.count, splits_ ? kJobRows / 2 : kJobRows);
      for (int64_t i = 0; i < division.parts; ++i) {
        const Block block{&part, part.rows.part(division.begin(i), division.begin(i + 1)), {}};
        const int64_t more = packed_bytes(block);
        if (!blocks.empty() && bytes + more > most_packed(block)) {
          run(blocks, bytes);
          blocks.clear();
          bytes = 0;
        }
        blocks.push_back(block);
        bytes += more;
      }
    }
    if (!blocks.empty()) run(blocks, bytes);
  }

 private:
  static bool multiplies_bf16(const Level& level) { return level.element_bytes == 2; }

  int64_t packed_rows(const Block& block) const { return block.rows.count * (splits_ ? 2 : 1); }
  int64_t data_bytes(const Block& block) const {
    return packed_rows(block) * block.part->k.segments() * Depth::kSegment * level_.element_bytes;
  }
  int64_t packed_bytes(const Block& block) const {
    const int64_t scales = packed_rows(block) * block.part->k.segments() * int64_t(sizeof(float));
    return round_up(data_bytes(block) + scales, 64);
  }

  bool is_few(const Block& block) const { return packed_rows(block) <= level_.few_rows; }
  int64_t most_packed(const Block& block) const {
    return is_few(block)
               ? std::min(torch::stable::get_num_threads() * kMostPackedByThread, kMostPacked)
               : kMostPacked;
  }

  // Columns of one job: fewer if that lets more threads work. An activation needs whole groups.
  int64_t job_columns(const std::vector<Block>& blocks, int64_t width) const {
    if (p_.activation != Activation::kNone) return kScaleGroup;
    const int64_t threads = torch::stable::get_num_threads();
    int64_t columns = kJobColumns;
    const bool few =
        std::all_of(blocks.begin(), blocks.end(), [&](const Block& b) { return is_few(b); });
    if (few) columns = cpu_gemm::kFewColumns;
    while (columns > level_.panel &&
           int64_t(blocks.size()) * ceil_div(width, columns) < 2 * threads)
      columns /= 2;
    return round_up(columns, level_.panel);
  }

  void run(std::vector<Block>& blocks, int64_t bytes) const {
    thread_local Memory memory;
    char* at = memory.resized(bytes);
    const int64_t width = out_columns(p_), step = job_columns(blocks, width);
    const int64_t in_block = ceil_div(width, step), jobs = int64_t(blocks.size()) * in_block;
    int64_t work = 0;
    double cycles = 0;  // a lower bound, on Zen 4
    for (Block& block : blocks) {
      block.packed = {at, reinterpret_cast<float*>(at + data_bytes(block))};
      at += packed_bytes(block);
      const int64_t depth = block.part->k.end - block.part->k.begin;
      work += packed_rows(block) * depth;
      cycles += double(depth) * double(p_.n) * double(12 + 2 * packed_rows(block)) / 64;
    }
    pack(blocks, work);

    // Threads take jobs one by one, because one that another process delays should take few.
    constexpr double kCycles = 1 << 16;  // that are worth a thread
    const int64_t threads = std::min({int64_t(torch::stable::get_num_threads()), jobs,
                                      std::max<int64_t>(1, int64_t(cycles / kCycles))});
    std::atomic<int64_t> next = 0;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      const DefaultFloatingPoint environment;
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < jobs;) {
        const int64_t column = i % in_block * step;
        run({&blocks[i / in_block], column, std::min(step, width - column)});
      }
    });
    memory.shrink();
  }

  void pack(const std::vector<Block>& blocks, int64_t work) const {
    constexpr int64_t kElements = 1 << 16;  // that are worth a thread
    // A block is packed tile by tile, each on any thread.
    int64_t tiles = 0;
    for (const Block& block : blocks) tiles += tiles_of(block).parts;
    torch::stable::parallel_for(
        0, tiles, ceil_div(kElements * tiles, work + 1), [&](int64_t begin, int64_t end) {
          const DefaultFloatingPoint environment;
          int64_t first = 0;
          for (const Block& block : blocks) {
            const int64_t count = tiles_of(block).parts;
            const int64_t from = std::max(begin, first), to = std::min(end, first + count);
            if (from < to) pack(block, from - first, to - first);
            first += count;
          }
        });
  }

  Division tiles_of(const Block& block) const { return level_.tiles(packed_rows(block)); }

  // Packs tiles [begin, end).
  void pack(const Block& block, int64_t begin, int64_t end) const {
    const Division tiles = tiles_of(block);
    const Depth& k = block.part->k;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = tiles.begin(t), end = tiles.begin(t + 1), offset = row * k.segments();
      const PackedRows to = {
          static_cast<char*>(block.packed.data) + offset * Depth::kSegment * level_.element_bytes,
          block.packed.scales + offset};
      if (splits_)
        pack_split(block, row, end, to);
      else
        level_.pack(a_, block.rows.part(row, end), k, to);
    }
  }

  // Packs rows [begin, end) of the split rows of a block, which is whole rows of a.
  void pack_split(const Block& block, int64_t begin, int64_t end, const PackedRows& to) const {
    thread_local Memory memory;
    auto* rows = reinterpret_cast<uint16_t*>(memory.resized((end - begin) * p_.k * 2));
    for (int64_t i = begin; i < end; ++i)
      run_vectorized<cpu_gemm::SplitHalf>(
          static_cast<const uint16_t*>(a_.data) + block.rows[i / 2] * a_.stride, p_.k, int(i % 2),
          rows + (i - begin) * p_.k);
    level_.pack({rows, p_.k, Format::bf16, nullptr, 0, 0, 1}, {0, end - begin}, block.part->k, to);
    memory.shrink();
  }

  void run(const Job& job) const {
    const Block& block = *job.block;
    const Part& part = *block.part;
    const Operand b = operand_b(p_, part.group);
    Product product{};
    product.a = block.packed;
    product.rows = packed_rows(block);
    product.k = part.k;
    product.b = &b;
    product.columns[0] = {job.column, job.columns};
    if (gated_) product.columns[1] = {p_.n / 2 + job.column, job.columns};
    product.total_stride = cpu_gemm::padded_columns(level_, product.columns);
    thread_local Memory memory;
    const int64_t totals =
        round_up(product.rows * product.total_stride * int64_t(sizeof(float)), 64);
    char* at = memory.resized(
        totals + cpu_gemm::scratch_bytes(level_, product.rows, part.k, product.total_stride));
    product.total = reinterpret_cast<float*>(at);
    product.scratch = at + totals;
    level_.multiply(product);
    if (splits_) cpu_gemm::join_split(product.total, product.total_stride, product.rows / 2);
    finish(job, product);
  }

  void finish(const Job& job, const Product& product) const {
    const Part& part = *job.block->part;
    const Rows& rows = job.block->rows;
    float bias[2][kJobColumns];
    load_bias(part.group, product.columns[0], bias[0]);
    if (gated_) load_bias(part.group, product.columns[1], bias[1]);
    if (p_.activation != Activation::kNone) {
      const int64_t up = round_up(job.columns, level_.panel);
      return activate_and_quantize_cpu(
          p_, {product.total, product.total_stride, product.total + up, bias[0], bias[1]},
          rows.first, rows.count, job.column, job.columns);
    }
    with_wide_format(p_.out_dtype, [&](auto out) {
      run_vectorized<Finish<decltype(out)>>(product.total, product.total_stride, bias[0], part.out,
                                            p_.out_stride, p_.accumulate, rows, job.column,
                                            job.columns);
    });
  }

  void load_bias(int64_t group, const Rows& columns, float* bias) const {
    if (p_.bias == nullptr) {
      std::fill_n(bias, columns.count, -0.0f);  // adding -0 changes no number
      return;
    }
    with_wide_format(p_.bias_dtype, [&](auto format) {
      using Number = decltype(format);
      const auto* from =
          static_cast<const typename Number::Bits*>(p_.bias) + group * p_.n + columns.first;
      std::transform(from, from + columns.count, bias, Number::to_float);
    });
  }

  const GemmProblem& p_;
  const Operand a_;
  const bool splits_;  // whether rows of a are FP16, and packed as two rows of BF16 each
  const Level& level_;
  const bool gated_;
};

// ---- groups ----

// 0 and the offsets. Checks that they ascend to at most `most`, which errors call `name`.
std::vector<int64_t> bounds(const GemmProblem& p, int64_t most, const char* name) {
  std::vector<int64_t> bounds{0};
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t end = p.group_index[g];
    TORCHEXT_CHECK_VALUE(end >= bounds.back() && end <= most, p.op,
                         ": offsets must ascend from 0 or more to at most ", name, " = ", most,
                         " (got ", end, " for group ", g, ", after ", bounds.back(), ")");
    bounds.push_back(end);
  }
  return bounds;
}

// Rows sorted by group: those of group g are list[begin[g]] to list[begin[g + 1] - 1].
struct SortedRows {
  std::vector<int64_t> begin;
  std::vector<int32_t> list;

  explicit SortedRows(const GemmProblem& p) : begin(p.groups + 1, 0), list(p.m) {
    for (int64_t row = 0; row < p.m; ++row) {
      const int64_t group = p.group_index[row];
      TORCHEXT_CHECK_VALUE(group < p.groups, p.op, ": group_ids must be below G = ", p.groups,
                           ", or negative for rows of no group (got ", group, " for row ", row,
                           ")");
      if (group >= 0) ++begin[group + 1];
    }
    for (int64_t g = 0; g < p.groups; ++g) begin[g + 1] += begin[g];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t row = 0; row < p.m; ++row)
      if (p.group_index[row] >= 0) list[next[p.group_index[row]]++] = int32_t(row);
  }
};

void check_counts(const GemmProblem& p) {
  for (int64_t g = 0; g < p.groups; ++g)
    TORCHEXT_CHECK_VALUE(p.group_index[g] >= 0 && p.group_index[g] <= p.group_rows, p.op,
                         ": masked_m must be from 0 to M = ", p.group_rows, " (got ",
                         p.group_index[g], " for group ", g, ")");
}

}  // namespace

void fp8_gemm_cpu(const GemmProblem& p) {
  thread_local std::vector<Part> parts;
  parts.clear();
  const auto add_rows = [&](const Rows& rows, int64_t group) {
    if (rows.count > 0) parts.push_back({rows, group, {0, p.k}, p.out});
  };
  std::optional<SortedRows> sorted;
  switch (p.grouping) {
    case Grouping::kNone:
      add_rows({0, p.m}, 0);
      break;
    case Grouping::kOffsets: {
      const std::vector<int64_t> begin = bounds(p, p.m, "M");
      for (int64_t g = 0; g < p.groups; ++g) add_rows({begin[g], begin[g + 1] - begin[g]}, g);
      break;
    }
    case Grouping::kRowIds:
      sorted.emplace(p);
      for (int64_t g = 0; g < p.groups; ++g)
        add_rows({sorted->begin[g], sorted->begin[g + 1] - sorted->begin[g], sorted->list.data()},
                 g);
      break;
    case Grouping::kCounts:
      check_counts(p);
      for (int64_t g = 0; g < p.groups; ++g) add_rows({g * p.group_rows, p.group_index[g]}, g);
      break;
    case Grouping::kAlongK: {
      const std::vector<int64_t> begin = bounds(p, p.k, "K");
      for (int64_t g = 0; g < p.groups; ++g) {
        if (begin[g] == begin[g + 1] && p.accumulate) continue;
        void* out = static_cast<char*>(p.out) + g * p.out_group_stride * element_size(p.out_dtype);
        parts.push_back({{0, p.m}, 0, {begin[g], begin[g + 1]}, out});
      }
    }
  }
  Multiplier(p).run(parts);
}

}  // namespace torchext
