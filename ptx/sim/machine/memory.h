// Address spaces: global buffers at their host addresses; windows for shared and local memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../check/shadow.h"
#include "launch.h"

namespace torchext::sim {

class Cta;
class DeviceHeap;

// Generic addresses: shared and local memory lie far above every host address.
constexpr std::uint64_t kSharedWindow = 0x0100'0000'0000'0000;
constexpr std::uint64_t kLocalWindow = 0x0200'0000'0000'0000;
// Addresses of functions. Nothing can be loaded from them.
constexpr std::uint64_t kFunctionWindow = 0x0300'0000'0000'0000;
constexpr std::uint64_t kWindowMask = 0xff00'0000'0000'0000;

// A 32-bit shared address. Bits 0-23: offset. Bits 24-31: 0 for the executing CTA, otherwise the
// rank in the cluster + 1, as mapa returns it.
constexpr std::uint32_t kSharedOffsetMask = 0x00ff'ffff;
constexpr int kSharedRankShift = 24;
// The first kilobyte belongs to the system on sm_90; no variable lies there.
constexpr std::uint32_t kSharedBase = 1024;
// Its offset that cooperative groups use for tiles of several warps.
constexpr std::uint32_t kReservedSharedSlot = 512;

class SpinLock {
 public:
  void lock() {
    while (flag_.test_and_set(std::memory_order_acquire)) {
    }
  }
  void unlock() { flag_.clear(std::memory_order_release); }

 private:
  std::atomic_flag flag_ = ATOMIC_FLAG_INIT;
};

struct GlobalBuffer {
  std::uint64_t begin, end;  // addresses
  bool writable;
  std::unique_ptr<Shadow> shadow;  // none for read-only memory
  std::string name;
  SpinLock lock;               // of shadow
  DeviceHeap* heap = nullptr;  // if set, only its blocks may be accessed
};

// The place that an address denotes.
struct Place {
  std::uint8_t* host = nullptr;
  Shadow* shadow = nullptr;
  std::uint64_t offset = 0;  // in the shadow
  GlobalBuffer* buffer = nullptr;
  Cta* cta = nullptr;             // shared
  std::uint8_t* valid = nullptr;  // local: which bits of each byte are valid
};

class Memory {
 public:
  // Throws std::invalid_argument for buffers that overlap.
  void add(const Buffer& buffer, bool checks, bool always_valid);
  void sort();
  GlobalBuffer* find(std::uint64_t address) const {
    std::size_t low = 0, high = buffers_.size();
    while (low < high) {
      const std::size_t middle = (low + high) / 2;
      if (buffers_[middle]->end <= address)
        low = middle + 1;
      else
        high = middle;
    }
    return low < buffers_.size() && buffers_[low]->begin <= address ? buffers_[low].get() : nullptr;
  }
  // "12 bytes after buffer 'out' (4096 bytes)", for messages.
  std::string describe(std::uint64_t address) const;
  const std::vector<std::unique_ptr<GlobalBuffer>>& buffers() const { return buffers_; }

 private:
  std::vector<std::unique_ptr<GlobalBuffer>> buffers_;
};

}  // namespace torchext::sim
