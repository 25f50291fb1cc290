// Fences and races of tensor maps in memory.
#include "map_fences.h"

#include <algorithm>
#include <mutex>
#include <string>

#include "../numerics/tensor_map.h"

namespace torchext::sim {

namespace {

std::vector<LastWrite> writes_of(const Place& place) {
  const std::lock_guard<SpinLock> lock(place.buffer->lock);
  return place.shadow->last_writes(place.offset, kTensorMapBytes);
}

// The narrowest scope that includes both a thread of this CTA and the writer.
Scope scope_to(const Warp& w, const LastWrite& write) {
  if (gpu_of(write.cluster) != gpu_of(w.cluster().key)) return Scope::sys;
  if (write.cluster != w.cluster().key) return Scope::gpu;
  const std::uint32_t per_cta = w.grid().warps_per_cta * 32;
  const bool thread = write.agent < per_cta * w.grid().cluster_size;
  return thread && write.agent / per_cta != w.cta().rank ? Scope::cluster : Scope::cta;
}

// The widest scope of a release of the write that the thread running the fence knew of.
Scope released_at(const Warp& w, const MapFence& fence, const LastWrite& write) {
  for (std::size_t level = kScopeLevels; level-- > 0;) {
    if (fence.views->map_released[level]->knows(w.cluster().key, write.cluster, write.agent,
                                                write.clock))
      return static_cast<Scope>(level + 1);
  }
  return Scope::none;
}

// The fence that is missing between the write and the lane's use of the map; "" if none is.
std::string missing(Warp& w, int lane, std::uint64_t address, const LastWrite& write) {
  const Scope needed = scope_to(w, write);
  std::string why = "no fence.proxy.tensormap::generic.acquire of its address";
  const auto fences = w.cluster().map_fences.find(address);
  if (fences == w.cluster().map_fences.end()) return why;
  for (const MapFence& fence : fences->second) {
    const bool known = fence.agent == w.agent(lane)
                           ? fence.clock <= w.clock(lane)
                           : w.known(lane)->get(fence.agent) >= fence.clock;
    if (!known) continue;
    const Scope released = released_at(w, fence, write);
    if (released == Scope::none) {
      why =
          "the fence that acquires it finds no fence.proxy.tensormap::generic.release that covers "
          "the write";
    } else if (std::min(released, fence.scope) < needed) {
      why = std::string("scope too narrow, its fences release at ") + name_of(released) +
            " and acquire at " + name_of(fence.scope) + ", for threads of different " +
            (needed == Scope::sys                                ? "GPUs"
             : needed == Scope::gpu && w.grid().cluster_size > 1 ? "clusters"
                                                                 : "CTAs");
    } else {
      return "";
    }
  }
  return why;
}

}  // namespace

bool resolve_tensor_map(Warp& w, int lane, std::uint64_t address, Place* place) {
  if ((address & kWindowMask) == kParamWindow) {
    w.finding(FindingKind::tensor_map,
              "the tensor map is given by its address in the .param space; cvta.param makes that "
              "generic",
              1u << lane, address);
    return false;
  }
  if (address % kTensorMapAlignment != 0) {
    w.finding(FindingKind::tensor_map, "the tensor map is not aligned to 64 bytes", 1u << lane,
              address);
    return false;
  }
  if ((address & kWindowMask) != 0) {
    w.finding(FindingKind::tensor_map,
              "the tensor map is in shared or local memory; it must be a parameter, or lie in "
              "global or constant memory",
              1u << lane, address);
    return false;
  }
  // If both halves resolve, they lie in one buffer: guard gaps separate buffers.
  Place last;
  return w.resolve(lane, Space::global, address, kTensorMapAlignment, false, place) &&
         w.resolve(lane, Space::global, address + kTensorMapAlignment, kTensorMapAlignment, false,
                   &last);
}

void acquire_tensor_map(Warp& w, int lane, std::uint64_t address, Scope scope) {
  Place place;
  if (!resolve_tensor_map(w, lane, address, &place) || !is_checked_map(place)) return;
  auto& fences = w.cluster().map_fences[address];
  const MapFence fence{w.agent(lane), w.clock(lane), scope, w.views(lane)};
  const auto own = std::find_if(fences.begin(), fences.end(),
                                [&](const MapFence& f) { return f.agent == fence.agent; });
  if (own == fences.end()) {
    fences.push_back(fence);
    return;
  }
  // Keep the older of two equal fences: a thread that knows only that one may use the map.
  const auto writes = writes_of(place);
  const bool equal =
      own->scope >= scope && std::all_of(writes.begin(), writes.end(), [&](const LastWrite& write) {
        return released_at(w, *own, write) >= released_at(w, fence, write);
      });
  if (!equal) *own = fence;
}

void read_tensor_map(Warp& w, int lane, const Place& place, std::uint64_t address,
                     std::uint32_t agent, std::uint32_t clock) {
  Actor actor = w.actor(lane);
  actor.agent = agent;
  actor.clock = clock;
  actor.proxy = Proxy::tensormap;
  w.check_read(place, actor, kTensorMapBytes, 1u << lane, address);
  for (const LastWrite& write : writes_of(place)) {
    if (!w.known(lane)->knows(w.cluster().key, write.cluster, write.agent, write.clock) &&
        !(write.cluster == w.cluster().key && write.agent == w.agent(lane)))
      continue;  // reported as a data race
    const std::string why = missing(w, lane, address, write);
    if (why.empty()) continue;
    const Program& program = *w.grid().of_cluster(write.cluster).program;
    const Instruction& other = program.code[write.pc];
    w.finding(
        FindingKind::missing_tensormap_fence,
        "use of a tensor map that the kernel has written: " + why, 1u << lane, address,
        "write by " +
            (write.cluster == w.cluster().key ? w.cluster().describe_agent(write.agent)
             : gpu_of(write.cluster) == gpu_of(w.cluster().key)
                 ? std::string("another CTA")
                 : "a CTA of device " + std::to_string(w.grid().of_cluster(write.cluster).device)) +
            ", line " + std::to_string(other.line) + ": " + program.opcodes[other.opcode],
        other.line);
    break;
  }
}

}  // namespace torchext::sim
