// Step 1, tensor cores: D[M, N] = A[M, K] @ B[N, K].T, FP8 e4m3 in, FP32 accumulation and output.
//
// A CTA of 256 threads computes a tile of D, 128 rows by 128 columns. For each K block of 128:
//   copy      all threads copy 128 rows of A and of B from global to shared memory.
//   multiply  each of two warpgroups: 64 rows of A by all 128 rows of B; four wgmma of K = 32.
// The sums stay in the accumulators, 64 registers of each thread, until after the last K block.
//
// Contract: A, B and D contiguous, A and B at multiples of 16 bytes; K > 0 a multiple of 16, N of 2.
// M, N and K may be ragged: elements outside of A and B count as zero; nothing is stored outside
// of D.
#include <ptx/isa/fence.h>
#include <ptx/isa/memory.h>
#include <ptx/isa/wgmma.h>

constexpr int kTileM = 128, kTileN = 128;  // rows and columns of D
constexpr int kTileK = 128;                // elements of a K block: 128 bytes, one swizzled row
constexpr int kThreads = 256;              // two warpgroups

static_assert(kTileM == 64 * (kThreads / 128), "each warpgroup multiplies 64 rows");
static_assert(kTileN == 128, "a wgmma has 128 columns: wgmma_m64nNk32 with 64 accumulators");
static_assert(kTileK == 128, "the swizzle and the wgmma descriptor are those of 128-byte rows");

struct alignas(1024) Shared {  // the swizzle repeats every 1024 bytes
  uint8_t a[kTileM * kTileK];
  uint8_t b[kTileN * kTileK];
};

// Copies 128 rows and 128 bytes of K, from (first_row, first_k) on. A row has 8 chunks of 16 bytes;
// chunk c of row r goes to place c ^ (r % 8), where wgmma expects it under 128-byte swizzle. So a
// column of chunks lies in different banks.
__device__ __forceinline__ void copy_tile(uint8_t* tile, const uint8_t* matrix, int rows, int k,
                                          int first_row, int first_k) {
  for (int i = threadIdx.x; i < 128 * 8; i += kThreads) {
    const int r = i / 8, c = i % 8;
    const int row = first_row + r, column = first_k + 16 * c;
    uint4 chunk = {0, 0, 0, 0};
    if (row < rows && column < k)
      chunk = *reinterpret_cast<const uint4*>(matrix + size_t(row) * k + column);
    ptx::st_shared_v4_u32(ptx::shared_address(tile) + r * kTileK + 16 * (c ^ r % 8), chunk);
  }
}

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
    gemm(const uint8_t* a, const uint8_t* b, float* d, int m, int n, int k) {
  extern __shared__ Shared shared[];
  const int first_row = blockIdx.y * kTileM, first_column = blockIdx.x * kTileN;
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;

  float sum[64];
  for (int first_k = 0; first_k < k; first_k += kTileK) {
    copy_tile(shared->a, a, m, k, first_row, first_k);
    copy_tile(shared->b, b, n, k, first_column, first_k);
    ptx::fence_proxy_async_shared();  // wgmma reads through the async proxy
    __syncthreads();                  // the tiles are complete
    multiply(shared->a + warpgroup * 64 * kTileK, shared->b, first_k > 0, sum);
    __syncthreads();  // both warpgroups have read the tiles: the next copy may overwrite them
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
