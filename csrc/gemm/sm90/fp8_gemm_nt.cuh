// Hopper FP8 GEMM: out[M, N] = scales x (a[M, K] @ b[N, K].T), FP32 promotion every 128 of K; also
// of groups of rows (m_grouped_*) and along groups of K (k_grouped_*).
//
// Persistent: each CTA, or cluster, walks over tiles of the output (schedule.cuh; shapes: tiles.h).
//
//   producer   one warp keeps a ring of K blocks full (mainloop.cuh): it waits for empty[slot],
//   then
//              has TMA bring the tile's rows and columns and their 1x128 scales, which complete
//              full[slot]. Its warpgroup's other warps only wait for the end; the registers go to
//              the consumers.
//   consumers  one or two warpgroups, 64 or 128 rows of the tile each. For each K block: wait for
//              full[slot]; four wgmma into a block of accumulators; wait for them; arrive at
//              empty[slot] (a warp at a time); promote: total += scale * block in FP32. Promotion
//              runs beside the tensor cores: a warpgroup has the next K block's wgmmas in flight in
//              a second block (small tiles), or the other warpgroup has (large ones).
//              After the last K block (epilogue.cuh) the tile leaves by TMA, whose reading of it is
//              awaited only when the next tile wants the space; from registers where TMA cannot
//              store (unaligned rows, accumulation, the last rows of a group); activated and
//              quantized (activation.cuh); or, swapped, by way of a transposed copy in shared
//              memory.
//
// A cluster is one of two things. A pair that shares its rows (multicast): each CTA loads half of
// them into both, so empty[slot] counts the consumers of both. Or, for swapped tiles, up to eight
// CTAs that split K: each sums a part of it, then they exchange their sums through shared memory,
// always added in the order of ranks. Neither exits before the other is done with its memory.
//
// Ragged M, N, K: TMA fills what lies outside with zeros on loads and leaves it out on stores.
#pragma once

#include "activation.cuh"
#include "epilogue.cuh"
#include "mainloop.cuh"
#include "ptx/isa/grid_dependency.h"
#include "ptx/isa/register_budget.h"

namespace torchext::sm90 {

constexpr uint32_t kSharedLimit = find_architecture(90)->shared_per_block;

// setmaxnreg shares out anew the registers that the CTA was launched with. Each thread starts with
// the SM's 65,536 over the number of threads, rounded down to a multiple of 8. A CTA that asked for
// more than that in all would wait for ever.
template <class L>
constexpr int kConsumerRegisters = L::kWarpgroups == 1 ? 248 : 232;
constexpr int kProducerRegisters = 40;
// For a producer and two consumers; one consumer asks for no more than it starts with.
constexpr int kLaunchRegisters = limits::registers_per_sm / (3 * 128) / 8 * 8;
static_assert(kProducerRegisters + 2 * 232 <= 3 * kLaunchRegisters);

// Readies barriers and the list of groups; from here on, what other kernels wrote may be read.
template <class L>
__device__ __forceinline__ void set_up(const GemmParams& p, Shared<L>& shared) {
  const Place place = Place::here();
  if (threadIdx.x == 0) {
    const uint32_t warps = L::kConsumers / 32;
    for (int slot = 0; slot < L::kStages; ++slot) {
      ptx::mbarrier_init(&shared.full[slot], 1);
      ptx::mbarrier_init(&shared.empty[slot], p.multicast ? 2 * warps : warps);  // one a warp
    }
    ptx::mbarrier_init(&shared.staged_full, place.cluster * warps);
    ptx::mbarrier_init(&shared.staged_empty, place.cluster * warps);
    ptx::fence_mbarrier_init();
    ptx::prefetch_tensormap(&p.rows);
    ptx::prefetch_tensormap(&p.columns);
  }
  ptx::griddepcontrol_wait();
  if (p.grouping == Grouping::kOffsets || p.grouping == Grouping::kCounts)
    Schedule<L>::list_groups(p, shared.tile_end);
  __syncthreads();
  if (place.cluster > 1) {
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
  }
  ptx::griddepcontrol_launch_dependents();
}

template <class L, class A, class B>
__device__ __forceinline__ void fp8_gemm_nt(const GemmParams& p) {
  static_assert(sizeof(Shared<L>) + kMaxGroups * sizeof(uint32_t) <= kSharedLimit,
                "shared memory of a block");
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Shared<L>& shared = *reinterpret_cast<Shared<L>*>(shared_bytes);
  set_up<L>(p, shared);

  const uint32_t warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // uniform: see Schedule
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x < 32) produce<L>(p, shared);
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters<L>>();
    const ThreadCoord at{warpgroup - 1, threadIdx.x / 32 % 4, threadIdx.x % 32};
    RingPosition<L::kStages> ring;
    Schedule<L> schedule(p, shared.tile_end);
    StagedEpilogue<L> staged;
    for (Work work; schedule.next(work);) {
      float total[L::kBlocks][L::kRegisters];
      if constexpr (L::kSwapped) {
        accumulate_tile<L, B, A>(p, shared, work, at, ring, total);
        staged.run(p, shared, work, at, total[0]);
      } else {
        const ColumnTerms<L> terms(p, work, at);
        accumulate_tile<L, A, B>(p, shared, work, at, ring, total);
        finish_tile<L>(p, shared, work, at, terms, total);
        if constexpr (L::kOutput == Output::kStored)
          store_tile<L>(p, shared, work, at, total);
        else
          activate_and_store<L>(p, shared, work, at, total);
      }
    }
    if (at.thread() == 0) ptx::cp_async_bulk_wait_group<0>();
  }
  if (ptx::cluster_nctarank() > 1) {
    __syncwarp();
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
  }
}

// A constant, so that tables are data: `make sass-report` reads them in the library.
template <class L>
constexpr GemmKernel gemm_kernel(void (*function)(GemmParams), const char* name, const char* tile) {
  return {function,
          name,
          L::kThreads,
          sizeof(Shared<L>),
          {tile, L::kRows, L::kColumns, L::kStages, L::kSwapped, L::kGated}};
}

}  // namespace torchext::sm90

// For each tile of a list: a kernel called <prefix>_<tile>, and its entry in table_<name>(). A list
// is applied as TILES(APPLY, prefix, granularity, a, b, output).
#define TORCHEXT_GEMM_LAYOUT(ROWS, COLUMNS, STAGES, SWAPPED, GRANULARITY, OUTPUT)            \
  torchext::sm90::Layout<torchext::Granularity::GRANULARITY, ROWS, COLUMNS, STAGES, SWAPPED, \
                         torchext::sm90::Output::OUTPUT>

#define TORCHEXT_GEMM_KERNEL(TILE, ROWS, COLUMNS, STAGES, SWAPPED, PREFIX, GRANULARITY, A, B, \
                             OUTPUT)                                                          \
  extern "C" __global__ void __launch_bounds__(                                               \
      TORCHEXT_GEMM_LAYOUT(ROWS, COLUMNS, STAGES, SWAPPED, GRANULARITY, OUTPUT)::kThreads, 1) \
      PREFIX##_##TILE(const __grid_constant__ torchext::sm90::GemmParams params) {            \
    using L = TORCHEXT_GEMM_LAYOUT(ROWS, COLUMNS, STAGES, SWAPPED, GRANULARITY, OUTPUT);      \
    torchext::sm90::fp8_gemm_nt<L, ptx::A, ptx::B>(params);                                   \
  }

#define TORCHEXT_GEMM_ENTRY(TILE, ROWS, COLUMNS, STAGES, SWAPPED, PREFIX, GRANULARITY, A, B,    \
                            OUTPUT)                                                             \
  torchext::sm90::gemm_kernel<TORCHEXT_GEMM_LAYOUT(ROWS, COLUMNS, STAGES, SWAPPED, GRANULARITY, \
                                                   OUTPUT)>(TORCHEXT_KERNEL(PREFIX##_##TILE),   \
                                                            #TILE),

#define TORCHEXT_GEMM_KERNELS(NAME, TILES, PREFIX, GRANULARITY, A, B, OUTPUT) \
  TILES(TORCHEXT_GEMM_KERNEL, PREFIX, GRANULARITY, A, B, OUTPUT)              \
  torchext::sm90::KernelTable torchext::sm90::table_##NAME() {                \
    static const GemmKernel kernels[] = {                                     \
        TILES(TORCHEXT_GEMM_ENTRY, PREFIX, GRANULARITY, A, B, OUTPUT)};       \
    return {kernels, sizeof kernels / sizeof *kernels};                       \
  }
