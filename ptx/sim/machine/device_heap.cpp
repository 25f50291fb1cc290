// Blocks of the device heap: 16 bytes aligned, at least 16 bytes apart.
#include "device_heap.h"

#include <iterator>

#include "../frontend/ir.h"

namespace torchext::sim {

namespace {

constexpr std::uint64_t kAlign = 16;

std::uint64_t with_gap(std::uint64_t bytes) {
  return align_up(bytes, kAlign) + kAlign;
}

}  // namespace

std::uint8_t* DeviceHeap::data() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (storage_ == nullptr) {
    storage_.reset(new std::uint8_t[kBytes + kAlign]);
    begin_ = align_up(reinterpret_cast<std::uint64_t>(storage_.get()), kAlign);
    next_ = begin_ + kAlign;  // the bytes before the first block belong to the heap
  }
  return reinterpret_cast<std::uint8_t*>(begin_);
}

std::uint64_t DeviceHeap::start_launch() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return ++launches_;
}

std::uint64_t DeviceHeap::allocate(std::uint64_t bytes, std::uint32_t pc, std::uint64_t launch) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (bytes > kBytes) return 0;
  std::uint64_t address = next_;
  if (next_ + with_gap(bytes) <= begin_ + kBytes)
    next_ += with_gap(bytes);
  else
    address = reuse(bytes);
  if (address != 0) blocks_[address] = {address, bytes, true, launch, pc};
  return address;
}

// Forgets all freed blocks, then takes the first gap that is wide enough.
std::uint64_t DeviceHeap::reuse(std::uint64_t bytes) {
  for (auto it = blocks_.begin(); it != blocks_.end();)
    it = it->second.live ? std::next(it) : blocks_.erase(it);
  std::uint64_t at = begin_ + kAlign;
  for (const auto& [begin, block] : blocks_) {
    if (begin - at >= with_gap(bytes)) return at;
    at = begin + with_gap(block.bytes);
  }
  return begin_ + kBytes - at >= with_gap(bytes) ? at : 0;
}

bool DeviceHeap::exists() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return storage_ != nullptr;
}

bool DeviceHeap::release(std::uint64_t begin, std::uint32_t pc, std::uint64_t launch) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = blocks_.find(begin);  // reuse forgets freed blocks
  if (found == blocks_.end() || !found->second.live) return false;
  Block& block = found->second;
  block.live = false;
  block.launch = launch;
  block.pc = pc;
  return true;
}

bool DeviceHeap::find(std::uint64_t address, Block* block) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto it = blocks_.upper_bound(address);
  if (it == blocks_.begin()) return false;
  *block = (--it)->second;
  return address < block->begin + with_gap(block->bytes);
}

bool DeviceHeap::may_access(std::uint64_t address, std::uint64_t bytes) const {
  Block block;
  return find(address, &block) && block.live && address + bytes <= block.begin + block.bytes;
}

std::string DeviceHeap::describe(std::uint64_t address, const Program& program,
                                 std::uint64_t launch) const {
  Block block;
  if (!find(address, &block)) return "memory that malloc has not returned";
  const std::uint64_t offset = address - block.begin;
  std::string place = offset < block.bytes
                          ? "byte " + std::to_string(offset)
                          : std::to_string(offset - block.bytes) + " bytes after the end";
  place += " of a block of " + std::to_string(block.bytes) + " bytes that " +
           (block.live ? "malloc returned" : "has been freed");
  return place + (block.launch == launch  ? " in " + program.place(program.code[block.pc].line)
                  : block.launch < launch ? " in an earlier launch"
                                          : " in another launch");
}

std::vector<DeviceHeap::Block> DeviceHeap::kept(std::uint64_t launch) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Block> all;
  for (const auto& [begin, block] : blocks_) {
    if (block.live && block.launch == launch) all.push_back(block);
  }
  return all;
}

}  // namespace torchext::sim
