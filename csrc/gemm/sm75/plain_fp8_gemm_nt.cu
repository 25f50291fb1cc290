// FP8 GEMM without tensor cores, for GPUs whose tensor cores cannot do it (sm_75). FP8 becomes FP32
// on the way into shared memory; products and sums are FP32 FMAs, promoted every 128 of K with
// their scales. It is written to be simple: any GPU runs it, so that the other kernels can be
// compared with it. `a` may also be wide, without a scale (fp8_linear): BF16 and FP16 become FP32
// exactly.
//
// Contract: launched with KernelParams (../mma/kernels.h), kPlainThreads threads and, for SwiGLU,
// dynamic shared memory for the gate's product. The static assert below ties threads to the tile.
//
// Eight warps share a tile of 32 x 128, and all have the same role. For each step of 32 of K:
//
//   load      After a barrier (all have read the previous step), each thread writes four elements
//             of one row of a and of four rows of b to shared memory, as FP32.
//   multiply  After another barrier (the step is complete), a warp computes four rows; a lane
//             computes columns lane, lane + 32, lane + 64 and lane + 96 of these.
//
// After every 128 of K the sums are promoted. The tile schedule is ../mma/schedule.cuh; the
// epilogue is ../mma/epilogue.cuh.
#include "../mma/epilogue.cuh"

namespace torchext::mma {

constexpr int kPlainM = 32, kPlainThreads = 256;
constexpr int kStepK = 32;                     // columns of K in shared memory at a time
constexpr int kRows = 4, kCols = kTileN / 32;  // of a thread
static_assert(kPlainThreads / 8 == kPlainM, "eight threads load a row of a, four bytes each");

struct Step {
  // K-major operands, transposed: [k][row]; padded, so that no access meets a bank conflict.
  float a[kStepK][kPlainM + 1], b[kStepK][kTileN + 1];
};

// Elements k to k + 3 of a row as FP32; those outside [k_begin, k_end) are zero.
__device__ __forceinline__ void load_four(const uint8_t* row, uint32_t k, uint32_t k_begin,
                                          uint32_t k_end, bool e5m2, float (&values)[4]) {
  uint32_t word = 0;
  if (k >= k_begin && k + 4 <= k_end) {
    word = *reinterpret_cast<const uint32_t*>(row + k);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (k + i >= k_begin && k + i < k_end) word |= uint32_t(row[k + i]) << 8 * i;
  }
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    float pair[2];
    if (e5m2)
      unpack_e5m2(uint16_t(word >> 8 * i), pair);
    else
      unpack_e4m3(uint16_t(word >> 8 * i), pair);
    values[i] = pair[0];
    values[i + 1] = pair[1];
  }
}

// The same for a row of a wide `dtype` that begins at element `row`.
__device__ __forceinline__ void load_four_wide(const void* data, ScalarType dtype, int64_t row,
                                               uint32_t k, uint32_t k_end, float (&values)[4]) {
  with_loader(dtype, [&](auto load) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = k + i < k_end ? load(data, row + k + i) : 0;
  });
}

// total = sum over K blocks of scale * (a block @ b block.T), with the group's b from row b_row on.
__device__ __forceinline__ void accumulate_plain(const KernelParams& params, const Tile& tile,
                                                 const GroupOperand& group, uint32_t b_row,
                                                 uint32_t b_rows, Step& shared,
                                                 float (&total)[kRows][kCols]) {
  const GemmProblem& p = params.problem;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool a_e5m2 = p.a_dtype == ScalarType::Float8_e5m2;
  const bool b_e5m2 = p.b_dtype == ScalarType::Float8_e5m2;
  const bool wide = !a_e5m2 && p.a_dtype != ScalarType::Float8_e4m3fn;
  const int own = threadIdx.x / 8, k_own = threadIdx.x % 8 * 4;
  const uint8_t* a = static_cast<const uint8_t*>(p.a) + (tile.row + own) * p.a_stride;
  const uint8_t* b = group.b + (b_row + own) * p.b_stride;
  const uint32_t a_end = holds(p, tile, tile.row + own) ? tile.k_end : 0;

#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (float& value : total[i]) value = 0;
  for (uint32_t block = tile.k_begin / kTileK; block * kTileK < tile.k_end; ++block) {
    float sum[kRows][kCols] = {};
#pragma unroll 1
    for (int step = 0; step < kTileK; step += kStepK) {
      const uint32_t k = block * kTileK + step + k_own;
      float values[4];
      if (wide)
        load_four_wide(p.a, p.a_dtype, (tile.row + own) * p.a_stride, k, a_end, values);
      else
        load_four(a, k, tile.k_begin, a_end, a_e5m2, values);
      __syncthreads();  // the last step has been read
#pragma unroll
      for (int i = 0; i < 4; ++i) shared.a[k_own + i][own] = values[i];
#pragma unroll 1
      for (int row = own; row < kTileN; row += kPlainM) {
        load_four(b + (row - own) * p.b_stride, k, tile.k_begin,
                  uint32_t(row) < b_rows ? tile.k_end : 0, b_e5m2, values);
#pragma unroll
        for (int i = 0; i < 4; ++i) shared.b[k_own + i][row] = values[i];
      }
      __syncthreads();
#pragma unroll 4
      for (int k_step = 0; k_step < kStepK; ++k_step) {
        float a_values[kRows], b_values[kCols];
#pragma unroll
        for (int i = 0; i < kRows; ++i) a_values[i] = shared.a[k_step][warp * kRows + i];
#pragma unroll
        for (int j = 0; j < kCols; ++j) b_values[j] = shared.b[k_step][lane + 32 * j];
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int j = 0; j < kCols; ++j) sum[i][j] = fmaf(a_values[i], b_values[j], sum[i][j]);
      }
    }
    const bool scaled = p.granularity != Granularity::kRowwise;
    float b_scale[kCols];
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const uint32_t c = lane + 32 * j;
      b_scale[j] = 1;
      if (scaled && c < b_rows)
        b_scale[j] = ptx::ld_global_nc_f32(group.scale +
                                           ((b_row + c) >> params.b_scale_shift) * p.b_scale_row +
                                           block * p.b_scale_k_block);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint32_t row = tile.row + warp * kRows + i;
      float a_scale = 1;
      if (scaled && row < tile.rows_end && !wide)
        a_scale =
            ptx::ld_global_nc_f32(p.a_scale + row * p.a_scale_row + block * p.a_scale_k_block);
#pragma unroll
      for (int j = 0; j < kCols; ++j)
        total[i][j] = fmaf(a_scale * b_scale[j], sum[i][j], total[i][j]);
    }
  }
}

}  // namespace torchext::mma

extern "C" __global__ void __launch_bounds__(torchext::mma::kPlainThreads)
    plain_fp8_gemm_nt_32x128x128(const __grid_constant__ torchext::mma::KernelParams params) {
  using namespace torchext;
  using namespace torchext::mma;
  __shared__ Step shared;
  __shared__ __align__(16) float product[kPlainM * kTilePitch];
  extern __shared__ __align__(16) float gate[];  // SwiGLU: the gate's product
  const GemmProblem& p = params.problem;
  Schedule<kPlainM> schedule(p, params.width);
  Tile tile;
  while (schedule.next(tile)) {
    const GroupOperand group(p, tile.group);
    const uint32_t columns = min(params.width - tile.column, uint32_t(kTileN));
    const bool gated = p.activation == Activation::kSwiGLU;
#pragma unroll 1
    for (int pass = gated ? 0 : 1; pass < 2; ++pass) {  // SwiGLU: the gate, then what it gates
      float total[kRows][kCols];
      accumulate_plain(params, tile, group, tile.column + (gated && pass == 1 ? params.width : 0),
                       columns, shared, total);
      __syncthreads();  // the last tile has been finished
      float* rows = (pass == 0 ? gate : product) + threadIdx.x / 32 * kRows * kTilePitch;
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kCols; ++j)
          rows[i * kTilePitch + threadIdx.x % 32 + 32 * j] = total[i][j];
    }
    __syncthreads();
    finish_tile<kPlainM>(params, tile, group, product, gate);
  }
}

torchext::mma::GemmKernel torchext::mma::plain_fp8_gemm_nt() {
  return {TORCHEXT_KERNEL(plain_fp8_gemm_nt_32x128x128), kPlainM, kPlainThreads, 0,
          kPlainM * kTilePitch * sizeof(float)};
}
