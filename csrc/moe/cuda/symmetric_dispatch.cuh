// Sends the message of each token to the ranks of its experts, through windows that every rank of a
// node maps (NVLink): torch's symmetric memory, or several GPUs in the simulator.
//
// Contract: the same grid on every rank, with all of its CTAs on the GPU at once (at most as many as
// there are SMs); dynamic shared memory of kWarps * kStages * pitch bytes; pitch a multiple of 16;
// epochs count up from 0, and the flags are zero before the first.
//
// A rank's window, for epochs e and sources s:
//   slots    [e % 2][s][capacity][pitch]  messages
//   counts   [e % 2][s]                   how many
//   arrived  [s]   CTAs of rank s that have sent, over all epochs
//   freed    [d]   CTAs of rank d that have taken what this rank has sent, over all epochs
// Half e % 2 is written again in epoch e + 2, once every destination has freed it.
//
// Roles: a warp sends one token at a time: one bulk load of its message, one bulk store for each rank
// that gets it. When a CTA's stores are complete, it releases one flag for each rank, at .sys scope.
// Then each CTA waits for all sources and copies its share of the messages to `out`, in the order of
// (source, row), which no atomic decides.
//
// A rank that does not answer within `timeout` ticks of the GPU's timer ends the kernel everywhere:
// bit r of `missing` says that rank r has not. Nothing is left under way.
#pragma once

#include "../../../ptx/isa/fence.h"
#include "../../../ptx/isa/peer.h"
#include "../../../ptx/isa/tma.h"

namespace torchext::moe::symmetric {

constexpr int kMaxRanks = 8;
constexpr int kWarps = 4, kStages = 2;  // of a CTA; messages that a warp has in shared memory

struct Window {
  uint8_t* slots;
  uint32_t *counts, *arrived, *freed;
};

struct SymmetricDispatch {
  Window windows[kMaxRanks];
  int32_t rank, ranks, capacity, pitch;
  uint32_t epoch;
  const uint8_t* messages;     // [tokens, pitch]
  const int32_t* rows;         // [tokens, ranks]: the row in the destination's slots, or negative
  const int32_t* send_counts;  // [ranks]
  int64_t tokens;
  uint8_t* out;         // [ranks * capacity, pitch]
  int32_t* out_counts;  // [ranks], by source
  uint32_t* missing;    // ranks, by bit
  uint64_t timeout;
};

// Waits until *flag, which only grows, has reached `value`. False after the timeout.
__device__ inline bool reaches(const uint32_t* flag, uint32_t value, uint64_t timeout) {
  const uint64_t start = ptx::globaltimer();
  while (int32_t(ptx::ld_acquire_sys(flag) - value) < 0) {
    if (ptx::globaltimer() - start > timeout) return false;
  }
  return true;
}

// Thread r waits for the flag of rank r. False for all threads if one of them has waited in vain.
__device__ inline bool all_reach(const SymmetricDispatch& p, const uint32_t* flags,
                                 uint32_t value) {
  bool there = true;
  if (threadIdx.x < p.ranks) {
    there = reaches(flags + threadIdx.x, value, p.timeout);
    if (!there) atomicOr(p.missing, 1u << threadIdx.x);
  }
  return __syncthreads_and(there);
}

__device__ inline uint8_t* slot_of(const SymmetricDispatch& p, int destination, int source,
                                   int row) {
  const int64_t at = (int64_t(p.epoch % 2) * p.ranks + source) * p.capacity + row;
  return p.windows[destination].slots + at * p.pitch;
}

// The shared memory of a CTA.
struct Stages {
  uint8_t* messages;  // [kWarps][kStages][pitch]
  ptx::mbarrier (*full)[kStages];
};

// One thread of each warp executes this before the first dispatch, and then meets its CTA.
__device__ inline void start(const Stages& stages) {
  for (int at = 0; at < kStages; ++at) ptx::mbarrier_init(&stages.full[threadIdx.x / 32][at], 1);
  ptx::fence_mbarrier_init();
}

// `phases` has a bit for the parity of each stage; one thread of each warp executes this.
__device__ inline void send_tokens(const SymmetricDispatch& p, const Stages& stages,
                                   uint32_t& phases) {
  const int warp = threadIdx.x / 32;
  ptx::mbarrier* const full = stages.full[warp];
  int at = 0;
  for (int64_t token = int64_t(blockIdx.x) * kWarps + warp; token < p.tokens;
       token += int64_t(gridDim.x) * kWarps) {
    // The stores of the message before last have read this stage.
    ptx::cp_async_bulk_wait_group_read<kStages - 1>();
    uint8_t* const message = stages.messages + (int64_t(warp) * kStages + at) * p.pitch;
    ptx::mbarrier_arrive_expect_tx(&full[at], p.pitch);
    ptx::cp_async_bulk_load(message, p.messages + token * p.pitch, p.pitch, &full[at]);
    ptx::mbarrier_wait(&full[at], phases >> at & 1);
    phases ^= 1u << at;
    for (int d = 0; d < p.ranks; ++d) {
      const int row = p.rows[token * p.ranks + d];
      if (row >= 0) ptx::cp_async_bulk_store(slot_of(p, d, p.rank, row), message, p.pitch);
    }
    ptx::cp_async_bulk_commit_group();
    at = (at + 1) % kStages;
  }
  ptx::cp_async_bulk_wait_group<0>();
}

__device__ inline void take_messages(const SymmetricDispatch& p) {
  const uint32_t* counts = p.windows[p.rank].counts + p.epoch % 2 * p.ranks;
  const int64_t chunks = p.pitch / 16;
  int64_t first = 0;  // row of out
  for (int s = 0; s < p.ranks; ++s) {
    const int64_t count = counts[s];
    const auto* from = reinterpret_cast<const uint4*>(slot_of(p, p.rank, s, 0));
    auto* to = reinterpret_cast<uint4*>(p.out + first * p.pitch);
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count * chunks;
         i += int64_t(gridDim.x) * blockDim.x)
      to[i] = from[i];
    if (blockIdx.x == 0 && threadIdx.x == 0) p.out_counts[s] = int32_t(count);
    first += count;
  }
}

// False if a rank is missing.
__device__ inline bool dispatch(const SymmetricDispatch& p, const Stages& stages,
                                uint32_t& phases) {
  const Window& own = p.windows[p.rank];
  if (p.epoch >= 2 && !all_reach(p, own.freed, (p.epoch - 1) * gridDim.x)) return false;
  if (threadIdx.x % 32 == 0) send_tokens(p, stages, phases);
  __syncthreads();
  if (threadIdx.x < p.ranks) {
    const int d = threadIdx.x;
    if (blockIdx.x == 0)
      p.windows[d].counts[p.epoch % 2 * p.ranks + p.rank] = uint32_t(p.send_counts[d]);
    ptx::red_release_sys_add(p.windows[d].arrived + p.rank, 1);
  }
  if (!all_reach(p, own.arrived, (p.epoch + 1) * gridDim.x)) return false;
  take_messages(p);
  __syncthreads();
  if (threadIdx.x < p.ranks) ptx::red_release_sys_add(p.windows[threadIdx.x].freed + p.rank, 1);
  return true;
}

__global__ void __launch_bounds__(32 * kWarps)
    symmetric_dispatch(const __grid_constant__ SymmetricDispatch p) {
  extern __shared__ __align__(128) uint8_t messages[];
  __shared__ ptx::mbarrier full[kWarps][kStages];
  const Stages stages{messages, full};
  if (threadIdx.x % 32 == 0) start(stages);
  __syncthreads();
  uint32_t phases = 0;
  dispatch(p, stages, phases);
}

}  // namespace torchext::moe::symmetric
