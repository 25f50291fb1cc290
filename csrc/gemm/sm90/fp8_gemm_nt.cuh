// Hopper FP8 GEMM: out[M, N] = scales x (a[M, K] @ b[N, K].T), with FP32 promotion every 128 of K.
// Also M-grouped GEMMs (m_grouped_*) and GEMMs grouped along K (k_grouped_*).
//
// Contract: a kernel is fp8_gemm_nt<Layout, A, B>, launched with GemmParams (params.h),
// Layout::kThreads threads and sizeof(Shared) bytes of shared memory, plus four bytes for each
// listed group. The static asserts of Layout (layout.cuh) say which tiles are legal; those below
// check registers and shared memory.
//
// Persistent: each CTA, or each cluster of CTAs, walks over tiles of the output (schedule.cuh; the
// tiles' shapes are in tiles.h). A ring of slots in shared memory holds K blocks (128 of K) of the
// tile's operands; see ../../device/sm90/ring.cuh for the two mbarriers of a slot.
//
//   producer    One warp (mainloop.cuh). For each K block: wait for empty[slot]; have TMA load the
//               tile's rows, columns and columns' scales; their bytes complete full[slot]. (Where
//               TMA cannot read the scales, the warp's lanes copy them.) The other
//               three warps of its warpgroup do nothing: they are there because registers move
//               between whole warpgroups, from this one to the consumers.
//   consumers   One or two warpgroups, each with 64 or 128 rows of the tile. For each K block:
//                 wait for full[slot];
//                 multiply: four wgmma into a block of accumulators; wait for them;
//                 release: one lane of each warp arrives at empty[slot];
//                 promote: total += scales * block, in FP32.
//               Promotion overlaps with tensor-core work: in small tiles the same warpgroup has the
//               next K block's wgmmas in flight in a second block of accumulators; in large tiles
//               the other warpgroup has its own in flight.
//   epilogue    The consumers, after a tile's last K block (epilogue.cuh). They store the tile
//               - by TMA, which also adds to an FP32 output; they wait for its read of shared memory
//                 before they reuse the space;
//               - from registers, where TMA cannot store: unaligned rows, accumulation into 16-bit
//                 outputs, the last rows of a group;
//               - by TMA, after an activation and quantization (activation.cuh);
//               - through a transposed copy in shared memory, if the tile is swapped.
//
// Clusters have two uses. With multicast, a pair of CTAs shares its rows: each loads half of them
// into both, so that empty[slot] counts the consumers of both. Swapped tiles can split K over up to
// eight CTAs: each sums its part of K, then they exchange the sums through shared memory and add
// them in the order of ranks. A CTA of a cluster exits only after the others are done with its
// memory.
//
// M, N and K may be any size: outside the matrices, TMA loads zeros and stores nothing.
#pragma once

#include <type_traits>

#include "activation.cuh"
#include "epilogue.cuh"
#include "mainloop.cuh"
#include "ptx/isa/grid_dependency.h"
#include "ptx/isa/register_budget.h"

namespace torchext::sm90 {

constexpr uint32_t kSharedLimit = find_architecture(90)->shared_per_block;

// setmaxnreg redistributes the registers that the CTA was launched with: for each thread the SM's
// registers / threads, rounded down to a multiple of 8. A CTA whose warpgroups together ask for
// more would wait forever.
template <class L>
constexpr int kConsumerRegisters = L::kWarpgroups == 1 ? 248 : 232;
constexpr int kProducerRegisters = 40;
// With two consumer warpgroups; a single one asks for no more than it was launched with.
constexpr int kLaunchRegisters = limits::registers_per_sm / (3 * 128) / 8 * 8;
static_assert(kProducerRegisters + 2 * 232 <= 3 * kLaunchRegisters);

// Initializes the barriers and lists the groups. Memory that earlier kernels wrote may be read only
// after griddepcontrol_wait().
template <class L>
__device__ __forceinline__ void set_up(const GemmParams& p, Shared<L>& shared) {
  const Place place = Place::here();
  if (threadIdx.x == 0) {
    const uint32_t warps = L::kConsumers / 32;
    for (int slot = 0; slot < L::kStages; ++slot) {
      ptx::mbarrier_init(&shared.full[slot], 1);
      ptx::mbarrier_init(&shared.empty[slot],
                         p.multicast ? 2 * warps : warps);  // one arrival per warp
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
    ptx::barrier_cluster_arrive_relaxed();  // fence_mbarrier_init() has released the barriers
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
    const EmptySlots empty(p, shared.empty, at);
    RingPosition<L::kStages> ring;
    Schedule<L> schedule(p, shared.tile_end);
    StagedEpilogue<L> staged;
    for (Work work; schedule.next(work);) {
      float total[L::kBlocks][L::kRegisters];
      if constexpr (L::kSwapped) {
        accumulate_tile<L, B, A>(p, shared, work, at, empty, ring, total);
        staged.run(p, shared, work, at, total[0]);
      } else {
        share_column_terms<L>(p, shared, work, at);
        accumulate_tile<L, A, B>(p, shared, work, at, empty, ring, total);
        finish_tile<L>(p, shared, work, at, total);
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
    ptx::barrier_cluster_arrive_relaxed();  // this thread has finished with the others' memory
    ptx::barrier_cluster_wait();
  }
}

// The row is a constant, so that the table is data, which tools/sass_report.py reads in the
// library.
template <class L, class A, class B>
constexpr GemmKernel gemm_kernel(void (*function)(GemmParams), const char* name, const char* tile) {
  return {function,
          name,
          L::kThreads,
          sizeof(Shared<L>),
          {tile, L::kRows, L::kColumns, L::kStages, L::kSwapped, L::kGated},
          L::kGranularity,
          std::is_same_v<A, ptx::e5m2>,
          std::is_same_v<B, ptx::e5m2>,
          L::kOutput};
}

}  // namespace torchext::sm90

#define TORCHEXT_GEMM_LAYOUT(ROWS, COLUMNS, STAGES, SWAPPED, GRANULARITY, OUTPUT)            \
  torchext::sm90::Layout<torchext::Granularity::GRANULARITY, ROWS, COLUMNS, STAGES, SWAPPED, \
                         torchext::sm90::Output::OUTPUT>

// A kernel called <prefix>_<tile>.
#define TORCHEXT_GEMM_KERNEL(TILE, ROWS, COLUMNS, STAGES, SWAPPED, PREFIX, GRANULARITY, A, B, \
                             OUTPUT)                                                          \
  extern "C" __global__ void __launch_bounds__(                                               \
      TORCHEXT_GEMM_LAYOUT(ROWS, COLUMNS, STAGES, SWAPPED, GRANULARITY, OUTPUT)::kThreads, 1) \
      PREFIX##_##TILE(const __grid_constant__ torchext::sm90::GemmParams params) {            \
    using L = TORCHEXT_GEMM_LAYOUT(ROWS, COLUMNS, STAGES, SWAPPED, GRANULARITY, OUTPUT);      \
    torchext::sm90::fp8_gemm_nt<L, ptx::A, ptx::B>(params);                                   \
  }

// Its row of the table.
#define TORCHEXT_GEMM_ROW(TILE, ROWS, COLUMNS, STAGES, SWAPPED, PREFIX, GRANULARITY, A, B, OUTPUT) \
  torchext::sm90::gemm_kernel<                                                                     \
      TORCHEXT_GEMM_LAYOUT(ROWS, COLUMNS, STAGES, SWAPPED, GRANULARITY, OUTPUT), ptx::A, ptx::B>(  \
      TORCHEXT_KERNEL(PREFIX##_##TILE), #TILE),

// The contents of a .cu file: its kernels, and their table kernels_<granularity>_<kind>.
#define TORCHEXT_GEMM_KERNELS(G, GRANULARITY, KIND)                                     \
  TORCHEXT_SM90_##KIND(                                                                 \
      TORCHEXT_GEMM_KERNEL, G,                                                          \
      GRANULARITY) static constexpr torchext::sm90::GemmKernel kRows_##G##_##KIND[] = { \
      TORCHEXT_SM90_##KIND(TORCHEXT_GEMM_ROW, G, GRANULARITY)};                         \
  const torchext::sm90::KernelTable torchext::sm90::kernels_##G##_##KIND = {            \
      kRows_##G##_##KIND, sizeof kRows_##G##_##KIND / sizeof *kRows_##G##_##KIND};
