// A Device that is a GPU, by a statically linked CUDA runtime. The runtime finds, through the
// driver, the context that torch made current, so the two share streams and memory. This library
// must load on CPU-only torch. So functions that only a CUDA build of torch or a driver has are
// looked up at their first use.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_set>

#include "check.h"
#include "device.h"
#include "memory_rate.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream)
    __attribute__((weak));

namespace torchext {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= 64);

void check_cuda(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a launch error is not sticky: leave none behind for the next caller
  if (status == cudaErrorNoKernelImageForDevice)
    fail("", doing,
         ": this build of torchext must have kernels for this GPU (got one whose TORCHEXT_ARCHS "
         "left them out); reinstall torchext with the GPU's compute capability in TORCHEXT_ARCHS, "
         "such as TORCHEXT_ARCHS=90, or without TORCHEXT_ARCHS");
  fail("", "CUDA error while ", doing, ": ", cudaGetErrorName(status), " (",
       cudaGetErrorString(status), ")");
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000,
                                                cudaEnableDefault, &found),
               "looking up cuTensorMapEncodeTiled");
    TORCHEXT_CHECK(found == cudaDriverEntryPointSuccess,
                   "the CUDA driver must be one for CUDA 12.0 or later (got one without "
                   "cuTensorMapEncodeTiled); install a newer driver");
    return reinterpret_cast<EncodeTiled>(pointer);
  }();
  return function;
}

// Makes a device current for a scope.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index) {
    check_cuda(cudaGetDevice(&previous_), "reading the current device");
    if (previous_ != index) check_cuda(cudaSetDevice(index), "making a device current");
    changed_ = previous_ != index;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index) : index_(index) {
    int major, minor;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index),
               "reading the compute capability");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index),
               "reading the compute capability");
    check_cuda(cudaDeviceGetAttribute(&properties_.sm_count, cudaDevAttrMultiProcessorCount, index),
               "counting SMs");
    properties_.compute_capability = 10 * major + minor;
    // A driver that does not tell is no error: the caller then takes the architecture table's.
    int kilohertz = 0, bits = 0;
    if (cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, index) != cudaSuccess ||
        cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, index) != cudaSuccess)
      cudaGetLastError();
    // Memory sends twice a cycle.
    memory_gigabytes_per_second_ = int(2.0 * kilohertz * (bits / 8) / 1e6);
  }

  int memory_gigabytes_per_second() const { return memory_gigabytes_per_second_; }

  DeviceProperties properties() override { return properties_; }

  TensorMap encode(const TensorMapSpec& spec) override {
    CUtensorMap map;
    const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
    const CUresult status = encode_tiled()(
        &map, CUtensorMapDataType(spec.element), spec.rank, const_cast<void*>(spec.address),
        spec.dims.data(), spec.strides_bytes.data(), spec.box.data(), element_strides,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CUtensorMapSwizzle(spec.swizzle),
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    TORCHEXT_CHECK(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled refused the tensor map of ",
                   spec.name, " with CUDA driver error ", int(status));
    TensorMap copy;
    std::memcpy(&copy, &map, sizeof copy);
    return copy;
  }

  void launch_raw(const void* function, const char* name, const LaunchConfig& config,
                  void** arguments, const Buffer*, size_t) override {
    CurrentDevice current(index_);
    if (config.shared_bytes > kDefaultSharedBytes) allow_shared(function, config.shared_bytes);
    cudaLaunchAttribute attributes[2];
    unsigned count = 0;
    if (config.cluster > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count++].val.clusterDim = {config.cluster, 1, 1};
    }
    if (config.overlaps) {
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    cudaLaunchConfig_t launch = {};
    launch.gridDim = dim3(config.grid.x, config.grid.y, config.grid.z);
    launch.blockDim = dim3(config.block.x, config.block.y, config.block.z);
    launch.dynamicSmemBytes = config.shared_bytes;
    launch.stream = current_stream();
    launch.attrs = attributes;
    launch.numAttrs = count;
    check_cuda(cudaLaunchKernelExC(&launch, function, arguments), name);
  }

 private:
  static constexpr uint32_t kDefaultSharedBytes = limits::shared_per_block_default;

  cudaStream_t current_stream() const {
    TORCHEXT_CHECK(&aoti_torch_get_current_cuda_stream != nullptr,
                   "this torch has no CUDA support; install a CUDA build of torch");
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

  void allow_shared(const void* function, uint32_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!allowed_.insert(function).second) return;
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, function), "reading a kernel's attributes");
    int limit;
    check_cuda(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, index_),
               "reading the shared memory limit");
    check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    limit - int(attributes.sharedSizeBytes)),
               "raising a kernel's shared memory limit");
    TORCHEXT_CHECK(bytes <= uint32_t(limit), "a kernel's shared memory must be at most ", limit,
                   " bytes (got ", bytes, ")");
  }

  int index_;
  DeviceProperties properties_;
  int memory_gigabytes_per_second_;  // 0: not known
  std::mutex mutex_;
  std::unordered_set<const void*> allowed_;  // kernels whose shared memory limit has been raised
};

}  // namespace

Device* cuda_device(int32_t index) {
  constexpr int kMaxDevices = 64;
  static std::once_flag made[kMaxDevices];
  static std::unique_ptr<CudaDevice> devices[kMaxDevices];
  TORCHEXT_CHECK(index >= 0 && index < kMaxDevices, "the index of a CUDA device must be less than ",
                 kMaxDevices, " (got ", index, ")");
  std::call_once(made[index], [&] { devices[index] = std::make_unique<CudaDevice>(index); });
  return devices[index].get();
}

int cuda_memory_gigabytes_per_second(Device& device) {
  return static_cast<CudaDevice&>(device).memory_gigabytes_per_second();
}

}  // namespace torchext
