// Implements tensor.h.
#include "tensor.h"

#include <sys/mman.h>

#include <sstream>

#include "check.h"

namespace torchext {
namespace {

std::string join(const char* open, const torch::headeronly::IntHeaderOnlyArrayRef& values,
                 const char* close) {
  std::ostringstream text;
  text << open;
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << close;
  return text.str();
}

// Asks for huge pages under new memory of a CPU tensor, if there is much. Where memory is not reused,
// the first write to its pages would take longer than most ops. It is advice: where the kernel does
// not follow it, nothing changes.
void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kPage = 2 << 20, kLeast = 2 * kPage;
  if (bytes < kLeast) return;
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (address + kPage - 1) / kPage * kPage;
  const uintptr_t last = (address + uintptr_t(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float8_e4m3fn:
      return aoti_torch_dtype_float8_e4m3fn();
    case ScalarType::Float8_e5m2:
      return aoti_torch_dtype_float8_e5m2();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    default:
      fail("TypeError", "torchext allocates no tensors of dtype ", dtype_name(dtype));
  }
}

}  // namespace

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float8_e4m3fn:
      return "torch.float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "torch.float8_e5m2";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

int64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float8_e4m3fn:
    case ScalarType::Float8_e5m2:
    case ScalarType::Byte:
      return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Long:
      return 8;
    default:
      fail("TypeError", "torchext has no use for dtype ", dtype_name(dtype));
  }
}

std::string shape_string(const Tensor& tensor) {
  return join("[", tensor.sizes(), "]");
}
std::string stride_string(const Tensor& tensor) {
  return join("(", tensor.strides(), ")");
}

Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     ScalarType dtype, const Tensor& like) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(),
                                                  strides.data(), dtype_code(dtype), device_type,
                                                  like.get_device_index(), &handle));
  Tensor tensor(handle);
  if (device_type == aoti_torch_device_type_cpu() && tensor.numel() > 0) {
    int64_t last = 0;
    for (size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
    advise_huge_pages(tensor.data_ptr(), (last + 1) * element_size(dtype));
  }
  return tensor;
}

std::optional<FoldedRows> fold_rows(const Tensor& tensor) {
  FoldedRows rows{1, 0};
  for (int64_t i = tensor.dim() - 2; i >= 0; --i) {
    const int64_t size = tensor.size(i), stride = tensor.stride(i);
    if (size == 1) continue;
    if (rows.count == 1)
      rows.stride = stride;
    else if (size != 0 && stride != rows.count * rows.stride)
      return std::nullopt;
    rows.count *= size;
    if (rows.count == 0) return FoldedRows{0, 0};
  }
  return rows;
}

int64_t extent_bytes(const Tensor& tensor) {
  // This runs for every argument of a launch, and each accessor of a tensor is a call into another
  // library: so read sizes and strides once.
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return 0;
    last += (sizes[i] - 1) * strides[i];
  }
  return (last + 1) * element_size(tensor.scalar_type());
}

}  // namespace torchext
