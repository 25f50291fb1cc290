// The one seam between launchers and whatever executes kernels. A launcher asks device_for(tensor)
// where it runs: nullptr means the CPU kernel; a Device means the CUDA kernel, executed either by a
// GPU (cuda_device.cpp) or, on CPU tensors, by the PTX simulator that has been installed through
// torchext_set_simulator (device.cpp). Launchers cannot tell the two apart.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <tuple>
#include <utility>

#include "architecture.h"
#include "ptx/sim/api/op_interface.h"
#include "tensor.h"

namespace torchext {

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

// What a kernel may do with a range of memory. A GPU ignores it. The simulator reports a kernel
// that does more, and treats every byte of a `write` range as not yet written.
enum class Access : uint32_t { read = 0, write = 1, read_write = 2 };

struct Buffer {
  const void* data;
  size_t bytes;
  Access access;
  const char* name;
};

inline Buffer reads(const Tensor& t, const char* name) {
  return {t.data_ptr(), size_t(extent_bytes(t)), Access::read, name};
}
inline Buffer writes(const Tensor& t, const char* name) {
  return {t.data_ptr(), size_t(extent_bytes(t)), Access::write, name};
}
inline Buffer updates(const Tensor& t, const char* name) {
  return {t.data_ptr(), size_t(extent_bytes(t)), Access::read_write, name};
}

struct LaunchConfig {
  Dim3 grid;
  Dim3 block;
  uint32_t cluster = 1;   // CTAs along x
  bool overlaps = false;  // may start before its predecessor ends; the kernel itself waits for it
  uint32_t shared_bytes = 0;
};

// The opaque 128-byte CUtensorMap, without cuda.h (CPU-only builds have none).
struct alignas(64) TensorMap {
  uint64_t words[16];
};

// A tiled tensor map, dimension 0 innermost. Element codes are CUtensorMapDataType's.
struct TensorMapSpec {
  enum class Element : uint32_t { u8 = 0, f16 = 6, f32 = 7, bf16 = 9 };
  enum class Swizzle : uint32_t { none = 0, b32 = 1, b64 = 2, b128 = 3 };
  const char* name;  // of the tensor, for error messages
  Element element;
  uint32_t rank;  // 1 to 5
  const void* address;
  std::array<uint64_t, 5> dims;
  std::array<uint64_t, 4> strides_bytes;  // of dimensions 1, 2, ...
  std::array<uint32_t, 5> box;
  Swizzle swizzle;
};

struct DeviceProperties {
  int compute_capability;  // 90 for sm_90
  int sm_count;
};

class Device {
 public:
  virtual ~Device() = default;
  virtual DeviceProperties properties() = 0;
  virtual TensorMap encode(const TensorMapSpec& spec) = 0;
  virtual void launch_raw(const void* function, const char* name, const LaunchConfig& config,
                          void** arguments, const Buffer* buffers, size_t num_buffers) = 0;

  // Launches `function`, an extern "C" kernel called `name`, with arguments converted to its
  // parameter types. `buffers` names all global memory that the kernel may touch.
  template <class... Parameters, class... Arguments>
  void launch(void (*function)(Parameters...), const char* name, const LaunchConfig& config,
              std::initializer_list<Buffer> buffers, const Arguments&... arguments) {
    static_assert(sizeof...(Parameters) == sizeof...(Arguments), "kernel parameter count");
    std::tuple<std::decay_t<Parameters>...> values(arguments...);
    void* pointers[sizeof...(Parameters)];
    collect(values, pointers, std::index_sequence_for<Parameters...>());
    launch_raw(reinterpret_cast<const void*>(function), name, config, pointers, buffers.begin(),
               buffers.size());
  }

 private:
  template <class Tuple, size_t... I>
  static void collect(Tuple& values, void** pointers, std::index_sequence<I...>) {
    ((pointers[I] = const_cast<void*>(static_cast<const void*>(&std::get<I>(values)))), ...);
  }
};

// Pass as `device->launch(TORCHEXT_KERNEL(sm90_name), config, ...)`.
#define TORCHEXT_KERNEL(kernel) (&kernel), #kernel

#ifdef TORCHEXT_CUDA
constexpr bool kBuiltWithCuda = true;
#else
constexpr bool kBuiltWithCuda = false;  // CUDA launchers are declared but not linked in
#endif

// The path of this GPU (path_of_capability), or the one that torchext_force_path asks for; raises
// if the GPU cannot run that one.
Path path_of(const DeviceProperties& properties, const char* op);

// The device that runs the op on `tensor`; nullptr: run the CPU kernel. Raises if `tensor` is on a
// GPU that this build cannot use. Call CUDA launchers under `if constexpr (kBuiltWithCuda)`.
Device* device_for(const Tensor& tensor, const char* op);

// The GPU of that index; CUDA builds only.
Device* cuda_device(int32_t index);

}  // namespace torchext

// Installs the simulator that executes kernels on CPU tensors, for the whole process; nullptr
// removes it. The struct must exist until then.
extern "C" __attribute__((visibility("default"))) void torchext_set_simulator(
    const TorchextSimulator* simulator);

// Makes every GPU, simulated or real, run the kernels of one Path, to compare them; 0: of its own
// path.
extern "C" __attribute__((visibility("default"))) void torchext_force_path(int32_t path);
