// Decides where an op runs, and adapts the installed simulator to the Device interface.
#include "device.h"

#include <array>
#include <atomic>

#include "check.h"
#include "memory_rate.h"

namespace torchext {
namespace {

std::atomic<const TorchextSimulator*> installed_simulator{nullptr};
std::atomic<int32_t> forced_path{0};
std::atomic<int32_t> simulated_memory{0};  // GB/s; 0: the architecture table's

// path_of_capability() of every capability below 256, so that a launch needs one load.
constexpr auto kPathOfCapability = [] {
  std::array<Path, 256> paths{};
  for (int capability = 0; capability < int(paths.size()); ++capability)
    paths[capability] = path_of_capability(capability);
  return paths;
}();

// Forwards a launch to the simulator and turns its findings into an exception.
class SimulatedDevice final : public Device {
 public:
  DeviceProperties properties() override {
    return {simulator().compute_capability, simulator().sm_count};
  }

  TensorMap encode(const TensorMapSpec& spec) override {
    TensorMap map;
    char error[kErrorBytes] = "";
    const int status = simulator().encode_tensor_map(
        simulator().context, &map, spec.name, uint32_t(spec.element), spec.rank, spec.address,
        spec.dims.data(), spec.strides_bytes.data(), spec.box.data(), uint32_t(spec.swizzle), error,
        sizeof error);
    TORCHEXT_CHECK(status == 0, error);
    return map;
  }

  void launch_raw(const void*, const char* name, const LaunchConfig& config, void** arguments,
                  const Buffer* buffers, size_t num_buffers) override {
    std::vector<TorchextBuffer> ranges;
    for (size_t i = 0; i < num_buffers; ++i) {
      if (buffers[i].bytes == 0) continue;
      ranges.push_back(
          {buffers[i].data, buffers[i].bytes, uint32_t(buffers[i].access), buffers[i].name});
    }
    const uint32_t grid[3] = {config.grid.x, config.grid.y, config.grid.z};
    const uint32_t block[3] = {config.block.x, config.block.y, config.block.z};
    const uint32_t cluster[3] = {config.cluster, 1, 1};
    std::vector<char> error(kErrorBytes);
    const int status =
        simulator().launch(simulator().context, name, grid, block, cluster, config.shared_bytes,
                           arguments, ranges.data(), ranges.size(), error.data(), error.size());
    TORCHEXT_CHECK(status == 0, error.data());
  }

 private:
  static constexpr size_t kErrorBytes = 1 << 16;

  static const TorchextSimulator& simulator() {
    const TorchextSimulator* simulator = installed_simulator.load(std::memory_order_acquire);
    TORCHEXT_CHECK(simulator != nullptr, "the simulator was removed while an op was running");
    return *simulator;
  }
};

SimulatedDevice& simulated_device() {
  static SimulatedDevice device;
  return device;
}

}  // namespace

Path path_of(const DeviceProperties& properties, const char* op) {
  const int capability = properties.compute_capability;
  if (const int32_t forced = forced_path.load(std::memory_order_relaxed)) {
    TORCHEXT_CHECK(runs_on(Path(forced), capability), op, ": the forced path must be one that sm_",
                   capability, " can run (got path ", forced, "); force an earlier path or none");
    return Path(forced);
  }
  if (capability < int(kPathOfCapability.size())) return kPathOfCapability[capability];
  return path_of_capability(capability);
}

Device* device_for(const Tensor& tensor, const char* op) {
  if (tensor.is_cpu()) {
    return installed_simulator.load(std::memory_order_acquire) ? &simulated_device() : nullptr;
  }
  if constexpr (!kBuiltWithCuda) {
    fail("", op,
         ": this build of torchext has no CUDA kernels (no nvcc was found when it was built); move "
         "the tensors to the CPU, or reinstall torchext where nvcc is on PATH or CUDA_HOME is set");
  } else {
    Device* device = cuda_device(tensor.get_device_index());
    const int capability = device->properties().compute_capability;
    TORCHEXT_CHECK(capability >= kOldestCapability, op, ": the GPU must be sm_", kOldestCapability,
                   " or later (got sm_", capability,
                   "); move the tensors to the CPU or keep this layer in plain torch");
    return device;
  }
}

int memory_gigabytes_per_second(Device& device) {
  int rate = 0;
  if (&device == &simulated_device())
    rate = simulated_memory.load(std::memory_order_relaxed);
  else if constexpr (kBuiltWithCuda)
    rate = cuda_memory_gigabytes_per_second(device);
  if (rate > 0) return rate;
  const Architecture* row = find_architecture(device.properties().compute_capability);
  return row != nullptr ? row->gigabytes_per_second : 0;
}

}  // namespace torchext

void torchext_set_simulator(const TorchextSimulator* simulator) {
  torchext::installed_simulator.store(simulator, std::memory_order_release);
}

void torchext_set_simulated_memory(int32_t gigabytes_per_second) {
  torchext::simulated_memory.store(gigabytes_per_second, std::memory_order_relaxed);
}

int32_t torchext_memory_gigabytes_per_second(int32_t index) {
  if constexpr (torchext::kBuiltWithCuda)
    return torchext::memory_gigabytes_per_second(*torchext::cuda_device(index));
  else
    return 0;
}

void torchext_force_path(int32_t path) {
  torchext::forced_path.store(path, std::memory_order_relaxed);
}
