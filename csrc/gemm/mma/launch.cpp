// Launches the GEMM kernels of GPUs other than Hopper: picks the kernel and sizes the grid.
#include <algorithm>

#include "../../runtime/architecture.h"
#include "../persistent.h"
#include "kernels.h"

namespace torchext {
namespace {

using namespace mma;

uint32_t shared_limit(int compute_capability) {
  const Architecture* architecture = architecture_of(compute_capability);
  // All GPUs of the table since Ampere have at least as much as sm_89; so do GPUs without a row.
  return (architecture != nullptr ? architecture : architecture_of(89))->shared_per_block;
}

// Whether the 128 columns of each tile share one scale of b: they may not straddle two blocks of
// b's rows.
bool one_scale_a_tile(const GemmProblem& p) {
  return p.granularity == Granularity::k1D2D &&
         (!is_gated(p.activation) || out_columns(p) % kScaleGroup == 0);
}

GemmKernel select(Path path, const GemmProblem& p, TileSize size) {
  const bool a_e5m2 = p.a_dtype == ScalarType::Float8_e5m2;
  const bool b_e5m2 = p.b_dtype == ScalarType::Float8_e5m2;
  const bool sm89 = path == Path::sm89;
  if (path == Path::plain) return plain_fp8_gemm_nt();
  if (is_wide(p.a_dtype))
    return (path == Path::sm90 ? sm90_fp8_linear : mma80_fp8_linear)(size, p.a_dtype, b_e5m2);
  if (one_scale_a_tile(p))
    return (sm89 ? mma89_fp8_gemm_nt_1d2d : mma80_fp8_gemm_nt_1d2d)(size, a_e5m2, b_e5m2);
  if (p.granularity == Granularity::kRowwise)
    return (sm89 ? mma89_fp8_gemm_nt_rowwise : mma80_fp8_gemm_nt_rowwise)(size, a_e5m2, b_e5m2);
  return (sm89 ? mma89_fp8_gemm_nt_1d1d : mma80_fp8_gemm_nt_1d1d)(size, a_e5m2, b_e5m2);
}

// Large tiles if a group has more rows than a small tile, and if large tiles fill half of the GPU.
TileSize size_for(const GemmProblem& p, int64_t sms) {
  constexpr int kLarge = 128, kSmall = 32;
  const bool grouped = p.grouping != Grouping::kNone && p.grouping != Grouping::kAlongK;
  const int64_t rows = p.expected_rows > 0 ? p.expected_rows
                       : grouped           ? ceil_div(p.m, std::max<int64_t>(p.groups, 1))
                                           : p.m;
  const bool fills = 2 * most_tiles(p, kLarge, kTileN) >= sms;
  return rows > kSmall && fills ? TileSize::large : TileSize::small;
}

}  // namespace

void fp8_gemm_nt_mma(Device& device, Path path, const GemmProblem& p,
                     std::initializer_list<Buffer> buffers) {
  const DeviceProperties properties = device.properties();
  const int64_t sms = sms_for(p, properties.sm_count);
  const bool gated = is_gated(p.activation);
  GemmKernel kernel = select(path, p, size_for(p, sms));
  if (gated &&
      kernel.shared_bytes + kernel.gate_bytes > shared_limit(properties.compute_capability))
    kernel = select(path, p, TileSize::small);

  KernelParams params = {};
  params.problem = p;
  params.width = uint32_t(out_columns(p));
  params.b_scale_shift = p.granularity == Granularity::k1D2D ? 7 : 0;
  static_assert(kScaleGroup == 1 << 7, "b_scale_shift");
  const int64_t four = 4 * (p.activation != Activation::kNone ? 1 : element_size(p.out_dtype));
  params.aligned_rows = p.out_stride % 4 == 0 && p.out_group_stride % 4 == 0 &&
                        reinterpret_cast<uintptr_t>(p.out) % four == 0;
  const int64_t tiles = most_tiles(p, kernel.tile_m, kTileN);
  check_tile_count(p, tiles, kernel.tile_m, kTileN);
  if (tiles == 0) return;  // no groups
  LaunchConfig config;
  config.grid = {uint32_t(std::min(tiles, sms))};
  config.block = {uint32_t(kernel.threads)};
  config.shared_bytes = kernel.shared_bytes + (gated ? kernel.gate_bytes : 0);
  device.launch(kernel.function, kernel.name, config, buffers, params);
}

}  // namespace torchext
