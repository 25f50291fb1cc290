// Address spaces: global buffers at their host addresses; windows for shared and local memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../check/shadow.h"
#include "launch.h"

namespace torchext::sim {

class Cta;
class DeviceHeap;

// Generic addresses: shared and local memory lie far above every host address.
constexpr std::uint64_t kSharedWindow = 0x0100'0000'0000'0000;
constexpr std::uint64_t kLocalWindow = 0x0200'0000'0000'0000;
// Addresses of a kernel's parameters before cvta.param makes them generic.
constexpr std::uint64_t kParamWindow = 0x0400'0000'0000'0000;
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
    for (unsigned tries = 1; flag_.test_and_set(std::memory_order_acquire); ++tries) {
      if (tries % 64 == 0) std::this_thread::yield();  // the owner may wait for this core
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
  SpinLock lock;                  // of shadow, and of the bytes while there is a shadow
  DeviceHeap* heap = nullptr;     // if set, only its blocks may be accessed
  int device = -1;                // that it belongs to, in a group of GPUs
  std::string described() const;  // "'out' (4096 bytes)"

  // The lock for an access to the bytes. It keeps a race of the kernel from being one of the host
  // threads too. Empty if there is no shadow: read-only memory, or a launch without checks.
  std::unique_lock<SpinLock> guard() {
    return shadow != nullptr ? std::unique_lock<SpinLock>(lock) : std::unique_lock<SpinLock>();
  }
};

// The place that an address denotes.
struct Place {
  std::uint8_t* host = nullptr;
  Shadow* shadow = nullptr;
  std::uint64_t offset = 0;  // in the shadow
  GlobalBuffer* buffer = nullptr;
  Cta* cta = nullptr;             // shared
  std::uint8_t* valid = nullptr;  // local: which bits of each byte are valid

  std::unique_lock<SpinLock> guard() const {
    return buffer != nullptr ? buffer->guard() : std::unique_lock<SpinLock>();
  }
};

class Memory {
 public:
  // Throws std::invalid_argument for buffers that overlap.
  void add(const Buffer& buffer, bool checks, bool always_valid);
  void add(std::shared_ptr<GlobalBuffer> buffer) { buffers_.push_back(std::move(buffer)); }
  static std::shared_ptr<GlobalBuffer> make(const Buffer& buffer, bool checks, bool always_valid);
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
  const std::vector<std::shared_ptr<GlobalBuffer>>& buffers() const { return buffers_; }

 private:
  std::vector<std::shared_ptr<GlobalBuffer>> buffers_;
};

}  // namespace torchext::sim
