// Strong accesses as synchronisation.
#include "strong.h"

namespace torchext::sim {

namespace {
std::uint64_t shared_key(const Place& place) {
  return std::uint64_t{place.cta->rank} << 32 | place.offset;
}
}  // namespace

void strong_read(Warp& w, int lane, const Place& place, std::uint64_t address, bool acquire) {
  if (!w.grid().checks || place.valid != nullptr) return;
  Knowledge k;
  if (place.cta != nullptr) {
    auto& sync = w.cluster().shared_sync;
    const auto it = sync.find(shared_key(place));
    if (it == sync.end()) return;
    k = it->second;
  } else if (!w.grid().observe(address, w.cluster().number, &k)) {
    return;
  }
  const std::uint32_t bit = 1u << lane;
  if (acquire) {
    w.acquire(bit, k);
  } else {
    w.strong_acquired[lane].join(k);
    w.acquired_lanes |= bit;
  }
}

void strong_write(Warp& w, int lane, const Place& place, std::uint64_t address, bool release) {
  if (!w.grid().checks || place.valid != nullptr) return;
  const std::uint32_t bit = 1u << lane;
  if (!release && !(w.fenced_lanes & bit)) return;
  const Knowledge k = release ? w.release(bit) : w.fence_released[lane];
  if (place.cta != nullptr)
    w.cluster().shared_sync[shared_key(place)].join(k);
  else
    w.grid().publish(address, w.cluster().number, k);
}

}  // namespace torchext::sim
