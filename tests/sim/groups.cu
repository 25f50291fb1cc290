// GPUs that exchange rows through each other's memory, right and with planted faults, for
// test_groups.py.
//
// In every round, CTA p of each GPU sends a row to GPU p, and CTA ranks + p receives the row of GPU p. A
// slot of the receiver holds a row: [round % 2][sender][kRowBytes]. `arrived` counts the rows that a
// sender has put there; `freed`, in the sender's memory, those that the receiver has taken. All threads
// store a row, or a bulk store does; a bulk load reads it.
#include "ptx/isa/fence.h"
#include "ptx/isa/peer.h"
#include "ptx/isa/tma.h"

constexpr int kRanks = 4, kThreads = 64, kRowBytes = kThreads * 16;

struct Windows {
  unsigned char* slots[kRanks];
  uint32_t* arrived[kRanks];  // [sender]
  uint32_t* freed[kRanks];    // [receiver]
};

enum Fault {
  kNone,
  kNoProxyFence,  // between the acquired flag and the bulk load
  kWeakFence,     // of GPU scope before a relaxed flag
  kNoncoherent,   // loads of the row
  kGpuRelease,    // of the flag
  kGpuAcquire,
  kFlagBeforeData,
  kSlotReused,       // before its row was taken
  kWrongParity,      // of the bulk load's mbarrier
  kCountOffByOne,    // of rows that the receiver waits for
  kStoreNotAwaited,  // the bulk store, of which only the source has been read
  kPastTheSlot,      // the last row ends behind the window
  kNeverReleased,    // the last row
};

__device__ void wait_for(const uint32_t* flag, uint32_t value, bool gpu) {
  uint32_t now;
  do {
    if (gpu)
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(flag) : "memory");
    else
      now = ptx::ld_acquire_sys(flag);
  } while (now < value);
}

template <bool bulk, Fault fault>
__device__ void send(const Windows& windows, int rank, int ranks, int peer, int rounds,
                     const uint4* rows) {
  __shared__ alignas(128) uint4 outgoing[kThreads];
  const int i = threadIdx.x;
  uint32_t* const flag = windows.arrived[peer] + rank;
  for (int round = 0; round < rounds; ++round) {
    if (round >= 2 && fault != kSlotReused) {
      if (i == 0) wait_for(windows.freed[rank] + peer, round - 1, false);
      __syncthreads();
    }
    unsigned char* slot = windows.slots[peer] + (round % 2 * ranks + rank) * kRowBytes;
    if (fault == kPastTheSlot && round % 2 == 1 && rank == ranks - 1) slot += 16;
    if (fault == kFlagBeforeData && i == 0) ptx::red_release_sys_add(flag, 1);
    const uint4 row = rows[(round * ranks + peer) * kThreads + i];
    if (bulk) {
      outgoing[i] = row;
      ptx::fence_proxy_async_shared();
      __syncthreads();
      if (i == 0) {
        ptx::cp_async_bulk_store(slot, outgoing, kRowBytes);
        ptx::cp_async_bulk_commit_group();
        if (fault == kStoreNotAwaited)
          ptx::cp_async_bulk_wait_group_read<0>();
        else
          ptx::cp_async_bulk_wait_group<0>();
      }
    } else {
      reinterpret_cast<uint4*>(slot)[i] = row;
    }
    __syncthreads();
    if (i != 0 || fault == kFlagBeforeData || (fault == kNeverReleased && round == rounds - 1))
      continue;
    if (fault == kWeakFence) {
      __threadfence();
      atomicAdd_system(flag, 1u);
    } else if (fault == kGpuRelease) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(flag) : "memory");
    } else {
      ptx::red_release_sys_add(flag, 1);
    }
  }
}

template <Fault fault>
__device__ void receive(const Windows& windows, int rank, int ranks, int peer, int rounds,
                        uint4* out) {
  __shared__ alignas(128) uint4 incoming[kThreads];
  __shared__ ptx::mbarrier full;
  const int i = threadIdx.x;
  if (i == 0) {
    ptx::mbarrier_init(&full, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  for (int round = 0; round < rounds - (fault == kNeverReleased); ++round) {
    const unsigned char* slot = windows.slots[rank] + (round % 2 * ranks + peer) * kRowBytes;
    if (i == 0) {
      wait_for(windows.arrived[rank] + peer, round + (fault == kCountOffByOne ? 2 : 1),
               fault == kGpuAcquire);
      if (fault != kNoProxyFence) ptx::fence_proxy_async_global();
      if (fault != kNoncoherent) {
        ptx::mbarrier_arrive_expect_tx(&full, kRowBytes);
        ptx::cp_async_bulk_load(incoming, slot, kRowBytes, &full);
      }
    }
    if (fault == kNoncoherent) {
      __syncthreads();
      incoming[i] = __ldg(reinterpret_cast<const uint4*>(slot) + i);
    } else {
      ptx::mbarrier_wait(&full, (round + (fault == kWrongParity)) % 2);
    }
    out[(round * ranks + peer) * kThreads + i] = incoming[i];
    __syncthreads();
    if (i == 0) ptx::red_release_sys_add(windows.freed[peer] + rank, 1);
  }
}

template <bool bulk, Fault fault>
__device__ void exchange(const Windows& windows, int rank, int ranks, int rounds, const uint4* rows,
                         uint4* out) {
  const int peer = blockIdx.x % ranks;
  if (blockIdx.x < ranks)
    send<bulk, fault>(windows, rank, ranks, peer, rounds, rows);
  else
    receive<fault>(windows, rank, ranks, peer, rounds, out);
}

#define KERNEL(name, bulk, fault)                                                             \
  extern "C" __global__ void __launch_bounds__(kThreads)                                      \
      name(Windows windows, int rank, int ranks, int rounds, const uint4* rows, uint4* out) { \
    exchange<bulk, fault>(windows, rank, ranks, rounds, rows, out);                           \
  }
KERNEL(by_stores, false, kNone)
KERNEL(by_bulk_stores, true, kNone)
KERNEL(no_proxy_fence, false, kNoProxyFence)
KERNEL(weak_fence, false, kWeakFence)
KERNEL(noncoherent, false, kNoncoherent)
KERNEL(gpu_release, false, kGpuRelease)
KERNEL(gpu_acquire, true, kGpuAcquire)
KERNEL(flag_before_data, false, kFlagBeforeData)
KERNEL(slot_reused, true, kSlotReused)
KERNEL(wrong_parity, true, kWrongParity)
KERNEL(count_off_by_one, false, kCountOffByOne)
KERNEL(store_not_awaited, true, kStoreNotAwaited)
KERNEL(past_the_slot, false, kPastTheSlot)
KERNEL(never_released, false, kNeverReleased)
