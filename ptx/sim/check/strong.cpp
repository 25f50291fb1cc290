// Strong accesses as synchronization.
#include "strong.h"

#include <algorithm>
#include <array>

namespace torchext::sim {

namespace {
// Keys for shared memory lie above every address of global memory.
std::uint64_t key_of(const Place& place, std::uint64_t address) {
  return place.cta != nullptr ? kSharedWindow | std::uint64_t{place.cta->rank} << 32 | place.offset
                              : address;
}
}  // namespace

std::mutex& strong_lock(std::uint64_t address) {
  static std::array<std::mutex, 64> locks;
  return locks[address / kStrongBytes % locks.size()];
}

std::unique_lock<std::mutex> strong_step(const Place& place, std::uint64_t address) {
  if (place.buffer == nullptr) return {};
  return std::unique_lock<std::mutex>(strong_lock(address));
}

void strong_read(Warp& w, int lane, const Place& place, std::uint64_t address, Scope scope,
                 bool acquire) {
  if (!w.grid().checks || place.valid != nullptr) return;
  const std::uint64_t key = key_of(place, address);
  const auto cell = w.cluster().sync.find(key);
  const auto observe = [&](Scope at) {
    Knowledge k;
    if (cell != w.cluster().sync.end()) k = cell->second.observe(w.cta().rank, at);
    if (place.cta == nullptr) w.grid().sync.observe(key, w.cluster().key, at, &k);
    return k;
  };
  const std::uint32_t bit = 1u << lane;
  if (acquire) {
    w.acquire(bit, observe(scope));
    return;
  }
  // A later fence acquires what both its own scope and this scope include.
  const bool no_scopes = place.cta != nullptr && w.grid().cluster_size == 1;
  Scope at = Scope::none;
  Knowledge k;
  for (std::size_t level = 0; level < kScopeLevels; ++level) {
    Scope reach = std::min(scope, static_cast<Scope>(level + 1));
    if (reach == Scope::sys && w.grid().sync.gpus() == 1) reach = Scope::gpu;
    if (reach != at && (level == 0 || !no_scopes)) k = observe(reach);
    at = reach;
    w.strong_acquired[lane][level].join(k);
    if (k.known || k.views) w.acquired_lanes |= bit;
  }
}

void strong_write(Warp& w, int lane, const Place& place, std::uint64_t address, Scope scope,
                  bool release) {
  if (!w.grid().checks || place.valid != nullptr) return;
  const std::uint32_t bit = 1u << lane;
  if (!release && !(w.fenced_lanes & bit)) return;
  Scoped released;
  if (release)
    released.fill(w.release(bit));
  else
    released = w.fence_released[lane];
  const std::uint64_t key = key_of(place, address);
  w.cluster().sync[key].publish(w.cta().rank, released, scope);
  if (place.cta == nullptr) w.grid().sync.publish(key, w.cluster().key, released, scope);
}

}  // namespace torchext::sim
