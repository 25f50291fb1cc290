// Launches the Hopper GEMM: has a kernel chosen (select.h), describes operands to TMA, sizes the
// grid.
#include <algorithm>

#include "../../runtime/check.h"
#include "select.h"

namespace torchext {
namespace {

using namespace sm90;
using Element = TensorMapSpec::Element;
using Swizzle = TensorMapSpec::Swizzle;

TensorMap operand_map(Device& device, const char* name, const void* data, int64_t rows, int64_t k,
                      int64_t stride, uint32_t box_rows) {
  return device.encode({name,
                        Element::u8,
                        2,
                        data,
                        {uint64_t(k), uint64_t(rows)},
                        {uint64_t(stride)},
                        {kTileK, box_rows},
                        Swizzle::b128});
}

TensorMap scale_map(Device& device, const char* name, const float* data, int64_t rows,
                    int64_t k_groups, int64_t group_stride, uint32_t box_rows) {
  // With one group there is no stride, but a map wants one.
  const int64_t stride = k_groups > 1 ? group_stride : round_up(rows, 4);
  return device.encode({name,
                        Element::f32,
                        2,
                        data,
                        {uint64_t(rows), uint64_t(k_groups)},
                        {uint64_t(stride) * sizeof(float)},
                        {box_rows, 1},
                        Swizzle::none});
}

TensorMap out_map(Device& device, const GemmProblem& p) {
  const Element element = p.activation != Activation::kNone     ? Element::u8
                          : p.out_dtype == ScalarType::Float    ? Element::f32
                          : p.out_dtype == ScalarType::BFloat16 ? Element::bf16
                                                                : Element::f16;
  const uint64_t bytes = element_size(p.out_dtype);
  const bool groups = p.grouping == Grouping::kAlongK;
  return device.encode(
      {"out",
       element,
       3,
       p.out,
       {uint64_t(features(p)), uint64_t(p.m), groups ? uint64_t(p.groups) : 1},
       {p.out_stride * bytes, (groups ? p.out_group_stride : p.out_stride) * bytes},
       {uint32_t(kSwizzleBytes / bytes), kStoreRows, 1},
       Swizzle::b128});
}

// Tiles that there can be at most: all that the host knows where groups are counted on the device.
int64_t most_tiles(const GemmProblem& p, const Choice& choice) {
  const TileShape& tile = choice.kernel->tile;
  const int64_t n_tiles = ceil_div(features(p), tile.n() * (choice.multicast ? 2 : 1));
  switch (p.grouping) {
    case Grouping::kAlongK:
      return p.groups * ceil_div(p.m, tile.m()) * n_tiles;
    case Grouping::kOffsets:
      return (ceil_div(p.m, tile.m()) + p.groups) * n_tiles;
    case Grouping::kCounts:
      return p.groups * ceil_div(p.group_rows, tile.m()) * n_tiles;
    default:
      return ceil_div(p.m, tile.m()) * n_tiles;
  }
}

void describe_operands(Device& device, const GemmProblem& p, const Choice& choice,
                       GemmParams& params) {
  const TileShape& tile = choice.kernel->tile;
  const bool swapped = tile.swapped;
  const int64_t k_groups = ceil_div(p.k, kGroup);
  const int64_t b_rows = p.n * (p.grouping == Grouping::kAlongK ? 1 : p.groups);
  const uint32_t row_box = choice.multicast ? tile.rows / 2 : tile.rows;
  TensorMap& a = swapped ? params.columns : params.rows;
  TensorMap& b = swapped ? params.rows : params.columns;
  a = operand_map(device, "a", p.a, p.m, p.k, p.a_stride, swapped ? tile.columns : row_box);
  b = operand_map(device, "b", p.b, b_rows, p.k, p.b_stride, swapped ? row_box : tile.n());
  if (p.granularity == Granularity::kRowwise) return;
  TensorMap& a_scale = swapped ? params.column_scale : params.row_scale;
  a_scale = scale_map(device, "a_scale", p.a_scale, p.m, k_groups, p.a_scale_group, tile.m());
  if (p.granularity == Granularity::k1D2D) return;
  TensorMap& b_scale = swapped ? params.row_scale : params.column_scale;
  b_scale = scale_map(device, "b_scale", p.b_scale, b_rows, k_groups, p.b_scale_group, tile.n());
}

}  // namespace

void fp8_gemm_nt_sm90(Device& device, const GemmProblem& p, std::initializer_list<Buffer> buffers) {
  const DeviceProperties properties = device.properties();
  TORCHEXT_CHECK_VALUE(p.num_sms <= properties.sm_count, p.op, ": num_sms must be at most ",
                       properties.sm_count, ", the SMs of this GPU (got ", p.num_sms, ")");
  const bool lists_groups = p.grouping == Grouping::kOffsets || p.grouping == Grouping::kCounts;
  TORCHEXT_CHECK_VALUE(!lists_groups || p.groups <= int64_t(kMaxGroups), p.op,
                       ": there must be at most ", kMaxGroups, " groups (got ", p.groups,
                       "); split the product, or give the group of each row");
  const Choice choice = select(p, properties.sm_count);
  const GemmKernel& kernel = *choice.kernel;

  GemmParams params = {};
  // With K = 0 there is nothing to load, and nothing that a map could describe.
  if (p.k > 0) describe_operands(device, p, choice, params);
  const int64_t bytes = element_size(p.out_dtype);
  params.out_aligned = p.out_stride * bytes % 16 == 0 && p.out_group_stride * bytes % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  if (params.out_aligned && !kernel.tile.swapped) params.out_map = out_map(device, p);
  params.a_scale = p.a_scale;
  params.b_scale = p.b_scale;
  params.a_scale_row = p.a_scale_row;
  params.b_scale_row = p.b_scale_row;
  params.b_scale_group = p.b_scale_group;
  params.b_scale_batch = p.b_scale_batch;
  params.bias = p.bias;
  params.bias_dtype = p.bias_dtype;
  params.out = p.out;
  params.out_dtype = p.out_dtype;
  params.out_stride = p.out_stride;
  params.out_group_stride = p.out_group_stride;
  params.accumulate = p.accumulate;
  params.grouping = p.grouping;
  params.group_index = p.group_index;
  params.groups = uint32_t(p.groups);
  params.group_rows = uint32_t(p.group_rows);
  params.m = uint32_t(p.m);
  params.n = uint32_t(features(p));
  params.activation = p.activation;
  params.out_scale = p.out_scale;
  params.out_scale_group = p.out_scale_group;
  params.pow2_scale = p.pow2_scale;
  params.k_blocks = uint32_t(ceil_div(p.k, kGroup));
  params.multicast = choice.multicast;

  const int64_t tiles = most_tiles(p, choice);
  TORCHEXT_CHECK_VALUE(tiles < (int64_t(1) << 31), p.op, ": the output has ", tiles, " tiles of ",
                       kernel.tile.m(), "x", kernel.tile.n(),
                       ", more than 2^31; split the product");
  const int64_t sms = p.num_sms > 0 ? p.num_sms : properties.sm_count;
  LaunchConfig config;
  config.cluster = choice.cluster();
  config.grid = {
      uint32_t(std::min(tiles, clusters_at_a_time(sms, config.cluster)) * config.cluster)};
  config.block = {kernel.threads};
  config.shared_bytes =
      kernel.shared_bytes + (lists_groups ? uint32_t(p.groups * sizeof(uint32_t)) : 0);
  config.overlaps = true;
  device.launch(kernel.function, kernel.name, config, buffers, params);
}

}  // namespace torchext
