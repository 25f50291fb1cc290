// The limits of GPUs, one row a compute capability. Launchers choose kernels that fit them, and the
// PTX simulator refuses launches that do not. No other header is needed.
//
// Sources: CUDA Programming Guide, "Compute Capabilities"; libcu++'s cuda::arch_traits;
// cuda_occupancy.h of CUDA 13.0.
#pragma once

#include <cstdint>

namespace torchext {

struct Architecture {
  int capability;                  // 90 for sm_90
  std::uint32_t shared_per_sm;     // bytes
  std::uint32_t shared_per_block;  // bytes, static and dynamic together, when opted into
  std::uint32_t threads_per_sm;
  std::uint32_t blocks_per_sm;
  std::uint32_t ctas_per_cluster;      // that any GPU of the kind can run; 0: no clusters
  std::uint32_t ctas_per_cluster_max;  // with cudaFuncAttributeNonPortableClusterSizeAllowed
};

// From sm_80 on, the driver takes 1 KiB of each block's shared memory.
// clang-format off
constexpr Architecture kArchitectures[] = {
    { 75,  64 << 10,  64 << 10, 1024, 16, 0,  0},
    { 80, 164 << 10, 163 << 10, 2048, 32, 0,  0},
    { 86, 100 << 10,  99 << 10, 1536, 16, 0,  0},
    { 87, 164 << 10, 163 << 10, 1536, 16, 0,  0},
    { 88, 100 << 10,  99 << 10, 1536, 16, 0,  0},
    { 89, 100 << 10,  99 << 10, 1536, 24, 0,  0},
    { 90, 228 << 10, 227 << 10, 2048, 32, 8, 16},
    {100, 228 << 10, 227 << 10, 2048, 32, 8, 16},
    {103, 228 << 10, 227 << 10, 2048, 32, 8, 16},
    {110, 228 << 10, 227 << 10, 1536, 24, 8, 16},
    {120, 100 << 10,  99 << 10, 1536, 24, 8,  8},
    {121, 100 << 10,  99 << 10, 1536, 24, 8,  8},
};
// clang-format on

// The same for all of these.
constexpr std::uint32_t kSharedPerBlockByDefault = 48 << 10;  // static, or without opting in
constexpr std::uint32_t kThreadsPerBlock = 1024;
constexpr std::uint32_t kBlockLimits[3] = {1024, 1024, 64};
constexpr std::uint32_t kGridLimits[3] = {0x7fffffff, 65535, 65535};
constexpr std::uint32_t kRegistersPerBlock = 65536, kRegistersPerThread = 255;

// The row of a GPU, or of the oldest GPU that runs PTX of an older target; nullptr for a capability
// later than all rows, or between them.
constexpr const Architecture* architecture_of(int capability) {
  if (capability < kArchitectures[0].capability) return &kArchitectures[0];
  for (const Architecture& a : kArchitectures) {
    if (a.capability == capability) return &a;
  }
  return nullptr;
}

}  // namespace torchext
