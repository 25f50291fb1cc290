// A 64-bit hash of a tensor's bytes, at the speed of memory. By it, torchext.nn.Linear proves that
// its weight is still the one that was quantized (torchext/nn/weight_cache.py).
//
// The bytes are cut into blocks of 4 KiB. The hash of a block is NH, the inner hash of UMAC (Black
// et al., 1999) on 64-bit words: the sum of (word + key) * (next word + next key) modulo 2^128,
// with a key for each position. Two different blocks have the same sum with a probability of at
// most 2^-64 over the choice of the keys, whatever their difference: flipped signs, exchanged
// elements, a transpose. Each sum is mixed with the position of its block before the blocks are
// added up, so that they can be hashed in any order, on any number of threads.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>

#include <torch/csrc/stable/ops.h>

namespace {

constexpr int64_t kWords = 512;  // of a block
constexpr int64_t kBlock = 8 * kWords;
constexpr int64_t kBlocksOfAThread = 64;  // at least: 256 KiB take about as long as waking a thread

// A bijection in which each bit of x affects all bits of the result (as in SplitMix64).
constexpr uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

constexpr std::array<uint64_t, kWords> keys() {
  std::array<uint64_t, kWords> keys{};
  for (uint64_t i = 0; i < kWords; ++i) keys[i] = mixed((i + 1) * 0x9e3779b97f4a7c15);
  return keys;
}
constexpr std::array<uint64_t, kWords> kKeys = keys();

using Sum = unsigned __int128;

Sum product(const unsigned char* bytes, int64_t word) {
  uint64_t a, b;
  std::memcpy(&a, bytes + 8 * word, 8);
  std::memcpy(&b, bytes + 8 * word + 8, 8);
  return Sum(a + kKeys[word]) * (b + kKeys[word + 1]);
}

// `bytes` is a whole block.
uint64_t block_hash(const unsigned char* bytes, uint64_t position) {
  Sum even = 0, odd = 0;  // two sums, because each addition to a sum waits for the previous one
  for (int64_t word = 0; word < kWords; word += 4) {
    even += product(bytes, word);
    odd += product(bytes, word + 2);
  }
  const Sum sum = even + odd;
  return mixed(uint64_t(sum) + mixed(uint64_t(sum >> 64) + mixed(position)));
}

}  // namespace

extern "C" __attribute__((visibility("default"))) uint64_t torchext_content_hash(const void* data,
                                                                                 int64_t bytes) {
  const auto* const begin = static_cast<const unsigned char*>(data);
  const int64_t whole = bytes / kBlock;
  std::atomic<uint64_t> total{mixed(uint64_t(bytes))};
  const auto add = [&](int64_t from, int64_t to) {
    uint64_t sum = 0;
    for (int64_t i = from; i < to; ++i) sum += block_hash(begin + i * kBlock, uint64_t(i));
    total += sum;
  };
  if (whole < 2 * kBlocksOfAThread)
    add(0, whole);
  else
    torch::stable::parallel_for(0, whole, kBlocksOfAThread, add);
  if (const int64_t rest = bytes - whole * kBlock; rest > 0) {
    std::array<unsigned char, kBlock> last{};
    std::memcpy(last.data(), begin + whole * kBlock, size_t(rest));
    total += block_hash(last.data(), uint64_t(whole));
  }
  return total;
}
