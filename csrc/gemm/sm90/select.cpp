// Chooses a kernel (select.h). For each kernel that can compute the problem, the model counts the
// cycles that an SM spends on a K block, the waves in which CTAs compute all tiles, and the cycles
// of a wave outside the main loop.
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

// An SM of a Hopper GPU; rates per cycle. The multiply-adds are NVIDIA's (architectures.inc), and
// shared memory has 32 banks of 4 bytes. The others were fitted to 1,530 timings of all kernels on
// an H200 (benchmarks/results/2026-11-26-h200/timings.json), so that the kernel that the model
// chooses takes as little longer than the fastest as possible: 3.4 % on average. They are: the rate
// at which one SM loads tiles through L2; what a launch and its first tile take; the costs of an
// epilogue and of an exchange between CTAs; and the rate at which all SMs together load from that
// H200's memory, 2,450 bytes per cycle where 4,917 GB/s are rated. The other GPUs' memory is taken to
// be as many times slower as its rating is.
constexpr double kTensorMacs = find_architecture(90)->fp8_macs, kSharedBytes = 128;
constexpr double kL2Bytes = 43.5;
constexpr double kStart = 18400, kTileOverhead = 660, kStoreBytes = 14.4;
constexpr double kExchange = 2300, kExchangeBytes = 2.9;
constexpr double kMemoryBytesPerRated = 2450.0 / 4917;

// For a K block: instructions of a warp beside its promotion; a warpgroup's wait for each batch of
// wgmmas beyond their work; its cycles of promotion for each register, while the tensor cores use
// the registers, too; what goes on between K blocks. A pair that multicasts waits for each other.
constexpr double kIssueOverhead = 268, kBatchLatency = 170, kPromotion = 2.52, kBetween = 30;
constexpr double kPairs = 1.14;

// Tiles with so many accumulators hide that wait. On the H200, their pairs took from 1 % less to 3 % more
// time than single CTAs, and the simulator's clock predicts 10 % less. Groups have any number of rows, of
// which tiles of 256 rows would waste more.
bool hides_its_pair(const GemmProblem& p, const TileShape& tile) {
  const bool groups_rows = p.grouping != Grouping::kNone && p.grouping != Grouping::kAlongK;
  return p.granularity != Granularity::k1D1D && tile.rows * tile.columns >= 256 * 128 &&
         (!groups_rows || tile.rows <= 128);
}

// All kernels.
const std::vector<const GemmKernel*>& kernels() {
  static const auto all = [] {
    std::vector<const GemmKernel*> all;
#define TORCHEXT_APPEND(G, KIND)                          \
  for (size_t i = 0; i < kernels_##G##_##KIND.count; ++i) \
    all.push_back(&kernels_##G##_##KIND.kernels[i]);
    TORCHEXT_SM90_FILES(TORCHEXT_APPEND)
#undef TORCHEXT_APPEND
    return all;
  }();
  return all;
}

int64_t rows_of_group(const GemmProblem& p) {
  if (p.expected_rows > 0) return p.expected_rows;
  return p.grouping == Grouping::kCounts ? p.group_rows : ceil_div(p.m, p.groups);
}

// How many tiles of `height` rows the problem has; an estimate if only the device knows the groups.
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

Candidate estimate(const GemmProblem& p, const Choice& choice, int sms, const Gpu& gpu) {
  const TileShape& tile = choice.kernel->tile;
  const double rows = tile.rows, columns = tile.columns;
  const bool by_column = tile.swapped || p.granularity == Granularity::k1D1D;
  const double parts = columns > 192 ? columns / 128 : 1, slices = rows / 64;
  const double warpgroups = tile.rows == 64 ? 1 : 2;

  Candidate c = {};
  c.choice = choice;
  c.tensor_cycles = rows * columns * kTileK / kTensorMacs;
  // Each scheduler has one warp of each warpgroup. Promotion costs an FFMA for each register of an
  // accumulator, and an FMUL if each column has its own scale.
  const double registers = rows * columns / (64 * warpgroups) / 2;
  c.issue_cycles = warpgroups * (registers * (by_column ? 2 : 1) + kIssueOverhead);
  // Each of a block's four wgmmas reads 32 bytes of its 64 rows and of its columns; TMA writes each
  // row and column of the K block once.
  c.shared_cycles =
      (slices * parts * 4 * 32 * (64 + columns / parts) + (rows + columns) * kTileK) / kSharedBytes;
  c.load_cycles = (rows / (choice.multicast ? 2 : 1) + columns) * kTileK / kL2Bytes;
  // One warpgroup by itself: it multiplies, waits and promotes in turn.
  const double alone = (c.tensor_cycles + slices * parts * kBatchLatency) / warpgroups +
                       registers * (by_column ? 2 : 1) * kPromotion;
  c.k_block_cycles =
      std::max({c.tensor_cycles, c.issue_cycles, c.shared_cycles, c.load_cycles, alone}) *
          (choice.multicast && !hides_its_pair(p, tile) ? kPairs : 1) +
      kBetween;

  const int64_t width = tile.n() * (choice.multicast ? 2 : 1);
  const int64_t units = std::max<int64_t>(clusters_at_a_time(sms, choice.cluster()), 1);
  const int64_t unit_tiles = row_tiles(p, tile.m()) * ceil_div(out_columns(p), width);
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
      double(p.m) * p.k + weights * p.n * p.k + outputs * p.m * out_columns(p) * out_bytes;
  const double moving = bytes / (kMemoryBytesPerRated * gpu.memory_gigabytes_per_second);
  c.memory_cycles = kStart + moving;
  // Each wave takes as long as its tiles, or as memory takes for the wave's share of the bytes. So the
  // waste of a last wave with few tiles counts where tiles bound the time, not where memory does. Between
  // waves, CTAs that exchange sums do not load.
  const double full = std::floor(double(unit_tiles) / double(units));
  const double last = double(unit_tiles) - full * double(units);
  const double share = moving / double(unit_tiles);
  c.tile_cycles = double(c.waves) * tile_cycles;
  const auto wave = [&](double count, bool first) {
    return std::max(tile_cycles, share * count + (first ? 0 : exchange));
  };
  c.cycles = kStart;
  if (full > 0) c.cycles += wave(double(units), true) + (full - 1) * wave(double(units), false);
  if (last > 0) c.cycles += wave(last, full == 0);
  return c;
}

// All choices that can run the problem, the best first; only those with this split_k unless it is
// 0.
std::vector<Candidate> candidates(const GemmProblem& p, int sms, const Gpu& gpu, uint32_t split_k) {
  constexpr int64_t kLeastBlocks = 4;  // K blocks for each CTA that shares K
  std::vector<Candidate> found;
  for (const GemmKernel* kernel : kernels()) {
    if (!kernel->computes(p)) continue;
    for (const bool multicast : {false, true}) {
      for (uint32_t split = 1; split <= kMaxSplits; split *= 2) {
        const Choice choice{kernel, split, multicast};
        if (!can_run(p, choice, sms)) continue;
        if (split > 1 && ceil_div(p.k, kTileK) < split * kLeastBlocks) continue;
        if (multicast && ceil_div(out_columns(p), kernel->tile.n()) < 2) continue;
        if (split_k != 0 && split != split_k) continue;
        found.push_back(estimate(p, choice, sms, gpu));
      }
    }
  }
  // Where memory bounds several, the least work for the SMs decides, then the least traffic with L2.
  std::stable_sort(found.begin(), found.end(), [](const Candidate& x, const Candidate& y) {
    return std::tie(x.cycles, x.tile_cycles, x.load_cycles) <
           std::tie(y.cycles, y.tile_cycles, y.load_cycles);
  });
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
  for (const GemmKernel* kernel : kernels())
    if (kernel->computes(p) && std::strcmp(kernel->tile.name, tile) == 0) return kernel;
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

Selection explain(const GemmProblem& p, const Gpu& gpu) {
  const int sm_count = gpu.sm_count, sms = p.num_sms > 0 ? p.num_sms : sm_count;
  Selection selection;
  // split_k determines the order of sums, and so the bits. It is chosen for the whole GPU, so that
  // bits do not depend on num_sms (as long as a cluster fits on num_sms SMs).
  Choice choice = measured(p, sm_count);
  selection.source = choice.kernel != nullptr ? "tuned table" : "cost model";
  if (choice.kernel == nullptr) choice = candidates(p, sm_count, gpu, 0).front().choice;
  selection.candidates = candidates(p, sms, gpu, 0);
  if (sms < sm_count) {
    auto fitting = candidates(p, sms, gpu, choice.split_k);
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
    selection.candidates.push_back(estimate(p, selection.choice, sms, gpu));
  return selection;
}

namespace {

// Everything that a choice depends on.
struct Key {
  int64_t m = -1, n, k, groups, group_rows, expected_rows;
  Granularity granularity;
  Grouping grouping;
  Output output;
  ScalarType a_dtype, b_dtype, out_dtype;
  bool accumulate;
  int num_sms, sm_count, memory;

  Key() = default;  // equals the key of no problem
  Key(const GemmProblem& p, const Gpu& gpu)
      : m(p.m),
        n(p.n),
        k(p.k),
        groups(p.groups),
        group_rows(p.group_rows),
        expected_rows(p.expected_rows),
        granularity(p.granularity),
        grouping(p.grouping),
        output(output_of(p)),
        a_dtype(p.a_dtype),
        b_dtype(p.b_dtype),
        out_dtype(p.out_dtype),
        accumulate(p.accumulate),
        num_sms(p.num_sms),
        sm_count(gpu.sm_count),
        memory(gpu.memory_gigabytes_per_second) {}

  auto tied() const {
    return std::tie(m, n, k, groups, group_rows, expected_rows, granularity, grouping, output,
                    a_dtype, b_dtype, out_dtype, accumulate, num_sms, sm_count, memory);
  }
  bool operator==(const Key& other) const { return tied() == other.tied(); }
};

}  // namespace

Choice select(const GemmProblem& p, const Gpu& gpu) {
  if (is_forced.load(std::memory_order_acquire))
    return forced_choice(p, p.num_sms > 0 ? p.num_sms : gpu.sm_count);
  struct Entry {
    Key key{};
    Choice choice;
  };
  constexpr size_t kEntries = 256;
  thread_local std::array<Entry, kEntries> remembered;
  const Key key(p, gpu);
  // Sizes often have the same low bits: multiply, and take the high bits.
  uint64_t hash = 0;
  for (const int64_t size : {p.m, p.n, p.k, p.groups})
    hash = (hash ^ uint64_t(size)) * 0x9e3779b97f4a7c15;
  Entry& entry = remembered[hash >> 56];
  static_assert(kEntries == 1 << 8);
  if (!(entry.key == key)) entry = {key, explain(p, gpu).choice};
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

// For torchext.gemm_selection. The arguments are the fields of a GemmProblem, enums of gemm.h as
// their numbers. Writes JSON to `text` if its `size` bytes are enough. Returns how many bytes the
// JSON needs, including the terminating zero.
extern "C" __attribute__((visibility("default"))) int64_t torchext_explain_gemm(
    int64_t m, int64_t n, int64_t k, int granularity, bool a_e5m2, bool b_e5m2, int64_t out_bytes,
    bool accumulate, int grouping, int64_t groups, int64_t group_rows, int num_sms, int sm_count,
    int memory_gigabytes_per_second, char* text, int64_t size) {
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
  const Selection selection = explain(p, {sm_count, memory_gigabytes_per_second});
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

// Makes all later launches of the process use a tile; nullptr returns to choosing.
extern "C" __attribute__((visibility("default"))) void torchext_force_gemm(const char* tile,
                                                                           int split_k,
                                                                           int cluster) {
  using namespace torchext::sm90;
  const std::lock_guard<std::mutex> lock(forced_mutex);
  if (tile != nullptr) forced = {tile, uint32_t(split_k), uint32_t(cluster)};
  is_forced.store(tile != nullptr, std::memory_order_release);
}
