// Resolves addresses (bounds, alignment, permissions), and checks an access for races and
// validity.
#include "memory.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../check/other_access.h"
#include "machine.h"

namespace torchext::sim {

void Memory::add(const Buffer& b, bool checks, bool always_valid) {
  if (b.bytes == 0) return;
  buffers_.push_back(make(b, checks, always_valid));
}

std::shared_ptr<GlobalBuffer> Memory::make(const Buffer& b, bool checks, bool always_valid) {
  auto g = std::make_shared<GlobalBuffer>();
  g->begin = reinterpret_cast<std::uint64_t>(b.data);
  g->end = g->begin + b.bytes;
  g->writable = b.access != Buffer::Read;
  g->name = b.name;
  g->device = b.device;
  if (g->writable && checks)
    g->shadow = std::make_unique<Shadow>(b.bytes, always_valid || b.access == Buffer::ReadWrite);
  return g;
}

void Memory::sort() {
  std::sort(buffers_.begin(), buffers_.end(),
            [](const auto& a, const auto& b) { return a->begin < b->begin; });
  for (std::size_t i = 1; i < buffers_.size(); ++i) {
    if (buffers_[i]->begin < buffers_[i - 1]->end) {
      throw std::invalid_argument("buffers must not overlap (got '" + buffers_[i - 1]->name +
                                  "' and '" + buffers_[i]->name + "')");
    }
  }
}

std::string GlobalBuffer::described() const {
  return "'" + name + "' (" + std::to_string(end - begin) + " bytes" +
         (device < 0 ? "" : " on device " + std::to_string(device)) + ")";
}

std::string Memory::describe(std::uint64_t address) const {
  const GlobalBuffer* best = nullptr;
  std::uint64_t distance = ~0ull;
  bool after = false;
  for (const auto& b : buffers_) {
    if (address >= b->begin && address < b->end) {
      return "byte " + std::to_string(address - b->begin) + " of " + b->described();
    }
    const std::uint64_t d = address < b->begin ? b->begin - address : address - b->end;
    if (d < distance) {
      distance = d;
      best = b.get();
      after = address >= b->end;
    }
  }
  if (best == nullptr || distance > (1u << 30)) return "not near any buffer";
  return std::to_string(distance) + " bytes " + (after ? "after the end of " : "before ") +
         best->described();
}

bool Warp::resolve(int lane, Space space, std::uint64_t address, std::uint32_t bytes, bool write,
                   Place* place) {
  const std::uint32_t lanes = 1u << lane;
  const char* verb = write ? "write" : "read";
  if (space == Space::generic) {
    switch (address & kWindowMask) {
      case kSharedWindow:
        space = Space::shared_cluster;
        break;
      case kLocalWindow:
        space = Space::local;
        address -= kLocalWindow;
        break;
      default:
        space = Space::global;
    }
  }
  if (space == Space::param) address &= ~kWindowMask;
  if ((address & kWindowMask) == kParamWindow) {
    finding(FindingKind::out_of_bounds,
            std::string("generic ") + verb +
                " of a kernel parameter by its address in the .param "
                "space; cvta.param makes that generic",
            lanes, address);
    return false;
  }
  if (address & (bytes - 1)) {
    finding(FindingKind::misaligned_access,
            std::string(verb) + " of " + std::to_string(bytes) + " bytes at " + hex(address) +
                ", which is not a multiple of " + std::to_string(bytes),
            lanes, address);
    return false;
  }
  switch (space) {
    case Space::shared:
    case Space::shared_cluster: {
      const auto at = static_cast<std::uint32_t>(address);
      const std::uint32_t rank = at >> kSharedRankShift, offset = at & kSharedOffsetMask;
      Cta* owner = &cta_;
      if (rank != 0) {
        if (space == Space::shared || rank > grid_.cluster_size) {
          finding(FindingKind::out_of_bounds,
                  std::string("shared::cta ") + verb + " at " + hex(at) +
                      ", which is not in this CTA's shared memory",
                  lanes, at);
          return false;
        }
        owner = cluster_.ctas[rank - 1].get();
        if (owner->exited()) {
          finding(FindingKind::exited_cta,
                  std::string(verb) + " of shared memory of CTA rank " + std::to_string(rank - 1) +
                      ", which has exited",
                  lanes, at);
          return false;
        }
      }
      if (offset < grid_.shared_begin || offset + bytes > owner->shared.size()) {
        finding(FindingKind::out_of_bounds,
                std::string("shared-memory ") + verb + " of " + std::to_string(bytes) +
                    " bytes at " + hex(offset) + "; the CTA has [" + hex(grid_.shared_begin) +
                    ", " + hex(owner->shared.size()) + ")",
                lanes, offset);
        return false;
      }
      place->host = owner->shared.data() + offset;
      place->shadow = grid_.checks ? &owner->shadow : nullptr;
      place->offset = offset;
      place->cta = owner;
      return true;
    }
    case Space::local: {
      if (address >= kStackBase && program_.uses_stack) {
        const auto l = static_cast<std::size_t>(lane);
        if (address >= stack_top_[l] || bytes > stack_top_[l] - address) {
          finding(FindingKind::out_of_bounds,
                  std::string("local-memory ") + verb + " at " + hex(address) +
                      ", beyond the thread's stack of " +
                      std::to_string(stack_top_[l] - kStackBase) +
                      " bytes: past alloca's memory, or in that of a function that has returned",
                  lanes, address);
          return false;
        }
        place->host = stack_[l].data() + (address - kStackBase);
        place->valid = stack_valid_[l].data() + (address - kStackBase);
        return true;
      }
      if (address >= program_.local_bytes || bytes > program_.local_bytes - address) {
        finding(FindingKind::out_of_bounds,
                std::string("local-memory ") + verb + " at " + hex(address) + "; a thread has " +
                    std::to_string(program_.local_bytes) + " bytes",
                lanes, address);
        return false;
      }
      const std::size_t at = static_cast<std::size_t>(lane) * program_.local_bytes + address;
      place->host = local.data() + at;
      place->valid = local_valid.data() + at;
      return true;
    }
    default: {
      GlobalBuffer* b = grid_.memory.find(address);
      if (b == nullptr || address + bytes > b->end) {
        finding(FindingKind::out_of_bounds,
                std::string("global ") + verb + " of " + std::to_string(bytes) + " bytes, " +
                    grid_.memory.describe(address),
                lanes, address);
        return false;
      }
      if (write && !b->writable) {
        finding(FindingKind::read_only_memory,
                "write to read-only '" + b->name + "', " + grid_.memory.describe(address), lanes,
                address);
        return false;
      }
      if (b->heap != nullptr && !b->heap->may_access(address, bytes)) {
        DeviceHeap::Block block;
        const bool freed = b->heap->find(address, &block) && !block.live;
        finding(freed ? FindingKind::freed_memory : FindingKind::out_of_bounds,
                std::string("global ") + verb + " of " + std::to_string(bytes) + " bytes, " +
                    b->heap->describe(address, program_, grid_.heap_launch()),
                lanes, address);
        return false;
      }
      place->host = reinterpret_cast<std::uint8_t*>(address);
      place->shadow = b->shadow.get();
      place->offset = address - b->begin;
      place->buffer = b;
      return true;
    }
  }
}

void Warp::start_block(std::uint64_t address, std::uint64_t bytes) {
  GlobalBuffer* b = grid_.memory.find(address);
  if (b->shadow == nullptr || bytes == 0) return;
  const std::lock_guard<SpinLock> lock(b->lock);
  b->shadow->restart(address - b->begin, bytes);
}

namespace {
const char* prefix_of(Proxy proxy) {
  switch (proxy) {
    case Proxy::async:
      return "async-proxy ";
    case Proxy::tensormap:
      return "tensormap-proxy ";
    case Proxy::noncoherent:
      return "non-coherent ";
    default:
      return "";
  }
}

// Says which fences made the write visible elsewhere, and which one its space needs; else "".
std::string other_fences(const Views& views, std::uint32_t own, const Conflict& c,
                         AsyncSpace space) {
  static const char* const kNames[kAsyncSpaces] = {"fence.proxy.async.shared::cta",
                                                   "fence.proxy.async.shared::cluster",
                                                   "fence.proxy.async.global"};
  std::string there;
  const auto look = [&](const ClockRef& clock, const char* name) {
    if (!clock->knows(own, c.other_cluster, c.other_agent, c.other_clock)) return;
    there += (there.empty() ? "" : ", ") + std::string(name);
  };
  for (std::size_t k = 0; k < kAsyncSpaces; ++k) look(views.async[k], kNames[k]);
  look(views.alias, "fence.proxy.alias");
  look(views.map_released[0], "fence.proxy.tensormap");
  if (there.empty()) return "";
  const char* const what = space == kGlobal          ? "global memory"
                           : space == kClusterShared ? "shared memory of another CTA"
                                                     : "shared memory";
  return ": there is " + there + ", but " + what + " needs fence.proxy.async or " + kNames[space];
}

// Says which scope was too narrow to order the operations of two CTAs; else "".
std::string narrow_scopes(const Conflict& c, const Actor& actor) {
  if (actor.scope != Scope::none && c.other_scope != Scope::none) {
    return std::string(": scope too narrow, ") + name_of(actor.scope) + " here and " +
           name_of(c.other_scope) + " there, for threads of different " +
           (gpu_of(c.other_cluster) != gpu_of(actor.cluster) ? "devices"
            : c.other_cluster == actor.cluster               ? "CTAs"
                                                             : "clusters");
  }
  const Views& v = *actor.views;
  if (!v.refused->knows(actor.cluster, c.other_cluster, c.other_agent, c.other_clock)) return "";
  return std::string(": scope too narrow, what synchronizes them releases at ") +
         name_of(v.released_at) + " and acquires at " + name_of(v.acquired_at);
}
}  // namespace

void Warp::conflict(const Conflict& c, const Actor& actor, const Place& place, bool write,
                    std::uint32_t lanes, std::uint64_t address) {
  const std::string what = write ? "write" : "read";
  if (c.kind == Conflict::uninitialized) {
    finding_at(actor.pc, FindingKind::uninitialized_memory,
               "read of bytes that nothing has written", lanes, address);
    return;
  }
  const OtherAccess other = other_access(*this, c, prefix_of(c.other_proxy));
  const OpClass other_class =
      grid_.of_cluster(c.other_cluster).program->code[c.other_pc].traits.op_class;
  FindingKind kind = FindingKind::data_race;
  std::string message, remedy;
  if (c.kind == Conflict::same_value) {
    // Lanes that store in one instruction: PTX lets any of them win.
    if (c.other_pc == actor.pc && c.other_cluster == actor.cluster &&
        c.other_agent / 32 == actor.agent / 32)
      return;
    kind = FindingKind::same_value_store;
    message = "write that nothing orders after an earlier write of the same value";
  } else if (c.kind == Conflict::proxy) {
    kind = FindingKind::missing_proxy_fence;
    message = "async-proxy " + what +
              " of bytes that a generic-proxy write made, with no fence.proxy.async in between" +
              other_fences(*actor.views, cluster_.key, c, place.shadow->async_space(c.other_agent));
  } else if (c.kind == Conflict::noncoherent) {
    kind = FindingKind::noncoherent_load;
    message = write ? "write to bytes that a non-coherent load may still read"
                    : "non-coherent load of bytes that this launch has written";
  } else if (c.kind == Conflict::overwritten) {
    kind = FindingKind::noncoherent_overwritten;
    message = "write to bytes that a non-coherent load has read";
  } else if (write && !c.other_is_write && other_class == OpClass::wgmma) {
    kind = FindingKind::wgmma_operand_in_flight;
    message = "write to shared memory that a wgmma may still read";
  } else if (write && !c.other_is_write && c.other_proxy == Proxy::tensormap) {
    kind = FindingKind::tensor_map_in_flight;
    message = "write to a tensor map that a tensor copy may still read";
  } else if (write && !c.other_is_write && c.other_proxy == Proxy::async &&
             other_class == OpClass::bulk_copy) {
    kind = FindingKind::bulk_store_in_flight;
    message = "write to memory that a bulk copy may still read";
  } else {
    const std::string narrow = narrow_scopes(c, actor);
    message =
        prefix_of(actor.proxy) + what + " that nothing orders after an earlier access" + narrow;
    remedy = narrow.empty() ? race_remedy(*this, c, actor)
                            : "Use a scope that includes both threads: .cluster within a cluster, "
                              ".gpu (__threadfence(), cuda::thread_scope_device) in a grid, .sys "
                              "(__threadfence_system(), cuda::thread_scope_system) between GPUs.";
  }
  finding_at(actor.pc, kind, message, lanes, address, other, remedy);
}

// Calls `access`, which uses the place's shadow. Host threads share the shadow of a buffer in
// global memory, so that one is locked.
template <class Access>
static Conflict locked(const Place& place, Access&& access) {
  if (place.buffer == nullptr) return access();
  const std::lock_guard<SpinLock> lock(place.buffer->lock);
  return access();
}

void Warp::check_read(const Place& place, const Actor& actor, std::uint32_t bytes,
                      std::uint32_t lanes, std::uint64_t address) {
  if (place.shadow == nullptr) return;
  const Conflict c = locked(place, [&] { return place.shadow->read(actor, place.offset, bytes); });
  dirty_ |= lanes;
  if (c.kind != Conflict::none) conflict(c, actor, place, false, lanes, address);
}

void Warp::check_write(const Place& place, const Actor& actor, std::uint32_t bytes,
                       std::uint32_t lanes, std::uint64_t address) {
  if (place.shadow == nullptr) return;
  const Conflict c = locked(place, [&] { return place.shadow->write(actor, place.offset, bytes); });
  dirty_ |= lanes;
  if (c.kind != Conflict::none) conflict(c, actor, place, true, lanes, address);
}

void Warp::read(const Place& place, const Actor& actor, void* data, std::uint32_t bytes,
                std::uint32_t lanes, std::uint64_t address) {
  if (place.shadow == nullptr) {
    std::memcpy(data, place.host, bytes);
    return;
  }
  const Conflict c = locked(place, [&] {
    std::memcpy(data, place.host, bytes);
    return place.shadow->read(actor, place.offset, bytes);
  });
  dirty_ |= lanes;
  if (c.kind != Conflict::none) conflict(c, actor, place, false, lanes, address);
}

bool Warp::write(const Place& place, const Actor& actor, const std::uint8_t* data,
                 std::uint32_t bytes, std::uint32_t lanes, std::uint64_t address) {
  bool changed = false;
  const auto store = [&] {
    changed = std::memcmp(place.host, data, bytes) != 0;
    std::memcpy(place.host, data, bytes);
  };
  if (place.shadow == nullptr) {
    store();
    return changed;
  }
  const Stored stored{place.host, data};
  const Conflict c = locked(place, [&] {
    const Conflict found = place.shadow->write(actor, place.offset, bytes, &stored);
    store();
    return found;
  });
  dirty_ |= lanes;
  if (c.kind != Conflict::none) conflict(c, actor, place, true, lanes, address);
  return changed;
}

}  // namespace torchext::sim
