// Runs a warp: sets its registers up, chooses a group of lanes, executes instructions.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../instructions/wgmma_stream.h"
#include "../timing/trace.h"
#include "machine.h"

namespace torchext::sim {

namespace {

std::uint64_t special_value(Special which, const Cta& cta, std::uint32_t thread, std::uint32_t lane,
                            std::uint32_t warp) {
  const Grid& grid = cta.cluster.grid;
  const LaunchOptions& o = grid.options;
  const Dim3 b = o.block, c = grid.cluster_dim;
  const std::uint32_t bit = 1u << lane;
  switch (which) {
    case Special::tid_x:
      return thread % b.x;
    case Special::tid_y:
      return thread / b.x % b.y;
    case Special::tid_z:
      return thread / (b.x * b.y);
    case Special::ntid_x:
      return b.x;
    case Special::ntid_y:
      return b.y;
    case Special::ntid_z:
      return b.z;
    case Special::ctaid_x:
      return cta.index.x;
    case Special::ctaid_y:
      return cta.index.y;
    case Special::ctaid_z:
      return cta.index.z;
    case Special::nctaid_x:
      return o.grid.x;
    case Special::nctaid_y:
      return o.grid.y;
    case Special::nctaid_z:
      return o.grid.z;
    case Special::laneid:
      return lane;
    case Special::warpid:
      return warp;
    case Special::nwarpid:
      return 64;
    case Special::smid:
      return (cta.cluster.number * grid.cluster_size + cta.rank) % o.num_sms;
    case Special::nsmid:
      return o.num_sms;
    case Special::gridid:
      return 1;
    case Special::lanemask_eq:
      return bit;
    case Special::lanemask_le:
      return bit | (bit - 1);
    case Special::lanemask_lt:
      return bit - 1;
    case Special::lanemask_ge:
      return ~(bit - 1);
    case Special::lanemask_gt:
      return ~(bit | (bit - 1));
    case Special::clusterid_x:
      return cta.index.x / c.x;
    case Special::clusterid_y:
      return cta.index.y / c.y;
    case Special::clusterid_z:
      return cta.index.z / c.z;
    case Special::nclusterid_x:
      return o.grid.x / c.x;
    case Special::nclusterid_y:
      return o.grid.y / c.y;
    case Special::nclusterid_z:
      return o.grid.z / c.z;
    case Special::cluster_ctaid_x:
      return cta.index.x % c.x;
    case Special::cluster_ctaid_y:
      return cta.index.y % c.y;
    case Special::cluster_ctaid_z:
      return cta.index.z % c.z;
    case Special::cluster_nctaid_x:
      return c.x;
    case Special::cluster_nctaid_y:
      return c.y;
    case Special::cluster_nctaid_z:
      return c.z;
    case Special::cluster_ctarank:
      return cta.rank;
    case Special::cluster_nctarank:
      return grid.cluster_size;
    case Special::is_explicit_cluster:
      return grid.explicit_cluster;
    case Special::dynamic_smem_size:
      return o.dynamic_smem;
    case Special::total_smem_size:
      return grid.shared_bytes;
    case Special::aggr_smem_size:
      return grid.shared_bytes;
    case Special::workspace_low:
      return static_cast<std::uint32_t>(grid.workspace_address());
    case Special::workspace_high:
      return grid.workspace_address() >> 32;
    case Special::reserved_shared_slot:
      return kReservedSharedSlot;
    case Special::reserved_shared_end:
      return kSharedBase;
    default:
      return 0;  // mov reads clocks at the time of the read
  }
}

}  // namespace

Warp::Warp(Cta& cta, std::uint32_t index)
    : cta_(cta),
      cluster_(cta.cluster),
      grid_(cta.cluster.grid),
      program_(*cta.cluster.grid.program),
      index_(index),
      register_file_(program_.register_bytes / 8 + 4),
      valid_(program_.register_count, 0) {
  banks_[0] = reinterpret_cast<std::uint8_t*>(register_file_.data());
  banks_[1] = reinterpret_cast<std::uint8_t*>(grid_.constants.data());
  valid_[0] = ~0u;
  local.resize(std::size_t{program_.local_bytes} * 32);
  local_valid.resize(local.size(), 0);
  stack_top_.fill(kStackBase);
  frame_.fill(kStackBase);
  const std::uint32_t first = index * 32;
  const std::uint32_t count = std::min(32u, grid_.threads - first);
  live_ = count == 32 ? ~0u : (1u << count) - 1;
  first_agent_ = (cta.rank * grid_.warps_per_cta + index) * 32;
  std::fill(std::begin(clock_), std::end(clock_), 1);
  self_.cluster = cluster_.key;
  self_.cta_threads = grid_.warps_per_cta * 32;
  for (const auto& [which, slot, predicate] : program_.specials) {
    if (predicate) set_predicate(slot, ~0u, special_value(which, cta, first, 0, index) ? ~0u : 0);
    for (std::uint32_t lane = 0; lane < 32 && !predicate; ++lane)
      put(slot, static_cast<int>(lane), special_value(which, cta, first + lane, lane, index));
  }
  if (program_.uses_wgmma) {
    register_fence.resize(program_.register_count, 0);
    in_flight.resize(program_.register_count, 0);
  }
  registers = grid_.registers_per_thread;
  Group g;
  g.mask = live_;
  groups_.push_back(std::move(g));
}

Warp::~Warp() = default;

bool Warp::runnable() const {
  for (const Group& g : groups_) {
    if (!g.parked && (!g.blocked || g.blocked_at != cluster_.progress || g.released || g.give_up))
      return true;
  }
  return false;
}

std::size_t Warp::pick_group() {
  const std::size_t picked = pick();
  groups_[picked].ran = true;
  return picked;
}

std::size_t Warp::pick() {
  if (groups_.size() == 1) return 0;
  std::size_t candidates[32], count = 0;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    const Group& g = groups_[i];
    if (!g.parked && (!g.blocked || g.blocked_at != cluster_.progress || g.released || g.give_up))
      candidates[count++] = i;
  }
  return count == 0 ? 0 : candidates[cluster_.random.below(static_cast<std::uint32_t>(count))];
}

std::uint32_t Warp::run(std::uint32_t quantum) {
  std::uint32_t executed = 0;
  if (live_ == 0 || !runnable()) return 0;
  const std::uint64_t progress_before = cluster_.progress;
  current_ = pick_group();
  const Instruction* code = program_.code.data();
  timing::Recorder* const recorder = timing::recorder();
  while (executed < quantum) {
    if (!groups_[current_].tokens.empty() && at_token()) {
      if (live_ == 0 || !runnable()) break;
      current_ = pick_group();
      continue;
    }
    if (groups_.size() > 1) merge_equal();
    Group& g = groups_[current_];
    const std::uint32_t pc = g.pc;
    const Instruction& i = code[pc];
    std::uint32_t mask = g.mask;
    if (i.guard >= 0) {
      std::uint32_t p;
      std::memcpy(&p, banks_[0] + i.guard, 4);
      if ((valid_[i.guard_reg] & mask) != mask && grid_.checks) {
        Slot slot;
        slot.reg = i.guard_reg;
        need(slot, mask, "as a predicate");
      }
      mask &= i.guard_negated ? ~p : p;
      if (mask == 0) {
        if (recorder != nullptr) {
          recorder->begin(*this, i, pc, 0);
          recorder->end(false);
        }
        ++g.pc;
        ++executed;
        ++cluster_.counts[pc];
        continue;
      }
    }
    Step step = Step::block;
    if (!i.aligned || mask == live_ || together(i, &mask)) {
      if (!i.tracked.empty()) check_tracked(i, mask);
      if (recorder != nullptr) recorder->begin(*this, i, pc, mask);
      step = i.execute(*this, i, mask);
      if (recorder != nullptr) recorder->end(step == Step::block);
    }
    if (step == Step::block) {
      if (i.traits.wait == Wait::nothing && !i.aligned)
        throw std::logic_error(program_.opcodes[i.opcode] + " blocks, and has no trait for it");
      if (const std::uint32_t others = groups_[current_].mask & ~mask) {  // their guard is false
        Group& rest = part(others);
        rest.arrived = rest.released = rest.alone = rest.give_up = false;
        ++rest.pc;
      }
      Group& blocked = groups_[current_];
      blocked.blocked = true;
      blocked.blocked_at = cluster_.progress;
      if (groups_.size() > 1 && runnable()) {
        current_ = pick_group();
        ++executed;  // counts too, so that the quantum ends
        continue;
      }
      break;
    }
    ++executed;
    ++cluster_.counts[pc];
    if (live_ == 0) break;
    if (step == Step::next) {
      Group& same = groups_[current_];
      same.blocked = false;
      same.arrived = false;
      same.released = false;
      same.alone = false;
      same.give_up = false;
      ++same.pc;
    } else {
      if (!runnable()) break;
      if (current_ >= groups_.size() || groups_[current_].parked || groups_[current_].blocked ||
          groups_.size() > 1)
        current_ = pick_group();
    }
  }
  if (cluster_.progress != progress_before) polls_ = 0;
  if (groups_.size() > 1) look_after_parked(executed);
  return executed;
}

void Warp::note_poll(int lane, std::uint64_t address, std::uint32_t bytes) {
  polls_of_[static_cast<std::size_t>(lane)] = {address, cluster_.progress, bytes, pc()};
}

void Warp::polled() {
  ++cluster_.spins;
  ++polls_;
}

// The other lanes may poll for lanes that wait to reconverge. For example, a lane may have left the
// loop in which its warp waits for a lock. Such lanes go on alone once the others have only polled
// for a while, or have run without them for long.
void Warp::look_after_parked(std::uint32_t executed) {
  constexpr std::uint32_t kPolls = 16, kInstructions = 1 << 16;
  parked_for_ += executed;
  if (polls_ < kPolls && parked_for_ < kInstructions) return;
  polls_ = 0;
  unpark();
}

bool Warp::time_out() {
  bool any = false;
  for (Group& g : groups_) {
    if (!g.parked && g.blocked && program_.code[g.pc].traits.times_out) g.give_up = any = true;
  }
  return any;
}

// While memory does not change, a group of lanes that returns to an earlier state will do so for
// ever. A group that counts its polls or reads a clock does not return to one.
bool Warp::repeats() {
  std::uint64_t registers = 0xcbf29ce484222325ull;
  const auto mix = [&](std::uint64_t word) {
    registers = (registers ^ word) * 0x9e3779b97f4a7c15ull;
    registers ^= registers >> 29;
  };
  for (const std::uint64_t word : register_file_) mix(word);
  for (const std::uint8_t byte : local) mix(byte);
  bool all = true;
  for (Group& g : groups_) {
    if (g.ran) {
      const std::uint64_t at = std::uint64_t{g.pc} << 32 | g.mask;
      g.cycles |= !states_.insert(registers ^ at * 0xbf58476d1ce4e5b9ull).second;
      g.ran = false;
    }
    const bool waits = g.parked || (g.blocked && !program_.code[g.pc].traits.times_out);
    all &= g.cycles || waits;
  }
  return all;
}

void Warp::forget_states() {
  states_.clear();
  for (Group& g : groups_) g.ran = g.cycles = false;
}

void Warp::finding(FindingKind kind, const std::string& message, std::uint32_t lanes,
                   std::uint64_t address, const std::string& other, std::uint32_t other_line) {
  OtherAccess access;
  access.what = other;
  access.ptx_line = other_line;
  access.gpu = grid_.gpu;
  access.device = grid_.device;
  finding_at(pc(), kind, message, lanes, address, access);
}

void Warp::finding_at(std::uint32_t at_pc, FindingKind kind, const std::string& message,
                      std::uint32_t lanes, std::uint64_t address, const OtherAccess& other,
                      const std::string& remedy) {
  Finding f = grid_.finding_of(at_pc);
  f.kind = kind;
  f.message = message;
  f.cta[0] = cta_.index.x;
  f.cta[1] = cta_.index.y;
  f.cta[2] = cta_.index.z;
  f.warp = index_;
  f.lanes = lanes;
  f.address = address;
  f.other = other;
  f.remedy = remedy;
  grid_.sink.add(std::move(f));
}

// Registers that some wgmma uses as accumulator or A fragment. They must not be accessed while such
// a wgmma is in flight, and after an access the next one needs a wgmma.fence.
void Warp::check_tracked(const Instruction& i, std::uint32_t mask) {
  for (std::uint32_t reg : i.tracked) {
    if (in_flight[reg] != 0) {
      finding(FindingKind::wgmma_register_in_flight,
              "register " + program_.register_names[reg] +
                  " belongs to a wgmma that has not been waited for",
              mask);
    }
    register_fence[reg] = fence_count;
  }
}

}  // namespace torchext::sim
