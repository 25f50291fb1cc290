// What every wrapper needs: the attribute of a device function that must vanish into its caller,
// and the address form that shared-memory instructions take.
#pragma once

#include <cstdint>

#define TORCHEXT_PTX __device__ __forceinline__

namespace ptx {

// Helper, cvta.to.shared: a generic pointer into shared memory as the 32-bit address of the .shared
// state space.
TORCHEXT_PTX uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace ptx
