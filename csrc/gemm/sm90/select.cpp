// Chooses a kernel (select.h). The model counts, for each tile that is compiled, the cycles of an
// SM for a K block, the rounds in which CTAs get through the tiles, and what a round costs beside.
#include "select.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>
#include <tuple>

#include "../../runtime/check.h"

namespace torchext::sm90 {
namespace {

// An SM of a Hopper GPU. Rates per cycle: that of the tensor cores is NVIDIA's (architectures.inc),
// shared memory has 32 banks of 4 bytes, the others are estimates, to be replaced by measurements:
// how fast one SM can pull tiles through L2, how long it takes the first to come, how fast all of
// them together pull from memory, what an epilogue and an exchange between CTAs cost.
constexpr double kTensorMacs = find_architecture(90)->fp8_macs, kSharedBytes = 128;
constexpr double kL2Bytes = 36, kMemoryBytes = 2400;
constexpr double kStart = 2500, kTileOverhead = 500, kStoreBytes = 32;
constexpr double kExchange = 1500, kExchangeBytes = 16;

// Instructions of a warp for a K block beside the promotion of its accumulators: about so many are
// counted in docs/sass_report.md.
constexpr double kIssueOverhead = 75;

enum class Output { kStored, kActivated, kGated };

Output output_of(const GemmProblem& p) {
  return p.activation == Activation::kNone     ? Output::kStored
         : p.activation == Activation::kSwiGLU ? Output::kGated
                                               : Output::kActivated;
}

// Tables of a granularity: [output][a is e5m2][b is e5m2].
#define TORCHEXT_TABLES(G)                                                                   \
  {                                                                                          \
      {{{&table_##G##_e4m3_e4m3, &table_##G##_e4m3_e4m3_swapped}, {&table_##G##_e4m3_e5m2}}, \
       {{&table_##G##_e5m2_e4m3}, {&table_##G##_e5m2_e5m2}}},                                \
      {{{&table_##G##_e4m3_e4m3_activated}, {&table_##G##_e4m3_e5m2_activated}},             \
       {{&table_##G##_e5m2_e4m3_activated}, {&table_##G##_e5m2_e5m2_activated}}},            \
      {{{&table_##G##_e4m3_e4m3_gated}, {&table_##G##_e4m3_e5m2_gated}},                     \
       {{&table_##G##_e5m2_e4m3_gated}, {&table_##G##_e5m2_e5m2_gated}}},                    \
  }
using Kernels = std::vector<const GemmKernel*>;
using Table = KernelTable (*)();

const Kernels& kernels_for(const GemmProblem& p) {
  static const std::vector<Table> tables[3][3][2][2] = {
      TORCHEXT_TABLES(1d2d), TORCHEXT_TABLES(1d1d), TORCHEXT_TABLES(rowwise)};
  static const auto all = [] {
    std::array<Kernels, 36> all;
    for (int i = 0; i < 36; ++i)
      for (const Table table : tables[i / 12][i / 4 % 3][i / 2 % 2][i % 2])
        for (const GemmKernel& kernel : table()) all[i].push_back(&kernel);
    return all;
  }();
  const bool a_e5m2 = p.a_dtype == ScalarType::Float8_e5m2;
  const bool b_e5m2 = p.b_dtype == ScalarType::Float8_e5m2;
  return all[int(p.granularity) * 12 + int(output_of(p)) * 4 + a_e5m2 * 2 + b_e5m2];
}
#undef TORCHEXT_TABLES

int64_t rows_of_group(const GemmProblem& p) {
  if (p.expected_rows > 0) return p.expected_rows;
  return p.grouping == Grouping::kCounts ? p.group_rows : ceil_div(p.m, p.groups);
}

// Tiles of rows and of features, as far as the host can know.
int64_t row_tiles(const GemmProblem& p, uint32_t height) {
  switch (p.grouping) {
    case Grouping::kNone:
      return ceil_div(p.m, height);
    case Grouping::kAlongK:
      return p.groups * ceil_div(p.m, height);
    default:
      return p.groups * ceil_div(rows_of_group(p), height);
  }
}

bool can_run(const GemmProblem& p, const Choice& choice, int sms) {
  const TileShape& tile = choice.kernel->tile;
  if (tile.swapped && (choice.multicast || p.grouping == Grouping::kAlongK)) return false;
  if (!tile.swapped && choice.split_k > 1) return false;
  return int(choice.cluster()) <= sms;
}

Candidate estimate(const GemmProblem& p, const Choice& choice, int sms) {
  const TileShape& tile = choice.kernel->tile;
  const double rows = tile.rows, columns = tile.columns;
  const bool by_column = tile.swapped || p.granularity == Granularity::k1D1D;
  const double parts = columns > 192 ? columns / 128 : 1, slices = rows / 64;
  const double warpgroups = tile.rows == 64 ? 1 : 2;

  Candidate c = {};
  c.choice = choice;
  c.tensor_cycles = rows * columns * kTileK / kTensorMacs;
  // A scheduler has one warp of each warpgroup; an accumulator's register costs it an FFMA, and
  // where columns have scales of their own a product as well.
  const double registers = rows * columns / (64 * warpgroups) / 2;
  c.issue_cycles = warpgroups * (registers * (by_column ? 2 : 1) + kIssueOverhead);
  // Four wgmmas a block read 64 rows and its columns, 32 bytes each; TMA writes each once.
  c.shared_cycles =
      (slices * parts * 4 * 32 * (64 + columns / parts) + (rows + columns) * kTileK) / kSharedBytes;
  c.load_cycles = (rows / (choice.multicast ? 2 : 1) + columns) * kTileK / kL2Bytes;
  c.k_block_cycles =
      std::max(std::max(c.tensor_cycles, c.issue_cycles), std::max(c.shared_cycles, c.load_cycles));

  const int64_t width = tile.n() * (choice.multicast ? 2 : 1);
  const int64_t units = std::max<int64_t>(clusters_at_a_time(sms, choice.cluster()), 1);
  const int64_t unit_tiles = row_tiles(p, tile.m()) * ceil_div(features(p), width);
  c.tiles = unit_tiles * (choice.multicast ? 2 : 1);
  c.waves = ceil_div(unit_tiles, units);

  const double k_blocks =
      double(ceil_div(p.grouping == Grouping::kAlongK ? ceil_div(p.k, p.groups) : p.k, kTileK));
  const double out_bytes = double(element_size(p.out_dtype)) * (p.accumulate ? 2 : 1);
  const double epilogue =
      kTileOverhead + double(tile.m()) * tile.n() * out_bytes / kStoreBytes / choice.split_k;
  double exchange = 0;
  if (choice.split_k > 1)
    exchange = kExchange + rows * columns * 4 * (1 - 1.0 / choice.split_k) / kExchangeBytes;
  const double tile_cycles =
      std::ceil(k_blocks / choice.split_k) * c.k_block_cycles + epilogue + exchange;

  const double weights =
      p.grouping == Grouping::kNone || p.grouping == Grouping::kAlongK ? 1 : double(p.groups);
  const double outputs = p.grouping == Grouping::kAlongK ? double(p.groups) : 1;
  const double bytes =
      double(p.m) * p.k + weights * p.n * p.k + outputs * p.m * features(p) * out_bytes;
  c.memory_cycles = kStart + bytes / kMemoryBytes;
  c.cycles = std::max(kStart + c.waves * tile_cycles, c.memory_cycles);
  return c;
}

// All that may run, the best first. `split_k` other than 0: only those.
std::vector<Candidate> candidates(const GemmProblem& p, int sms, uint32_t split_k) {
  constexpr int64_t kLeastBlocks = 4;  // of K, for each of those who share it
  std::vector<Candidate> found;
  for (const GemmKernel* kernel : kernels_for(p)) {
    for (const bool multicast : {false, true}) {
      for (uint32_t split = 1; split <= kMaxSplits; split *= 2) {
        const Choice choice{kernel, split, multicast};
        if (!can_run(p, choice, sms)) continue;
        if (split > 1 && ceil_div(p.k, kTileK) < split * kLeastBlocks) continue;
        if (multicast && ceil_div(features(p), kernel->tile.n()) < 2) continue;
        if (split_k != 0 && split != split_k) continue;
        found.push_back(estimate(p, choice, sms));
      }
    }
  }
  std::stable_sort(found.begin(), found.end(),
                   [](const Candidate& x, const Candidate& y) { return x.cycles < y.cycles; });
  return found;
}

struct Verdict {
  Granularity granularity;
  int64_t least_m, greatest_m, n, k;
  const char* tile;
  uint32_t split_k, cluster;
};

const Verdict kVerdicts[] = {
#define TUNED(granularity, least_m, greatest_m, n, k, tile, split_k, cluster) \
  {Granularity::granularity, least_m, greatest_m, n, k, tile, split_k, cluster},
#include "tuned.inc"
#undef TUNED
    {Granularity::k1D2D, 0, -1, 0, 0, nullptr, 0,
     0}};  // matches nothing; an array may not be empty

const GemmKernel* kernel_named(const GemmProblem& p, const char* tile) {
  for (const GemmKernel* kernel : kernels_for(p))
    if (std::strcmp(kernel->tile.name, tile) == 0) return kernel;
  return nullptr;
}

Choice measured(const GemmProblem& p, int sms) {
  if (p.grouping != Grouping::kNone || p.activation != Activation::kNone) return {};
  for (const Verdict& v : kVerdicts) {
    if (v.granularity != p.granularity || v.n != p.n || v.k != p.k || p.m < v.least_m ||
        p.m > v.greatest_m)
      continue;
    const Choice choice{kernel_named(p, v.tile), v.split_k, v.split_k == 1 && v.cluster == 2};
    if (choice.kernel != nullptr && can_run(p, choice, sms)) return choice;
  }
  return {};
}

struct Forced {
  std::string tile;
  uint32_t split_k, cluster;
};
std::mutex forced_mutex;
Forced forced;
std::atomic<bool> is_forced{false};

Choice forced_choice(const GemmProblem& p, int sms) {
  const std::lock_guard<std::mutex> lock(forced_mutex);
  const Choice choice{kernel_named(p, forced.tile.c_str()), forced.split_k,
                      forced.split_k == 1 && forced.cluster == 2};
  TORCHEXT_CHECK_VALUE(choice.kernel != nullptr && can_run(p, choice, sms) &&
                           choice.cluster() == std::max(forced.cluster, forced.split_k),
                       "torchext.gemm_selection.forced: no kernel ", forced.tile,
                       " with split_k=", forced.split_k, " and cluster=", forced.cluster,
                       " can compute this product on ", sms,
                       " SMs; see torchext.gemm_selection.configurations");
  return choice;
}

}  // namespace

Selection explain(const GemmProblem& p, int sm_count) {
  const int sms = p.num_sms > 0 ? p.num_sms : sm_count;
  Selection selection;
  // The number of parts of K decides the order of sums, and so the bits: it is chosen for the whole
  // GPU, so that they do not depend on num_sms (as long as that is enough for a cluster).
  Choice choice = measured(p, sm_count);
  selection.source = choice.kernel != nullptr ? "tuned table" : "cost model";
  if (choice.kernel == nullptr) choice = candidates(p, sm_count, 0).front().choice;
  selection.candidates = candidates(p, sms, 0);
  if (sms < sm_count) {
    auto fitting = candidates(p, sms, choice.split_k);
    if (fitting.empty()) fitting = selection.candidates;
    choice = fitting.front().choice;
    selection.source = "cost model";
  }
  selection.choice = choice;
  if (is_forced.load(std::memory_order_acquire)) {
    selection.choice = forced_choice(p, sms);
    selection.source = "forced";
  }
  const auto is_choice = [&](const Candidate& c) {
    return c.choice.kernel == selection.choice.kernel &&
           c.choice.cluster() == selection.choice.cluster();
  };
  if (std::none_of(selection.candidates.begin(), selection.candidates.end(), is_choice))
    selection.candidates.push_back(estimate(p, selection.choice, sms));
  return selection;
}

Choice select(const GemmProblem& p, int sm_count) {
  if (is_forced.load(std::memory_order_acquire))
    return forced_choice(p, p.num_sms > 0 ? p.num_sms : sm_count);
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int>;
  struct Entry {
    Key key{-1, 0, 0, 0, 0, 0, 0, 0};
    Choice choice;
  };
  constexpr size_t kEntries = 256;
  thread_local std::array<Entry, kEntries> remembered;
  const int kinds = int(p.granularity) | int(p.a_dtype == ScalarType::Float8_e5m2) << 2 |
                    int(p.b_dtype == ScalarType::Float8_e5m2) << 3 | int(p.grouping) << 4 |
                    int(p.accumulate) << 8 | int(output_of(p)) << 9 |
                    int(element_size(p.out_dtype)) << 12;
  const Key key{
      p.m, p.n, p.k, p.groups, p.group_rows, p.expected_rows, kinds, p.num_sms << 16 | sm_count};
  // Sizes share their low bits: multiply, and take high ones.
  uint64_t hash = uint64_t(kinds);
  for (const int64_t size : {p.m, p.n, p.k, p.groups})
    hash = (hash ^ uint64_t(size)) * 0x9e3779b97f4a7c15;
  Entry& entry = remembered[hash >> 56];
  static_assert(kEntries == 1 << 8);
  if (entry.key != key) entry = {key, explain(p, sm_count).choice};
  return entry.choice;
}

namespace {

void append(std::string& text, const Candidate& c) {
  const TileShape& tile = c.choice.kernel->tile;
  std::ostringstream out;
  out << "{\"name\": \"" << tile.name << "\", \"split_k\": " << c.choice.split_k
      << ", \"cluster\": " << c.choice.cluster() << ", \"tile_m\": " << tile.m()
      << ", \"tile_n\": " << tile.n() << ", \"stages\": " << tile.stages
      << ", \"tiles\": " << c.tiles << ", \"waves\": " << c.waves
      << ", \"tensor_cycles\": " << c.tensor_cycles << ", \"issue_cycles\": " << c.issue_cycles
      << ", \"shared_cycles\": " << c.shared_cycles << ", \"load_cycles\": " << c.load_cycles
      << ", \"memory_cycles\": " << c.memory_cycles << ", \"cycles\": " << c.cycles << "}";
  text += out.str();
}

}  // namespace
}  // namespace torchext::sm90

// For torchext.gemm_selection. What a GemmProblem needs, as numbers of the enums in gemm.h; the
// answer is JSON. Returns the bytes that it needs, the ending zero included.
extern "C" __attribute__((visibility("default"))) int64_t
torchext_explain_gemm(int64_t m, int64_t n, int64_t k, int granularity, bool a_e5m2, bool b_e5m2,
                      int64_t out_bytes, bool accumulate, int grouping, int64_t groups,
                      int64_t group_rows, int num_sms, int sm_count, char* text, int64_t size) {
  using namespace torchext;
  using namespace torchext::sm90;
  GemmProblem p = {};
  p.m = m;
  p.n = n;
  p.k = k;
  p.granularity = Granularity(granularity);
  p.a_dtype = a_e5m2 ? ScalarType::Float8_e5m2 : ScalarType::Float8_e4m3fn;
  p.b_dtype = b_e5m2 ? ScalarType::Float8_e5m2 : ScalarType::Float8_e4m3fn;
  p.out_dtype = out_bytes == 4 ? ScalarType::Float : ScalarType::BFloat16;
  p.accumulate = accumulate;
  p.grouping = Grouping(grouping);
  p.groups = groups;
  p.group_rows = p.grouping == Grouping::kCounts ? m / groups : 0;
  p.expected_rows = group_rows;
  p.num_sms = num_sms;
  const Selection selection = explain(p, sm_count);
  std::string json = "{\"source\": \"" + std::string(selection.source) + "\", \"candidates\": [";
  for (const Candidate& candidate : selection.candidates) {
    if (json.back() == '}') json += ", ";
    append(json, candidate);
  }
  json += "], \"name\": \"" + std::string(selection.choice.kernel->tile.name) +
          "\", \"split_k\": " + std::to_string(selection.choice.split_k) +
          ", \"cluster\": " + std::to_string(selection.choice.cluster()) + "}";
  if (size > int64_t(json.size())) std::memcpy(text, json.c_str(), json.size() + 1);
  return int64_t(json.size()) + 1;
}

// Makes the next launches use a tile (nullptr: chooses again), process-wide.
extern "C" __attribute__((visibility("default"))) void torchext_force_gemm(const char* tile,
                                                                           int split_k,
                                                                           int cluster) {
  using namespace torchext::sm90;
  const std::lock_guard<std::mutex> lock(forced_mutex);
  if (tile != nullptr) forced = {tile, uint32_t(split_k), uint32_t(cluster)};
  is_forced.store(tile != nullptr, std::memory_order_release);
}
