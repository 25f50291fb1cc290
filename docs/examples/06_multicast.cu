// Step 6, multicast: D = (a_scale * A)[M, K] @ (b_scale * B)[N, K].T, FP8 e4m3 with FP32 scales,
// each for 128 elements of K: a_scale for one row (1x128), b_scale for 128 rows (128x128).
//
// Two CTAs are a cluster and compute two tiles of D side by side, 128 rows by 128 columns each: the
// same rows of A, neighboring rows of B. Cluster i computes pairs of tiles i, i + clusters, ...
//   producer   warp 8: for each K block, waits until the consumers of both CTAs have left the slot,
//              then has TMA bring 64 of the 128 rows of A into both CTAs, and B into its own. The
//              other 64 rows come from the other CTA; each full[slot] counts its own CTA's bytes.
//   consumers  warps 0 to 7, two warpgroups: for each K block, wait for full[slot], multiply 64
//              rows of A each, arrive at empty[slot] of both CTAs, promote. After the last one,
//              write the tile to shared memory, from where TMA stores it.
//
// Contract: A, B and D contiguous, at multiples of 16 bytes; K > 0 a multiple of 16 and N of 4
// (TMA's row pitch); a_scale [ceil(K / 128), M], b_scale [ceil(N / 128), ceil(K / 128)], contiguous.
// M, N and K may be ragged: TMA loads zeros for elements outside, and stores none outside. The
// number of CTAs is even.
#include <cuda.h>
#include <ptx/isa/barrier.h>
#include <ptx/isa/cluster.h>
#include <ptx/isa/elect.h>
#include <ptx/isa/fence.h>
#include <ptx/isa/mbarrier.h>
#include <ptx/isa/memory.h>
#include <ptx/isa/tma.h>
#include <ptx/isa/wgmma.h>

constexpr int kTileM = 128, kTileN = 128;  // rows and columns of D
constexpr int kTileK = 128;                // elements of a K block: 128 bytes, one swizzled row
constexpr int kStages = 4;                 // slots of the ring
constexpr int kCluster = 2;                // CTAs that share rows of A
constexpr int kConsumerWarps = 8;          // two warpgroups; the producer is the warp after them
constexpr int kThreads = 32 * (kConsumerWarps + 1);
constexpr int kBoxColumns = 32;  // a TMA store takes 64 rows of 32 floats, one swizzled row each

static_assert(kTileM == 64 * (kConsumerWarps / 4), "each warpgroup multiplies 64 rows");
static_assert(kTileN == 128, "a wgmma has 128 columns, and one b_scale for each K block");
static_assert(kTileK == 128, "TMA and wgmma agree on 128-byte swizzle; a scale is for 128 of K");

struct alignas(1024) Shared {  // the swizzle repeats every 1024 bytes
  uint8_t a[kStages][kTileM * kTileK];
  uint8_t b[kStages][kTileN * kTileK];
  float out[2][kTileN / kBoxColumns][64 * kBoxColumns];  // boxes of D, of each warpgroup
  ptx::mbarrier full[kStages];                           // the slot's bytes have landed
  ptx::mbarrier empty[kStages];                          // consumers of both CTAs have read it
};
static_assert(sizeof(Shared) <= 227 * 1024, "shared memory of a CTA");
static_assert(kTileM % kCluster == 0 && kTileM / kCluster % 8 == 0,
              "each CTA loads whole swizzle atoms, 8 rows");

// A role's position in the ring. The phase flips after each round through all slots.
struct RingPosition {
  int slot = 0, phase = 0;
  __device__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      phase ^= 1;
    }
  }
};

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

extern "C" __global__ void __cluster_dims__(kCluster) __launch_bounds__(kThreads)
    gemm(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
         const __grid_constant__ CUtensorMap d_map, const float* a_scale, const float* b_scale,
         int m, int n, int k) {
  extern __shared__ Shared shared[];
  const int k_blocks = (k + kTileK - 1) / kTileK, n_tiles = (n + kTileN - 1) / kTileN;
  const int n_pairs = (n_tiles + kCluster - 1) / kCluster;
  const int pairs = (m + kTileM - 1) / kTileM * n_pairs;
  const int rank = ptx::cluster_ctarank(), clusters = gridDim.x / kCluster;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // so the compiler knows it is uniform

  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kStages; ++slot) {
      ptx::mbarrier_init(&shared->full[slot], 1);  // the producer's arrival
      ptx::mbarrier_init(&shared->empty[slot], kCluster * kConsumerWarps);
    }
    ptx::fence_mbarrier_init();
  }
  ptx::barrier_cluster_arrive_relaxed();  // both CTAs' barriers are initialized
  ptx::barrier_cluster_wait();
  RingPosition ring;

  if (warp == kConsumerWarps) {  // ---- producer ----
    if (ptx::elect_sync()) {
      constexpr int kShare = kTileM / kCluster;  // rows of A from this CTA
      for (int pair = blockIdx.x / kCluster; pair < pairs; pair += clusters) {
        const int first_row = pair / n_pairs * kTileM + rank * kShare;
        const int first_column = (pair % n_pairs * kCluster + rank) * kTileN;
        for (int k_block = 0; k_block < k_blocks; ++k_block, ring.advance()) {
          ptx::mbarrier* full = &shared->full[ring.slot];
          uint8_t *a = shared->a[ring.slot] + rank * kShare * kTileK, *b = shared->b[ring.slot];
          ptx::mbarrier_wait(&shared->empty[ring.slot], ring.phase ^ 1);
          ptx::mbarrier_arrive_expect_tx(full, sizeof shared->a[0] + sizeof shared->b[0]);
          ptx::cp_async_bulk_tensor_2d_load_multicast(a, &a_map, full, k_block * kTileK, first_row,
                                                      0b11);
          ptx::cp_async_bulk_tensor_2d_load(b, &b_map, full, k_block * kTileK, first_column);
        }
      }
    }
    __syncwarp();
  } else {  // ---- consumers ----
    const int warpgroup = warp / 4, lane = threadIdx.x % 32;
    const int row_of_thread = 16 * (warp % 4) + lane / 4;  // of the warpgroup's 64, and row + 8
    const uint32_t empty = ptx::mapa(ptx::shared_address(&shared->empty[0]), lane % kCluster);
    for (int pair = blockIdx.x / kCluster; pair < pairs; pair += clusters) {
      const int first_row = pair / n_pairs * kTileM + 64 * warpgroup;
      const int n_tile = pair % n_pairs * kCluster + rank;  // with an odd number of tiles, the
      const int first_column = n_tile * kTileN;             // last pair's second is outside of D
      float total[64] = {};
      for (int k_block = 0; k_block < k_blocks; ++k_block, ring.advance()) {
        float scale[2] = {0, 0};  // fetched before the wait, which hides the latency
        for (int h = 0; h < 2; ++h) {
          const int row = first_row + row_of_thread + 8 * h;
          if (row < m && n_tile < n_tiles)
            scale[h] = ptx::ld_global_nc_f32(a_scale + size_t(k_block) * m + row) *
                       ptx::ld_global_nc_f32(b_scale + n_tile * k_blocks + k_block);
        }
        ptx::mbarrier_wait(&shared->full[ring.slot], ring.phase);
        float block[64];
        multiply(shared->a[ring.slot] + warpgroup * 64 * kTileK, shared->b[ring.slot], block);
        __syncwarp();  // all lanes have waited for the product
        if (lane < kCluster) ptx::mbarrier_arrive_done_reading(empty + ring.slot * 8);
        for (int i = 0; i < 64; ++i) total[i] = __fmaf_rn(scale[i / 2 % 2], block[i], total[i]);
      }

      // The leader knows when TMA has read the last tile's boxes; the barrier tells the others.
      const bool leader = threadIdx.x % 128 == 0;
      if (leader) ptx::cp_async_bulk_wait_group_read<0>();
      ptx::bar_sync(1 + warpgroup, 128);
      for (int j = 0; j < kTileN / 8; ++j) {
        for (int h = 0; h < 2; ++h) {  // chunk c of row r of a box lies at c ^ (r % 8)
          const int row = row_of_thread + 8 * h, chunk = (2 * (j % 4) + lane % 4 / 2) ^ (row % 8);
          float* box = shared->out[warpgroup][j / 4];
          ptx::st_shared_v2_f32(
              ptx::shared_address(box + row * kBoxColumns + chunk * 4 + lane % 2 * 2),
              total[4 * j + 2 * h], total[4 * j + 2 * h + 1]);
        }
      }
      ptx::fence_proxy_async_shared();  // TMA reads through the async proxy
      ptx::bar_sync(1 + warpgroup, 128);
      if (leader) {
        for (int box = 0; box < kTileN / kBoxColumns; ++box)
          ptx::cp_async_bulk_tensor_2d_store(&d_map, shared->out[warpgroup][box],
                                             first_column + box * kBoxColumns, first_row);
        ptx::cp_async_bulk_commit_group();
      }
    }
    if (threadIdx.x % 128 == 0) ptx::cp_async_bulk_wait_group<0>();  // TMA reads the CTA's memory
  }
  ptx::barrier_cluster_arrive_relaxed();  // the other CTA is done with this one's memory
  ptx::barrier_cluster_wait();
}
