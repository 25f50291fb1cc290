// Step 4, promotion: D[M, N] = (a_scale * A)[M, K] @ (b_scale * B)[N, K].T, FP8 e4m3 with FP32
// scales for 128 elements of K: a_scale for one row (1x128), b_scale for 128 rows (128x128).
//
// A CTA of nine warps computes a tile of D, 128 rows by 128 columns.
//   producer   warp 8: for each K block, waits for empty[slot], then has TMA fill the slot, which
//              completes full[slot].
//   consumers  warps 0 to 7, two warpgroups: for each K block, wait for full[slot]; multiply 64
//              rows of A each, from zero; arrive at empty[slot]; promote: total += scale * block.
// The tensor cores sum at most 128 elements of K, in 13 or 14 bits; FP32 registers sum the rest.
//
// Contract: A, B and D contiguous, at multiples of 16 bytes; K > 0 a multiple of 16 (TMA's row
// pitch), N of 2; a_scale [ceil(K / 128), M], b_scale [ceil(N / 128), ceil(K / 128)], contiguous.
// M, N and K may be ragged: TMA loads zeros for elements outside of A and B.
#include <cuda.h>
#include <ptx/isa/elect.h>
#include <ptx/isa/fence.h>
#include <ptx/isa/mbarrier.h>
#include <ptx/isa/memory.h>
#include <ptx/isa/tma.h>
#include <ptx/isa/wgmma.h>

constexpr int kTileM = 128, kTileN = 128;  // rows and columns of D
constexpr int kTileK = 128;                // elements of a K block: 128 bytes, one swizzled row
constexpr int kStages = 4;                 // slots of the ring
constexpr int kConsumerWarps = 8;          // two warpgroups; the producer is the warp after them
constexpr int kThreads = 32 * (kConsumerWarps + 1);

static_assert(kTileM == 64 * (kConsumerWarps / 4), "each warpgroup multiplies 64 rows");
static_assert(kTileN == 128, "a wgmma has 128 columns: wgmma_m64nNk32 with 64 accumulators");
static_assert(kTileK == 128, "TMA and wgmma agree on 128-byte swizzle; a scale is for 128 of K");
static_assert(kTileN == 128, "one b_scale for each K block of a tile");

struct alignas(1024) Shared {  // the swizzle repeats every 1024 bytes
  uint8_t a[kStages][kTileM * kTileK];
  uint8_t b[kStages][kTileN * kTileK];
  ptx::mbarrier full[kStages];   // the slot's bytes have landed
  ptx::mbarrier empty[kStages];  // every consumer warp has read the slot
};
static_assert(sizeof(Shared) <= 227 * 1024, "shared memory of a CTA");

// block = 64 rows of A times 128 rows of B, over one K block.
__device__ __forceinline__ void multiply(const uint8_t* a_rows, const uint8_t* b_rows,
                                         float (&block)[64]) {
  const uint64_t a = ptx::wgmma_descriptor_k_major_128b(a_rows);
  const uint64_t b = ptx::wgmma_descriptor_k_major_128b(b_rows);
  for (float& x : block) ptx::wgmma_pin(x);
  ptx::wgmma_fence();
  for (int i = 0; i < kTileK / 32; ++i)  // a descriptor counts units of 16 bytes: K = 32 is 2
    ptx::wgmma_m64nNk32(ptx::e4m3(), ptx::e4m3(), block, a + 2 * i, b + 2 * i, i > 0);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  for (float& x : block) ptx::wgmma_pin(x);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    gemm(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
         const float* a_scale, const float* b_scale, float* d, int m, int n, int k) {
  extern __shared__ Shared shared[];
  const int first_row = blockIdx.y * kTileM, first_column = blockIdx.x * kTileN;
  const int k_blocks = (k + kTileK - 1) / kTileK;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // so the compiler knows it is uniform

  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kStages; ++slot) {
      ptx::mbarrier_init(&shared->full[slot], 1);  // the producer's arrival
      ptx::mbarrier_init(&shared->empty[slot], kConsumerWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (warp == kConsumerWarps) {  // ---- producer ----
    if (!ptx::elect_sync()) return;
    for (int k_block = 0; k_block < k_blocks; ++k_block) {
      const int slot = k_block % kStages, phase = k_block / kStages % 2;
      ptx::mbarrier* full = &shared->full[slot];
      ptx::mbarrier_wait(&shared->empty[slot], phase ^ 1);  // the first round does not wait
      ptx::mbarrier_arrive_expect_tx(full, sizeof shared->a[slot] + sizeof shared->b[slot]);
      ptx::cp_async_bulk_tensor_2d_load(shared->a[slot], &a_map, full, k_block * kTileK, first_row);
      ptx::cp_async_bulk_tensor_2d_load(shared->b[slot], &b_map, full, k_block * kTileK,
                                        first_column);
    }
    return;
  }

  // ---- consumers ----
  const int warpgroup = warp / 4, lane = threadIdx.x % 32;
  const int first_of_thread = first_row + 16 * warp + lane / 4;  // this row, and the one 8 below
  float total[64] = {};
  for (int k_block = 0; k_block < k_blocks; ++k_block) {
    const int slot = k_block % kStages, phase = k_block / kStages % 2;
    float scale[2] = {0, 0};  // fetched before the wait, which hides the latency
    for (int h = 0; h < 2; ++h)
      if (first_of_thread + 8 * h < m)
        scale[h] = ptx::ld_global_nc_f32(a_scale + size_t(k_block) * m + first_of_thread + 8 * h) *
                   ptx::ld_global_nc_f32(b_scale + blockIdx.x * k_blocks + k_block);

    ptx::mbarrier_wait(&shared->full[slot], phase);
    float block[64];
    multiply(shared->a[slot] + warpgroup * 64 * kTileK, shared->b[slot], block);
    __syncwarp();  // all lanes have waited for the product
    if (lane == 0) ptx::mbarrier_arrive(&shared->empty[slot]);
    for (int i = 0; i < 64; ++i) total[i] = __fmaf_rn(scale[i / 2 % 2], block[i], total[i]);
  }

  for (int j = 0; j < kTileN / 8; ++j) {
    for (int h = 0; h < 2; ++h) {
      const int row = first_of_thread + 8 * h;
      const int column = first_column + 8 * j + 2 * (lane % 4);
      if (row < m && column < n)
        *reinterpret_cast<float2*>(d + size_t(row) * n + column) = {total[4 * j + 2 * h],
                                                                    total[4 * j + 2 * h + 1]};
    }
  }
}
