// Launches the GEMM kernels of GPUs other than Hopper: picks the kernel and sizes the grid.
#include <algorithm>

#include "../../runtime/architecture.h"
#include "../../runtime/check.h"
#include "kernels.h"

namespace torchext {
namespace {

using namespace mma;

uint32_t shared_limit(int compute_capability) {
  const Architecture* architecture = architecture_of(compute_capability);
  // Every GPU of the table since Ampere has what sm_89 has, so one without a row is trusted with it.
  return (architecture != nullptr ? architecture : architecture_of(89))->shared_per_block;
}

// One scale of b serves a tile's 128 columns, unless they straddle blocks of b's rows.
bool one_scale_a_tile(const GemmProblem& p) {
  const bool gated = p.activation == Activation::kSwiGLU;
  return p.granularity == Granularity::k1D2D && (!gated || p.n / 2 % kGroup == 0);
}

GemmKernel select(Path path, const GemmProblem& p, TileSize size) {
  const bool a_e5m2 = p.a_dtype == ScalarType::Float8_e5m2;
  const bool b_e5m2 = p.b_dtype == ScalarType::Float8_e5m2;
  const bool sm89 = path == Path::sm89;
  if (path == Path::plain) return plain_fp8_gemm_nt();
  if (one_scale_a_tile(p))
    return (sm89 ? mma89_fp8_gemm_nt_1d2d : mma80_fp8_gemm_nt_1d2d)(size, a_e5m2, b_e5m2);
  if (p.granularity == Granularity::kRowwise)
    return (sm89 ? mma89_fp8_gemm_nt_rowwise : mma80_fp8_gemm_nt_rowwise)(size, a_e5m2, b_e5m2);
  return (sm89 ? mma89_fp8_gemm_nt_1d1d : mma80_fp8_gemm_nt_1d1d)(size, a_e5m2, b_e5m2);
}

// At most so many tiles; how many there are, only the device knows.
int64_t most_tiles(const GemmProblem& p, int64_t width, int tile_m) {
  int64_t m_tiles = ceil_div(p.m, tile_m);
  if (p.grouping == Grouping::kOffsets) m_tiles = std::min(m_tiles + p.groups, p.m);
  if (p.grouping == Grouping::kCounts) m_tiles = p.groups * ceil_div(p.group_rows, tile_m);
  if (p.grouping == Grouping::kAlongK) m_tiles *= p.groups;
  return m_tiles * ceil_div(width, kTileN);
}

// Large tiles where a group has more rows than a small tile, and where they fill the GPU.
TileSize size_for(const GemmProblem& p, int64_t width, int64_t sms) {
  constexpr int kLarge = 128, kSmall = 32;
  const bool grouped = p.grouping != Grouping::kNone && p.grouping != Grouping::kAlongK;
  const int64_t rows = p.expected_rows > 0 ? p.expected_rows
                       : grouped           ? ceil_div(p.m, std::max<int64_t>(p.groups, 1))
                                           : p.m;
  const bool fills = 2 * most_tiles(p, width, kLarge) >= sms;
  return rows > kSmall && fills ? TileSize::large : TileSize::small;
}

}  // namespace

void fp8_gemm_nt_mma(Device& device, Path path, const GemmProblem& p,
                     std::initializer_list<Buffer> buffers) {
  const DeviceProperties properties = device.properties();
  TORCHEXT_CHECK_VALUE(p.num_sms <= properties.sm_count, p.op, ": num_sms must be at most ",
                       properties.sm_count, ", the SMs of this GPU (got ", p.num_sms, ")");
  const int64_t sms = p.num_sms > 0 ? p.num_sms : properties.sm_count;
  const bool gated = p.activation == Activation::kSwiGLU;
  const int64_t width = gated ? p.n / 2 : p.n;
  GemmKernel kernel = select(path, p, size_for(p, width, sms));
  if (gated &&
      kernel.shared_bytes + kernel.gate_bytes > shared_limit(properties.compute_capability))
    kernel = select(path, p, TileSize::small);

  KernelParams params = {};
  params.problem = p;
  params.width = uint32_t(width);
  params.b_scale_shift = p.granularity == Granularity::k1D2D ? 7 : 0;
  static_assert(kGroup == 1 << 7, "b_scale_shift");
  const int64_t four = 4 * (p.activation != Activation::kNone ? 1 : element_size(p.out_dtype));
  params.aligned_rows = p.out_stride % 4 == 0 && p.out_group_stride % 4 == 0 &&
                        reinterpret_cast<uintptr_t>(p.out) % four == 0;
  const int64_t tiles = most_tiles(p, width, kernel.tile_m);
  TORCHEXT_CHECK_VALUE(tiles < (int64_t(1) << 31), p.op, ": the output has ", tiles, " tiles of ",
                       kernel.tile_m, "x128, more than 2^31; split the product");
  if (tiles == 0) return;  // no groups
  LaunchConfig config;
  config.grid = {uint32_t(std::min(tiles, sms))};
  config.block = {uint32_t(kernel.threads)};
  config.shared_bytes = kernel.shared_bytes + (gated ? kernel.gate_bytes : 0);
  device.launch(kernel.function, kernel.name, config, buffers, params);
}

}  // namespace torchext
