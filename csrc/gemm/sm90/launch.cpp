// Launches the Hopper GEMM: chooses a kernel (select.h), describes the operands to TMA and sizes
// the grid.
#include <algorithm>

#include "../../runtime/memory_rate.h"
#include "../persistent.h"
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
                    int64_t k_blocks, int64_t k_block_stride, uint32_t box_rows) {
  // With a single K block there is no stride, but a map needs one.
  const int64_t stride = k_blocks > 1 ? k_block_stride : round_up(rows, 4);
  return device.encode({name,
                        Element::f32,
                        2,
                        data,
                        {uint64_t(rows), uint64_t(k_blocks)},
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
       {uint64_t(out_columns(p)), uint64_t(p.m), groups ? uint64_t(p.groups) : 1},
       {p.out_stride * bytes, (groups ? p.out_group_stride : p.out_stride) * bytes},
       {uint32_t(kSwizzleBytes / bytes), kStoreRows, 1},
       Swizzle::b128});
}

void describe_operands(Device& device, const GemmProblem& p, const Choice& choice,
                       GemmParams& params) {
  const TileShape& tile = choice.kernel->tile;
  const bool swapped = tile.swapped;
  const int64_t k_blocks = ceil_div(p.k, kTileK);
  const int64_t b_rows = p.n * (p.grouping == Grouping::kAlongK ? 1 : p.groups);
  const uint32_t row_box = choice.multicast ? tile.rows / 2 : tile.rows;
  TensorMap& a = swapped ? params.columns : params.rows;
  TensorMap& b = swapped ? params.rows : params.columns;
  a = operand_map(device, "a", p.a, p.m, p.k, p.a_stride, swapped ? tile.columns : row_box);
  b = operand_map(device, "b", p.b, b_rows, p.k, p.b_stride, swapped ? row_box : tile.n());
  if (p.granularity == Granularity::kRowwise) return;
  if (swapped)
    params.column_scale =
        scale_map(device, "a_scale", p.a_scale, p.m, k_blocks, p.a_scale_k_block, tile.m());
  else if (p.granularity == Granularity::k1D1D)
    params.column_scale =
        scale_map(device, "b_scale", p.b_scale, b_rows, k_blocks, p.b_scale_k_block, tile.n());
}

}  // namespace

void fp8_gemm_nt_sm90(Device& device, const GemmProblem& p, std::initializer_list<Buffer> buffers) {
  const DeviceProperties properties = device.properties();
  const int64_t sms = sms_for(p, properties.sm_count);
  const bool lists_groups = p.grouping == Grouping::kOffsets || p.grouping == Grouping::kCounts;
  TORCHEXT_CHECK_VALUE(!lists_groups || p.groups <= int64_t(kMaxGroups), p.op,
                       ": there must be at most ", kMaxGroups, " groups (got ", p.groups,
                       "); split the product, or give the group of each row");
  const Choice choice = select(p, {properties.sm_count, memory_gigabytes_per_second(device)});
  const GemmKernel& kernel = *choice.kernel;

  GemmParams params = {};
  // With K = 0 there is nothing to load, and no map can describe an empty matrix.
  if (p.k > 0) describe_operands(device, p, choice, params);
  const int64_t bytes = element_size(p.out_dtype);
  params.out_aligned = p.out_stride * bytes % 16 == 0 && p.out_group_stride * bytes % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  params.out_by_tma = params.out_aligned && out_columns(p) * bytes % 16 == 0;
  if (params.out_by_tma && !kernel.tile.swapped) params.out_map = out_map(device, p);
  static_cast<GemmTensors&>(params) = p;
  params.m = uint32_t(p.m);
  params.n = uint32_t(out_columns(p));
  params.k_blocks = uint32_t(ceil_div(p.k, kTileK));
  params.groups = uint32_t(p.groups);
  params.group_rows = uint32_t(p.group_rows);
  params.multicast = choice.multicast;

  const int64_t width = kernel.tile.n() * (choice.multicast ? 2 : 1);
  const int64_t tiles = most_tiles(p, kernel.tile.m(), width);
  check_tile_count(p, tiles, kernel.tile.m(), width);
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
