// Shadow memory with one epoch per granule, after FastTrack (Flanagan and Freund, PLDI 2009). A set
// of readers holds the lanes of one warp as one entry.
#include "shadow.h"

#include <algorithm>
#include <cstring>

namespace torchext::sim {

namespace {
enum Flag : std::uint16_t {
  kWriteScope = 7,  // a Scope
  kWriteAsync = 8,
  kReadScope = 0x70,
  kReadProxy = 0x180,  // a Proxy
  kReaderSet = 0x200,  // r_agent is an index into reader_sets_
  kSplit = 0x400,      // r_agent is an index into splits_
  kStored = 0x800,     // the last write took effect before the next access was checked
  kAgreeing = 0x1000,  // unordered writes stored the same value; agreeing_ lists them
};
constexpr int kReadScopeShift = 4, kReadProxyShift = 7;
constexpr std::uint32_t kLanes = 32;
constexpr std::uint8_t kAllBytes = 15;  // Cell::valid of what is written, whole or in part
// Enough for all warps of a GPU. Beyond that (an endless loop), equal stores go unrecorded.
constexpr std::size_t kMostAgreeing = 16384;
}  // namespace

Shadow::Shadow(std::uint64_t bytes, bool valid, SharedOwner owner)
    : bytes_(bytes), valid_(valid), owner_(owner), pages_((bytes + kPageBytes - 1) / kPageBytes) {}

Shadow::Page& Shadow::page(std::uint64_t index) {
  auto& p = pages_[index];
  if (p == nullptr) {
    p = std::make_unique<Page>();
    Cell fresh{};
    fresh.valid = valid_ ? kAllBytes : 0;
    p->fill(fresh);
  }
  return *p;
}

LastWrite Shadow::last_write(const Cell& c) {
  return {c.w_cluster, c.w_agent, c.w_clock, c.w_pc, static_cast<Scope>(c.flags & kWriteScope)};
}

Shadow::Cell& Shadow::cell(std::uint64_t granule) {
  return page(granule / (kPageBytes / 4))[granule % (kPageBytes / 4)];
}

bool Shadow::ordered(const Actor& a, std::uint32_t cluster, std::uint32_t agent,
                     std::uint32_t clock) {
  if (cluster == a.cluster) {
    if (agent == a.issuer) return clock <= a.issuer_clock;
    if (agent == a.agent && clock == a.clock) return true;
  }
  return a.known->knows(a.cluster, cluster, agent, clock);
}

// True if both are strong and the scope of each includes the other's thread: never a race.
bool Shadow::morally_strong(const Actor& a, std::uint32_t cluster, std::uint32_t agent,
                            Scope scope) {
  const Scope least = std::min(a.scope, scope);
  if (least == Scope::none || least == Scope::sys) return least != Scope::none;
  if (gpu_of(cluster) != gpu_of(a.cluster)) return false;
  if (least == Scope::gpu) return true;
  if (cluster != a.cluster) return false;
  return least == Scope::cluster || agent / a.cta_threads == a.issuer / a.cta_threads;
}

AsyncSpace Shadow::async_space(std::uint32_t writer) const {
  if (owner_.threads == 0) return kGlobal;
  // An agent that is no thread, such as cp.async's, writes the memory of its own CTA.
  const bool other_cta =
      writer < owner_.cluster_threads && writer - owner_.first_thread >= owner_.threads;
  return other_cta ? kClusterShared : kOwnShared;
}

bool Shadow::visible_to_async(const Actor& a, const Cell& c) const {
  const AsyncSpace space = async_space(c.w_agent);
  return a.views->async[space]->knows(a.cluster, c.w_cluster, c.w_agent, c.w_clock);
}

Shadow::Reader Shadow::reader_of(const Cell& c) {
  return {c.r_cluster,
          c.r_agent,
          c.r_clock,
          c.r_mask,
          c.r_pc,
          static_cast<Scope>((c.flags & kReadScope) >> kReadScopeShift),
          static_cast<Proxy>((c.flags & kReadProxy) >> kReadProxyShift)};
}

template <class Accesses>
bool Shadow::ordered_lanes(const Actor& a, const Accesses& r) {
  for (std::uint32_t m = r.mask; m != 0; m &= m - 1) {
    const auto lane = static_cast<std::uint32_t>(__builtin_ctz(m));
    if (!ordered(a, r.cluster, r.warp_agent + lane, r.clock)) return false;
  }
  return true;
}

// True if at least one of the writes of the present value comes before.
bool Shadow::ordered_after_any(const Actor& a, const Cell& c, std::uint64_t offset) const {
  if (ordered(a, c.w_cluster, c.w_agent, c.w_clock)) return true;
  if (!(c.flags & kAgreeing)) return false;
  const auto& others = agreeing_.at(offset);  // latest first: a thread often reads its own store
  return std::any_of(others.rbegin(), others.rend(), [&](Writers w) {
    for (std::uint32_t lanes = w.mask; lanes != 0; lanes &= lanes - 1) {
      w.mask = lanes & -lanes;
      if (ordered_lanes(a, w)) return true;
    }
    return false;
  });
}

bool Shadow::ordered_after_all(const Actor& a, const Cell& c, std::uint64_t offset) const {
  if (!ordered(a, c.w_cluster, c.w_agent, c.w_clock)) return false;
  if (!(c.flags & kAgreeing)) return true;
  const auto& others = agreeing_.at(offset);
  return std::all_of(others.begin(), others.end(),
                     [&](const Writers& w) { return ordered_lanes(a, w); });
}

void Shadow::record_agreeing(Cell& c, const Actor& actor, std::uint64_t offset) {
  auto& others = agreeing_[offset];
  if (!(c.flags & kAgreeing)) others.clear();
  c.flags |= kAgreeing;
  const std::uint32_t base = actor.agent / kLanes * kLanes, bit = 1u << (actor.agent % kLanes);
  if (!others.empty() && others.back().cluster == actor.cluster &&
      others.back().warp_agent == base && others.back().clock == actor.clock) {
    others.back().mask |= bit;
  } else if (others.size() < kMostAgreeing) {
    others.push_back({actor.cluster, base, actor.clock, bit});
  }
}

std::uint32_t Shadow::split(Cell& c, std::uint64_t granule) {
  if (c.flags & kSplit) return c.r_agent;
  std::uint32_t index;
  if (free_splits_.empty()) {
    index = static_cast<std::uint32_t>(splits_.size());
    splits_.emplace_back();
  } else {
    index = free_splits_.back();
    free_splits_.pop_back();
  }
  for (int i = 0; i < 4; ++i) {
    Cell& part = splits_[index][static_cast<std::size_t>(i)];
    part = c;
    part.valid = (c.valid >> i) & 1 ? kAllBytes : 0;
    if (c.flags & kReaderSet) {
      const auto copy = static_cast<std::uint32_t>(reader_sets_.size());
      reader_sets_.push_back(reader_sets_[c.r_agent]);
      part.r_agent = copy;
    }
  }
  if (c.flags & kAgreeing) {
    const std::vector<Writers> writes = agreeing_.at(4 * granule);
    for (std::uint64_t i = 1; i < 4; ++i) agreeing_[4 * granule + i] = writes;
  }
  if (c.flags & kReaderSet) free_sets_.push_back(c.r_agent);
  c.flags = kSplit;
  c.r_agent = index;
  return index;
}

template <class Visit>
void Shadow::for_each_cell(std::uint64_t offset, std::uint64_t bytes, bool merge, Visit&& visit) {
  const std::uint64_t end = offset + bytes;
  for (std::uint64_t at = offset; at < end;) {
    const std::uint64_t granule = at / 4;
    const std::uint64_t granule_end = std::min(end, granule * 4 + 4);
    Cell& c = cell(granule);
    const bool whole = granule_end - at == 4;
    if (whole && !(c.flags & kSplit)) {
      visit(c, at, 4);
    } else {
      const std::uint32_t index = split(c, granule);
      for (std::uint64_t b = at; b < granule_end; ++b) visit(splits_[index][b % 4], b, 1);
      c.valid = 0;
      bool agreeing = false;
      for (std::size_t i = 0; i < 4; ++i) {
        if (splits_[index][i].valid) c.valid = static_cast<std::uint8_t>(c.valid | 1 << i);
        agreeing |= (splits_[index][i].flags & kAgreeing) != 0;
      }
      if (whole && merge && !agreeing) {  // all four bytes were just written alike: merge them
        free_splits_.push_back(index);
        c = splits_[index][0];
      }
    }
    at = granule_end;
  }
}

void Shadow::record_reader(Cell& c, const Actor& actor) {
  // The threads of a warp are 32 consecutive agents, aligned to 32. Other agents are single.
  const bool is_thread = actor.agent == actor.issuer;
  const std::uint32_t base = is_thread ? actor.agent / kLanes * kLanes : actor.agent;
  const std::uint32_t bit = is_thread ? 1u << (actor.agent % kLanes) : 1u;
  const auto kind = static_cast<std::uint16_t>(static_cast<int>(actor.scope) << kReadScopeShift |
                                               static_cast<int>(actor.proxy) << kReadProxyShift);
  const Reader self{actor.cluster, base, actor.clock, bit, actor.pc, actor.scope, actor.proxy};
  if (!(c.flags & kReaderSet)) {
    const bool alike = (c.flags & (kReadScope | kReadProxy)) == kind;
    if (alike && c.r_mask != 0 && c.r_agent == base && c.r_clock == actor.clock &&
        c.r_cluster == actor.cluster) {
      c.r_mask |= bit;
      return;
    }
    if (c.r_mask == 0 || (alike && ordered_lanes(actor, reader_of(c)))) {
      c.r_cluster = self.cluster;
      c.r_agent = base;
      c.r_clock = self.clock;
      c.r_mask = bit;
      c.r_pc = self.pc;
      c.flags = static_cast<std::uint16_t>((c.flags & ~(kReadScope | kReadProxy)) | kind);
      return;
    }
    std::uint32_t index;
    if (free_sets_.empty()) {
      index = static_cast<std::uint32_t>(reader_sets_.size());
      reader_sets_.emplace_back();
    } else {
      index = free_sets_.back();
      free_sets_.pop_back();
      reader_sets_[index].clear();
    }
    reader_sets_[index].push_back(reader_of(c));
    c.flags |= kReaderSet;
    c.r_agent = index;
  }
  auto& set = reader_sets_[c.r_agent];
  for (Reader& r : set) {
    if (r.cluster == self.cluster && r.warp_agent == base && r.scope == self.scope &&
        r.proxy == self.proxy) {
      if (r.clock == self.clock) {
        r.mask |= bit;
        return;
      }
      if (!is_thread || (r.mask == bit && r.clock < self.clock)) {  // implies the earlier read
        r.clock = std::max(r.clock, self.clock);
        r.pc = self.pc;
        return;
      }
    }
  }
  set.push_back(self);
}

void Shadow::read_cell(Cell& c, const Actor& actor, std::uint64_t offset, Conflict& conflict) {
  if (conflict.kind == Conflict::none) {
    if (c.w_clock != 0) {
      const auto scope = static_cast<Scope>(c.flags & kWriteScope);
      const bool write_async = (c.flags & kWriteAsync) != 0;
      const auto found = [&](Conflict::Kind kind) {
        conflict = {kind,  offset,      true,      write_async ? Proxy::async : Proxy::generic,
                    scope, c.w_cluster, c.w_agent, c.w_clock,
                    c.w_pc};
      };
      // If equal writes are unordered, a read after any one of them sees the common value.
      if (actor.proxy == Proxy::noncoherent) {
        found(Conflict::noncoherent);
      } else if (!ordered_after_any(actor, c, offset) &&
                 !morally_strong(actor, c.w_cluster, c.w_agent, scope)) {
        found(Conflict::race);
      } else if (actor.proxy == Proxy::async && !write_async && !visible_to_async(actor, c)) {
        found(Conflict::proxy);
      }
    }
    if (conflict.kind == Conflict::none && c.valid != kAllBytes) {
      conflict.kind = Conflict::uninitialized;
      conflict.offset = offset;
    }
  }
  record_reader(c, actor);
}

void Shadow::write_cell(Cell& c, const Actor& actor, std::uint64_t offset, const Stored* stored,
                        std::size_t bytes, Conflict& conflict) {
  bool agrees = false;
  if (conflict.kind <= Conflict::overwritten) {
    const auto scope = static_cast<Scope>(c.flags & kWriteScope);
    if (c.w_clock != 0 && !ordered_after_all(actor, c, offset) &&
        !morally_strong(actor, c.w_cluster, c.w_agent, scope)) {
      agrees = stored != nullptr && (c.flags & kStored) &&
               std::memcmp(stored->before, stored->after, bytes) == 0;
      conflict = {agrees ? Conflict::same_value : Conflict::race,
                  offset,
                  true,
                  c.flags & kWriteAsync ? Proxy::async : Proxy::generic,
                  scope,
                  c.w_cluster,
                  c.w_agent,
                  c.w_clock,
                  c.w_pc};
    } else if (c.r_mask != 0) {
      const auto check = [&](const Reader& r) {
        if (conflict.kind > Conflict::overwritten) return;
        const bool nc = r.proxy == Proxy::noncoherent;
        const bool done = ordered_lanes(actor, r);
        if (done ? !nc : morally_strong(actor, r.cluster, r.warp_agent, r.scope)) return;
        conflict = {done ? Conflict::overwritten
                    : nc ? Conflict::noncoherent
                         : Conflict::race,
                    offset,
                    false,
                    r.proxy,
                    r.scope,
                    r.cluster,
                    r.warp_agent + static_cast<std::uint32_t>(__builtin_ctz(r.mask)),
                    r.clock,
                    r.pc};
      };
      if (c.flags & kReaderSet) {
        for (const Reader& r : reader_sets_[c.r_agent]) check(r);
      } else {
        check(reader_of(c));
      }
    }
  }
  if (agrees) {  // keep the reads and the first writer
    record_agreeing(c, actor, offset);
    return;
  }
  if (c.flags & kReaderSet) free_sets_.push_back(c.r_agent);
  c.w_cluster = actor.cluster;
  c.w_agent = actor.agent;
  c.w_clock = actor.clock;
  c.w_pc = actor.pc;
  c.r_mask = 0;
  c.flags = static_cast<std::uint16_t>(static_cast<int>(actor.scope) |
                                       (actor.proxy == Proxy::async ? kWriteAsync : 0) |
                                       (stored != nullptr ? kStored : 0));
  c.valid = kAllBytes;
}

Conflict Shadow::read(const Actor& actor, std::uint64_t offset, std::uint64_t bytes) {
  Conflict conflict;
  for_each_cell(offset, bytes, false,
                [&](Cell& c, std::uint64_t at, std::size_t) { read_cell(c, actor, at, conflict); });
  return conflict;
}

Conflict Shadow::write(const Actor& actor, std::uint64_t offset, std::uint64_t bytes,
                       const Stored* stored) {
  Conflict conflict;
  for_each_cell(offset, bytes, true, [&](Cell& c, std::uint64_t at, std::size_t width) {
    if (stored == nullptr) return write_cell(c, actor, at, nullptr, width, conflict);
    const Stored here{stored->before + (at - offset), stored->after + (at - offset)};
    write_cell(c, actor, at, &here, width, conflict);
  });
  return conflict;
}

void Shadow::set_valid(std::uint64_t offset, std::uint64_t bytes) {
  for_each_cell(offset, bytes, false,
                [](Cell& c, std::uint64_t, std::size_t) { c.valid = kAllBytes; });
}

void Shadow::restart(std::uint64_t offset, std::uint64_t bytes) {
  for_each_cell(offset, bytes, true, [&](Cell& c, std::uint64_t at, std::size_t) {
    if (c.flags & kReaderSet) free_sets_.push_back(c.r_agent);
    agreeing_.erase(at);
    c = Cell{};
  });
}

bool Shadow::is_valid(std::uint64_t offset, std::uint64_t bytes) const {
  for (std::uint64_t b = offset; b < offset + bytes; ++b) {
    const auto& p = pages_[b / kPageBytes];
    if (p == nullptr ? !valid_ : !((*p)[b % kPageBytes / 4].valid >> (b % 4) & 1)) return false;
  }
  return true;
}

bool Shadow::last_write_is(std::uint64_t offset, std::uint32_t agent, std::uint32_t clock,
                           std::uint32_t pc) const {
  const auto& p = pages_[offset / kPageBytes];
  if (p == nullptr) return false;
  const Cell& c = (*p)[offset % kPageBytes / 4];
  return !(c.flags & kSplit) && c.w_agent == agent && c.w_clock == clock && c.w_pc == pc;
}

std::vector<LastWrite> Shadow::last_writes(std::uint64_t offset, std::uint64_t bytes) const {
  std::vector<LastWrite> writes;
  const auto add = [&](const Cell& c) {
    if (c.w_clock == 0) return;
    for (const LastWrite& w : writes) {
      if (w.cluster == c.w_cluster && w.agent == c.w_agent && w.clock == c.w_clock) return;
    }
    writes.push_back(last_write(c));
  };
  for (std::uint64_t at = offset / 4 * 4; at < offset + bytes; at += 4) {
    const auto& p = pages_[at / kPageBytes];
    if (p == nullptr) continue;
    const Cell& c = (*p)[at % kPageBytes / 4];
    if (c.flags & kSplit) {
      for (const Cell& part : splits_[c.r_agent]) add(part);
    } else {
      add(c);
    }
  }
  return writes;
}

void Shadow::for_each_last_write(
    const std::function<void(std::uint64_t offset, const LastWrite& write)>& visit) const {
  for (std::size_t p = 0; p < pages_.size(); ++p) {
    if (pages_[p] == nullptr) continue;
    for (std::size_t i = 0; i < pages_[p]->size(); ++i) {
      const Cell& c = (*pages_[p])[i];
      const std::uint64_t offset = p * kPageBytes + 4 * i;
      const auto visit_cell = [&](const Cell& cell, std::uint64_t at) {
        if (cell.w_clock != 0) visit(at, last_write(cell));
      };
      if (c.flags & kSplit) {
        for (std::size_t b = 0; b < 4; ++b) visit_cell(splits_[c.r_agent][b], offset + b);
      } else {
        visit_cell(c, offset);
      }
    }
  }
}

std::uint64_t Shadow::count_invalid(std::uint64_t* first) const {
  std::uint64_t count = 0;
  *first = bytes_;
  if (valid_) return 0;
  for (std::uint64_t b = 0; b < bytes_; ++b) {
    const auto& p = pages_[b / kPageBytes];
    if (p != nullptr && ((*p)[b % kPageBytes / 4].valid >> (b % 4) & 1)) continue;
    if (count++ == 0) *first = b;
  }
  return count;
}

}  // namespace torchext::sim
