// The C interface between an op library and a simulator that runs its kernels on CPU tensors.
// Neither needs headers of the other. Functions return 0, or not 0 and a message in `error`.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct TorchextBuffer {
  const void* data;
  uint64_t bytes;
  uint32_t access;  // 0 read, 1 write, 2 read and write
  const char* name;
};

struct TorchextSimulator {
  void* context;
  int compute_capability;  // 90 for sm_90
  int sm_count;
  // Arguments as of cuTensorMapEncodeTiled, with element strides 1, no interleave and zero fill.
  int (*encode_tensor_map)(void* context, void* map, const char* name, uint32_t element,
                           uint32_t rank, const void* address, const uint64_t* dims,
                           const uint64_t* strides_bytes, const uint32_t* box, uint32_t swizzle,
                           char* error, size_t error_bytes);
  int (*launch)(void* context, const char* kernel, const uint32_t grid[3], const uint32_t block[3],
                const uint32_t cluster[3], uint32_t shared_bytes, void** arguments,
                const TorchextBuffer* buffers, size_t num_buffers, char* error, size_t error_bytes);
};

}  // extern "C"
