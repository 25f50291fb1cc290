// The worked example of docs/simulator.md: D[64, 128] = A[64, K] @ B[128, K].T in FP8, by one
// warpgroup. TMA loads the operands, wgmma multiplies, TMA stores the result.
//
// A fence is missing. The numbers are right in every run even so, but the simulator reports the
// missing fence. -DMENDED inserts it.
#include <cuda.h>
#include <ptx/isa/fence.h>
#include <ptx/isa/mbarrier.h>
#include <ptx/isa/memory.h>
#include <ptx/isa/tma.h>
#include <ptx/isa/wgmma.h>

constexpr int kM = 64, kN = 128, kK = 128;  // sizes of one step; kK bytes are one swizzled row

struct alignas(1024) Tile {
  uint8_t a[kM * kK];
  uint8_t b[kN * kK];
  float d[kM * kN];
  ptx::mbarrier full;
};

extern "C" __global__ void __launch_bounds__(128)
    tile_gemm(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
              const __grid_constant__ CUtensorMap d_map, int steps) {
  extern __shared__ Tile tile[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&tile->full, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  float d[64];
  for (int step = 0; step < steps; ++step) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx(&tile->full, sizeof tile->a + sizeof tile->b);
      ptx::cp_async_bulk_tensor_2d_load(tile->a, &a_map, &tile->full, step * kK, 0);
      ptx::cp_async_bulk_tensor_2d_load(tile->b, &b_map, &tile->full, step * kK, 0);
    }
    ptx::mbarrier_wait(&tile->full, step % 2);

    for (float& x : d) ptx::wgmma_pin(x);
    ptx::wgmma_fence();
    for (int k = 0; k < kK / 32; ++k) {
      ptx::wgmma_m64nNk32(ptx::e4m3(), ptx::e4m3(), d,
                          ptx::wgmma_descriptor_k_major_128b(tile->a) + 2 * k,
                          ptx::wgmma_descriptor_k_major_128b(tile->b) + 2 * k, step + k > 0);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    for (float& x : d) ptx::wgmma_pin(x);
    __syncthreads();  // all four warps have read the operands: the slot is free
  }

  for (int j = 0; j < kN / 8; ++j) {
    for (int h = 0; h < 2; ++h) {
      const int row = 16 * warp + lane / 4 + 8 * h, column = 8 * j + 2 * (lane % 4);
      ptx::st_shared_v2_f32(ptx::shared_address(&tile->d[row * kN + column]), d[4 * j + 2 * h],
                            d[4 * j + 2 * h + 1]);
    }
  }
#ifdef MENDED
  ptx::fence_proxy_async_shared();
#endif
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::cp_async_bulk_tensor_2d_store(&d_map, tile->d, 0, 0);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group<0>();
  }
}
