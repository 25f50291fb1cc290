// Step 2, TMA and mbarriers: D[M, N] = A[M, K] @ B[N, K].T, FP8 e4m3 in, FP32 out.
//
// A CTA of 256 threads computes a tile of D, 128 rows by 128 columns.
//   thread 0    starts TMA copies that fill a ring of four slots, one K block of A and B in each;
//               the bytes that land complete full[slot], an mbarrier.
//   warpgroups  both, for each K block: wait for full[slot], then four wgmma on 64 rows of A each.
// Once both warpgroups have read a slot, it is filled again with the K block four further on.
//
// Contract: A, B and D contiguous, at multiples of 16 bytes; K > 0 a multiple of 16 (TMA's row
// pitch), N of 2. M, N and K may be ragged: TMA loads zeros for elements outside of A and B.
#include <cuda.h>
#include <ptx/isa/fence.h>
#include <ptx/isa/mbarrier.h>
#include <ptx/isa/tma.h>
#include <ptx/isa/wgmma.h>

constexpr int kTileM = 128, kTileN = 128;  // rows and columns of D
constexpr int kTileK = 128;                // elements of a K block: 128 bytes, one swizzled row
constexpr int kStages = 4;                 // slots of the ring
constexpr int kThreads = 256;              // two warpgroups

static_assert(kTileM == 64 * (kThreads / 128), "each warpgroup multiplies 64 rows");
static_assert(kTileN == 128, "a wgmma has 128 columns: wgmma_m64nNk32 with 64 accumulators");
static_assert(kTileK == 128, "TMA and wgmma agree on 128-byte swizzle");

struct alignas(1024) Shared {  // the swizzle repeats every 1024 bytes
  uint8_t a[kStages][kTileM * kTileK];
  uint8_t b[kStages][kTileN * kTileK];
  ptx::mbarrier full[kStages];
};
static_assert(sizeof(Shared) <= 227 * 1024, "shared memory of a CTA");

// sum (+)= 64 rows of A times 128 rows of B, over one K block.
__device__ __forceinline__ void multiply(const uint8_t* a_rows, const uint8_t* b_rows,
                                         bool accumulate, float (&sum)[64]) {
  const uint64_t a = ptx::wgmma_descriptor_k_major_128b(a_rows);
  const uint64_t b = ptx::wgmma_descriptor_k_major_128b(b_rows);
  for (float& x : sum) ptx::wgmma_pin(x);
  ptx::wgmma_fence();
  for (int i = 0; i < kTileK / 32; ++i)  // a descriptor counts units of 16 bytes: K = 32 is 2
    ptx::wgmma_m64nNk32(ptx::e4m3(), ptx::e4m3(), sum, a + 2 * i, b + 2 * i, accumulate || i > 0);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  for (float& x : sum) ptx::wgmma_pin(x);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    gemm(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
         float* d, int m, int n, int k) {
  extern __shared__ Shared shared[];
  const int first_row = blockIdx.y * kTileM, first_column = blockIdx.x * kTileN;
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int k_blocks = (k + kTileK - 1) / kTileK;

  const auto load = [&](int k_block) {  // thread 0 only
    const int slot = k_block % kStages;
    ptx::mbarrier* full = &shared->full[slot];
    ptx::mbarrier_arrive_expect_tx(full, sizeof shared->a[slot] + sizeof shared->b[slot]);
    ptx::cp_async_bulk_tensor_2d_load(shared->a[slot], &a_map, full, k_block * kTileK, first_row);
    ptx::cp_async_bulk_tensor_2d_load(shared->b[slot], &b_map, full, k_block * kTileK,
                                      first_column);
  };

  if (threadIdx.x == 0) {
    for (ptx::mbarrier& full : shared->full) ptx::mbarrier_init(&full, 1);  // thread 0's arrival
    ptx::fence_mbarrier_init();
    for (int k_block = 0; k_block < min(kStages, k_blocks); ++k_block) load(k_block);
  }
  __syncthreads();  // the barriers are initialized

  float sum[64];
  for (int k_block = 0; k_block < k_blocks; ++k_block) {
    const int slot = k_block % kStages, phase = k_block / kStages % 2;
    ptx::mbarrier_wait(&shared->full[slot], phase);
    multiply(shared->a[slot] + warpgroup * 64 * kTileK, shared->b[slot], k_block > 0, sum);
    __syncthreads();  // both warpgroups have read the slot
    if (threadIdx.x == 0 && k_block + kStages < k_blocks) load(k_block + kStages);
  }

  for (int j = 0; j < kTileN / 8; ++j) {
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + 64 * warpgroup + 16 * warp + lane / 4 + 8 * h;
      const int column = first_column + 8 * j + 2 * (lane % 4);
      if (row < m && column < n)
        *reinterpret_cast<float2*>(d + size_t(row) * n + column) = {sum[4 * j + 2 * h],
                                                                    sum[4 * j + 2 * h + 1]};
    }
  }
}
