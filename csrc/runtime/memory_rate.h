// The rated bandwidth of a device's memory, in GB/s. GPUs of one compute capability differ in it: an
// H200 has 1.4 times as much as an H100.
#pragma once

#include "device.h"

namespace torchext {

// Computed from the clock and bus width of a GPU's memory; for a simulated GPU, what
// torchext_set_simulated_memory was given. If neither is known, the architecture table's.
int memory_gigabytes_per_second(Device& device);

// The same for a Device that cuda_device() returned; 0 if the driver does not tell.
int cuda_memory_gigabytes_per_second(Device& device);

}  // namespace torchext

// The bandwidth of the simulated GPU's memory; 0: that of the architecture table.
extern "C" __attribute__((visibility("default"))) void torchext_set_simulated_memory(
    int32_t gigabytes_per_second);

// memory_gigabytes_per_second of the GPU of that index, which must exist; 0 in builds without CUDA.
extern "C" __attribute__((visibility("default"))) int32_t
torchext_memory_gigabytes_per_second(int32_t index);
