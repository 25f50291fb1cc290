// The heap behind malloc and free in device code. Its blocks outlive the launch, as on a GPU.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace torchext::sim {

struct Program;

class DeviceHeap {
 public:
  static constexpr std::uint64_t kBytes = 8 << 20;  // CUDA's default, cudaLimitMallocHeapSize

  struct Block {
    std::uint64_t begin = 0, bytes = 0;
    bool live = true;
    std::uint64_t launch = 0;  // that allocated it, and that freed it
    std::uint32_t pc = 0;      // in the program of that launch
  };

  // The number of a new launch. Launches of a module may run at the same time.
  std::uint64_t start_launch();
  // The address of a new block; 0 if there is no room. Freed memory is reused last, so that uses of
  // a freed block are found.
  std::uint64_t allocate(std::uint64_t bytes, std::uint32_t pc, std::uint64_t launch);
  // False if the block has been freed already.
  bool release(std::uint64_t begin, std::uint32_t pc, std::uint64_t launch);
  // Finds the block that contains an address or ends at it; false if there is none.
  bool find(std::uint64_t address, Block* block) const;
  bool may_access(std::uint64_t address, std::uint64_t bytes) const;
  std::string describe(std::uint64_t address, const Program& program, std::uint64_t launch) const;
  // Blocks that the launch allocated and nobody has freed.
  std::vector<Block> kept(std::uint64_t launch) const;
  std::uint8_t* data();
  bool exists() const;  // some launch has used it

 private:
  std::uint64_t reuse(std::uint64_t bytes);

  mutable std::mutex mutex_;
  std::unique_ptr<std::uint8_t[]> storage_;
  std::uint64_t begin_ = 0, next_ = 0;  // addresses
  std::map<std::uint64_t, Block> blocks_;
  std::uint64_t launches_ = 0;
};

}  // namespace torchext::sim
