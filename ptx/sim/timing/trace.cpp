// The Recorder: coalescing, bank conflicts, L1, and events without the turns of polling loops.
#include "trace.h"

#include <algorithm>
#include <cstring>

#include "../machine/machine.h"
#include "weights.h"

namespace torchext::sim::timing {

namespace {

thread_local Recorder* listener = nullptr;
thread_local bool skips_products = false;

constexpr std::uint32_t kLine = 128, kSector = 32;

// A polling loop has at most so many instructions between two tries. Longer ones are kept.
constexpr std::size_t kSpin = 64;

}  // namespace

Recorder* recorder() {
  return listener;
}
bool without_products() {
  return skips_products;
}

Listening::Listening(Recorder* recorder, bool without_products) {
  listener = recorder;
  skips_products = without_products;
}
Listening::~Listening() {
  listener = nullptr;
  skips_products = false;
}

std::uint64_t BufferUse::unique() const {
  std::uint64_t lines = 0;
  for (const std::uint64_t word : touched)
    lines += static_cast<std::uint64_t>(__builtin_popcountll(word));
  return lines * kLine;
}

std::uint64_t ClusterTrace::events() const {
  std::uint64_t n = 0;
  for (const auto& cta : ctas) {
    for (const auto& warp : cta) n += warp.size();
  }
  return n;
}

std::size_t Recorder::ActionHash::operator()(const Action& a) const {
  std::uint64_t h = 0;
  const auto mix = [&](std::uint64_t v) { h = (h ^ v) * 0x9e3779b97f4a7c15ull, h ^= h >> 29; };
  mix(std::uint64_t{a.kind} << 32 | std::uint64_t{a.rank} << 24 | std::uint64_t{a.lanes} << 16 |
      a.buffer);
  mix(std::uint64_t{a.id} << 32 | a.count);
  mix(std::uint64_t{a.bytes} << 32 | a.ideal);
  return h;
}

Recorder::Recorder(const Cluster& cluster, std::uint32_t warps_per_cta)
    : cluster_(cluster),
      past_l1_(past_l1(*cluster.grid.program)),
      trace_(std::make_unique<ClusterTrace>()) {
  const std::size_t ctas = cluster.grid.cluster_size;
  trace_->number = cluster.number;
  trace_->ctas.assign(ctas, std::vector<std::vector<Event>>(warps_per_cta));
  for (auto& cta : trace_->ctas) {
    for (auto& warp : cta) warps_.push_back({&warp});
  }
  caches_.resize(ctas);
  const std::uint32_t shared = cluster.grid.shared_bytes, l1 = 256 << 10;
  for (L1& cache : caches_) cache.capacity = shared + (8u << 10) < l1 ? (l1 - shared) / kLine : 64;
  const auto& buffers = cluster.grid.memory.buffers();
  trace_->buffers.resize(buffers.size());
  for (std::size_t i = 0; i < buffers.size(); ++i)
    index_[buffers[i].get()] = static_cast<std::uint16_t>(i);
}

std::uint16_t Recorder::index_of(const GlobalBuffer* buffer) const {
  const auto it = index_.find(buffer);
  return it == index_.end() ? Action::kNoBuffer : it->second;
}

void Recorder::touch(const GlobalBuffer* buffer, std::uint64_t address, std::uint64_t bytes,
                     bool writes, std::uint64_t times) {
  const std::uint16_t index = index_of(buffer);
  if (index == Action::kNoBuffer || bytes == 0) return;
  BufferUse& use = trace_->buffers[index];
  (writes ? use.stored : use.loaded) += bytes * times;
  const std::uint64_t first = buffer->begin / kLine;
  if (use.touched.empty()) use.touched.resize((buffer->end / kLine - first) / 64 + 1);
  const std::uint64_t last =
      std::min((address + bytes - 1) / kLine - first, std::uint64_t{use.touched.size()} * 64 - 1);
  for (std::uint64_t line = address / kLine - first; line <= last; ++line)
    use.touched[line / 64] |= std::uint64_t{1} << line % 64;
}

void Recorder::begin(Warp& warp, const Instruction& i, std::uint32_t pc, std::uint32_t mask) {
  current_ = &warps_[warp.cta().rank * cluster_.grid.warps_per_cta + warp.index()];
  instruction_ = &i;
  pc_ = pc;
  failed_ = false;
  noted_.clear();
  switch (i.traits.op_class) {
    case OpClass::load:
    case OpClass::store:
    case OpClass::atomic:
    case OpClass::matrix_memory:
    case OpClass::async_store:
      if (mask != 0) memory(warp, i, mask);
      break;
    default:
      break;
  }
}

void Recorder::end(bool blocked) {
  // A barrier counts when the warp arrives, not when it may go on.
  const bool arrives = instruction_->traits.op_class == OpClass::barrier;
  if (arrives ? noted_.empty() : blocked) return;
  WarpState& w = *current_;
  if (failed_) {
    if (w.spin_pc != pc_ || w.events->size() - w.spin_begin > kSpin) {
      w.spin_pc = pc_;
      w.spin_begin = w.events->size();
    } else {
      w.events->resize(w.spin_begin);
    }
  } else if (w.spin_pc == pc_ && instruction_->traits.op_class == OpClass::mbarrier) {
    if (w.events->size() - w.spin_begin <= kSpin) w.events->resize(w.spin_begin);
    w.spin_pc = ~0u;
  }
  std::uint32_t more = 0;
  for (const Action& action : noted_) {
    const auto [it, is_new] =
        interned_.try_emplace(action, static_cast<std::uint32_t>(trace_->actions.size()));
    if (is_new) trace_->actions.push_back(action);
    w.events->push_back({pc_ | more, it->second});
    more = Event::kMore;
  }
  if (noted_.empty()) w.events->push_back({pc_, 0});
}

// The addresses are read before the instruction runs: it may load into its own address register.
void Recorder::memory(Warp& warp, const Instruction& i, std::uint32_t mask) {
  const MemoryUse& use = i.traits.memory;
  if (!use.reads && !use.writes) return;
  const bool matrix = i.traits.op_class == OpClass::matrix_memory;
  std::uint32_t bytes = use.bytes;
  if (matrix && i.list.size() <= 4) {  // ldmatrix, stmatrix: a row of 16 bytes for each lane
    mask &= i.list.size() == 4 ? ~0u : (1u << 8 * i.list.size()) - 1;
    bytes = 16;
  }
  Space space = use.reads ? use.from : use.to;
  std::uint64_t address[32] = {};
  for_lanes(mask, [&](int lane) { address[lane] = warp.address(i.s[0], i.offset, lane); });
  if (mask == 0 || space == Space::param || space == Space::constant || space == Space::local)
    return;
  if (space == Space::generic) {
    const std::uint64_t window = address[lane_of(mask)] & kWindowMask;
    if (window == kSharedWindow)
      space = Space::shared_cluster;
    else if (window != 0)
      return;
    else
      space = Space::global;
  }
  if (space == Space::global) {
    const bool cached = i.traits.op_class == OpClass::load && !past_l1_[pc_];
    return note_global(warp, address, mask, bytes, use.reads, use.writes, cached);
  }
  const auto owner = static_cast<std::uint32_t>(address[lane_of(mask)]) >> kSharedRankShift;
  const std::uint32_t rank = owner == 0 ? warp.cta().rank : owner - 1;
  note_shared(address, mask, bytes, use.writes, static_cast<std::uint8_t>(rank), bytes);
}

// The 32 banks serve one word each in a wavefront. Lanes are served in groups that together access
// up to 128 bytes.
void Recorder::note_shared(const std::uint64_t (&address)[32], std::uint32_t mask,
                           std::uint32_t bytes, bool writes, std::uint8_t rank,
                           std::uint32_t width) {
  const int group = static_cast<int>(std::max(1u, 128 / std::max(4u, width)));
  Action a;
  a.kind = Action::shared;
  a.rank = rank;
  a.writes = writes;
  for (int first = 0; first < 32; first += group) {
    std::uint32_t most = 0;
    std::vector<std::uint32_t> by_bank[32];
    const std::uint32_t lanes = mask >> first & (group == 32 ? ~0u : (1u << group) - 1);
    if (lanes == 0) continue;
    for_lanes(lanes, [&](int k) {
      const auto at = static_cast<std::uint32_t>(address[first + k]) & kSharedOffsetMask;
      for (std::uint32_t word = at / 4; word <= (at + bytes - 1) / 4; ++word) {
        auto& bank = by_bank[word % 32];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
      }
    });
    for (const auto& bank : by_bank) most = std::max(most, static_cast<std::uint32_t>(bank.size()));
    a.count += most;
    ++a.ideal;
  }
  a.bytes = bytes * static_cast<std::uint32_t>(__builtin_popcount(mask));
  note(a);
}

void Recorder::note_global(Warp& warp, const std::uint64_t (&address)[32], std::uint32_t mask,
                           std::uint32_t bytes, bool reads, bool writes, bool cached) {
  std::uint64_t sectors[32 * 2];
  std::size_t n = 0;
  for_lanes(mask, [&](int lane) {
    for (std::uint64_t s = address[lane] / kSector; s <= (address[lane] + bytes - 1) / kSector; ++s)
      if (n < 64) sectors[n++] = s;
  });
  std::sort(sectors, sectors + n);
  n = static_cast<std::size_t>(std::unique(sectors, sectors + n) - sectors);
  const GlobalBuffer* buffer = cluster_.grid.memory.find(address[lane_of(mask)]);
  Action a;
  a.kind = Action::global;
  a.writes = writes;
  a.flag = reads && writes;  // atomic
  a.buffer = index_of(buffer);
  const auto lanes = static_cast<std::uint32_t>(__builtin_popcount(mask));
  a.bytes = bytes * lanes;
  a.ideal = (bytes * lanes + kSector - 1) / kSector;
  a.id = static_cast<std::uint32_t>(n);  // sectors, in L1 or not
  L1& l1 = caches_[warp.cta().rank];
  for (std::size_t k = 0; k < n; ++k) {
    if (cached) {
      std::uint32_t& held = l1.sectors[sectors[k] / 4];
      const std::uint32_t bit = 1u << sectors[k] % 4;
      if (held & bit) continue;
      held |= bit;
    }
    ++a.count;
    if (buffer != nullptr) touch(buffer, sectors[k] * kSector, kSector, writes, 1);
  }
  if (l1.sectors.size() > l1.capacity) l1.sectors.clear();
  note(a);
}

void Recorder::note_copy(Warp& warp, const std::uint64_t (&from)[32], std::uint32_t mask,
                         std::uint32_t bytes) {
  note_global(warp, from, mask, bytes, true, false, !past_l1_[pc_]);
  noted_.back().kind = Action::copy;
}

}  // namespace torchext::sim::timing
