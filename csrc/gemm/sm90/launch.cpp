// Launches the Hopper GEMM: picks the kernel, describes operands to TMA, sizes the grid.
#include <algorithm>

#include "../../runtime/check.h"
#include "params.h"

namespace torchext {
namespace {

using namespace sm90;
using Element = TensorMapSpec::Element;
using Swizzle = TensorMapSpec::Swizzle;

TensorMap operand_map(Device& device, const char* name, const void* data, int64_t rows, int64_t k,
                      int64_t stride) {
  return device.encode({name,
                        Element::u8,
                        2,
                        data,
                        {uint64_t(k), uint64_t(rows)},
                        {uint64_t(stride)},
                        {kTileK, kTileM},
                        Swizzle::b128});
}

TensorMap scale_map(Device& device, const char* name, const float* data, int64_t rows,
                    int64_t groups, int64_t group_stride) {
  // With one group there is no stride, but a map wants one.
  const int64_t stride = groups > 1 ? group_stride : round_up(rows, 4);
  return device.encode({name,
                        Element::f32,
                        2,
                        data,
                        {uint64_t(rows), uint64_t(groups)},
                        {uint64_t(stride) * sizeof(float)},
                        {kTileM, 1},
                        Swizzle::none});
}

TensorMap out_map(Device& device, const GemmProblem& p) {
  const Element element = p.out_dtype == ScalarType::Float      ? Element::f32
                          : p.out_dtype == ScalarType::BFloat16 ? Element::bf16
                                                                : Element::f16;
  const uint32_t bytes = uint32_t(element_size(p.out_dtype));
  return device.encode({"out",
                        element,
                        2,
                        p.out,
                        {uint64_t(p.n), uint64_t(p.m)},
                        {uint64_t(p.out_stride) * bytes},
                        {kSwizzleBytes / bytes, kConsumerRows},
                        Swizzle::b128});
}

GemmKernel select(const GemmProblem& p) {
  const bool a_e5m2 = p.a_dtype == ScalarType::Float8_e5m2;
  const bool b_e5m2 = p.b_dtype == ScalarType::Float8_e5m2;
  switch (p.granularity) {
    case Granularity::k1D2D:
      return fp8_gemm_nt_1d2d(a_e5m2, b_e5m2);
    case Granularity::k1D1D:
      return fp8_gemm_nt_1d1d(a_e5m2, b_e5m2);
    default:
      return fp8_gemm_nt_rowwise(a_e5m2, b_e5m2);
  }
}

}  // namespace

void fp8_gemm_nt_sm90(Device& device, const GemmProblem& p, std::initializer_list<Buffer> buffers) {
  TORCHEXT_CHECK(p.grouping == Grouping::kNone && p.activation == Activation::kNone, p.op,
                 ": there is no sm_90 kernel for groups and activations yet; move the tensors to "
                 "the CPU");
  const DeviceProperties properties = device.properties();
  TORCHEXT_CHECK_VALUE(p.num_sms <= properties.sm_count, p.op, ": num_sms must be at most ",
                       properties.sm_count, ", the SMs of this GPU (got ", p.num_sms, ")");
  const int64_t groups = ceil_div(p.k, kGroup);
  GemmParams params = {};
  if (p.k > 0) {  // otherwise there is nothing to load, and nothing that a map could describe
    params.a = operand_map(device, "a", p.a, p.m, p.k, p.a_stride);
    params.b = operand_map(device, "b", p.b, p.n, p.k, p.b_stride);
    if (p.granularity != Granularity::kRowwise)
      params.a_scale = scale_map(device, "a_scale", p.a_scale, p.m, groups, p.a_scale_group);
    if (p.granularity == Granularity::k1D1D)
      params.b_scale = scale_map(device, "b_scale", p.b_scale, p.n, groups, p.b_scale_group);
  }
  const int64_t row_bytes = p.out_stride * element_size(p.out_dtype);
  params.store_by_tma =
      !p.accumulate && row_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  if (params.store_by_tma) params.out_map = out_map(device, p);
  params.a_scale_data = p.a_scale;
  params.b_scale_data = p.b_scale;
  params.a_scale_row = p.a_scale_row;
  params.b_scale_row = p.b_scale_row;
  params.b_scale_group = p.b_scale_group;
  params.bias = p.bias;
  params.bias_dtype = p.bias_dtype;
  params.out = p.out;
  params.out_dtype = p.out_dtype;
  params.out_stride = p.out_stride;
  params.accumulate = p.accumulate;
  params.m = uint32_t(p.m);
  params.n = uint32_t(p.n);
  params.k_blocks = uint32_t(groups);

  const int64_t tiles = ceil_div(p.m, kTileM) * ceil_div(p.n, kTileN);
  TORCHEXT_CHECK_VALUE(tiles < (int64_t(1) << 31), p.op, ": the output has ", tiles,
                       " tiles of 128x128, more than 2^31; split the product");
  const int64_t sms = p.num_sms > 0 ? p.num_sms : properties.sm_count;
  const GemmKernel kernel = select(p);
  LaunchConfig config;
  config.grid = {uint32_t(std::min(tiles, sms))};
  config.block = {kThreads};
  config.shared_bytes = kernel.shared_bytes;
  device.launch(kernel.function, kernel.name, config, buffers, params);
}

}  // namespace torchext
