// Gives each choice of an expert its row (moe.h). Choices are counted in order, so a row depends
// on neither the schedule nor the number of CTAs; no atomics are used.
//
// Contract: 32-bit counts, at most kMaxExperts experts. A choice of no expert counts as one of a last
// class, `experts`.
//
//   moe_count   CTA b counts the choices of its part by class: row b of `counts`. Not launched for
//               one CTA.
//   moe_place   Each warp counts the choices of its part of the CTA's part. After __syncthreads,
//               each thread adds up a class over all CTAs, warp 0 finds the classes' first rows, and
//               each thread turns the warps' counts into their next rows. After another, each warp
//               walks through its choices again, 32 at a time, and gives rows.
//
// Both use __match_any_sync: lanes with the same class find each other, and the first of them adds.
#include "../../device/matrix.cuh"
#include "../moe.h"

namespace torchext::moe {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

struct Ids {
  const void* data;
  bool wide;
  uint32_t choices;
  int64_t token_stride, choice_stride;  // elements
  uint32_t experts;

  // The class of choice number i; ~0 beyond the end.
  __device__ uint32_t class_of(uint32_t i, uint32_t end) const {
    if (i >= end) return ~0u;
    const int64_t at = int64_t(i / choices) * token_stride + i % choices * choice_stride;
    const int64_t id = wide ? __ldg(static_cast<const long long*>(data) + at)
                            : __ldg(static_cast<const int32_t*>(data) + at);
    return uint64_t(id) < experts ? uint32_t(id) : experts;
  }
};

// Calls use(i, class, peers) for the choices of this warp, 32 at a time; `peers` are the lanes with
// the same class. Lanes without a choice take part with a class of their own.
template <class Use>
__device__ void for_each_choice(const Ids& ids, uint32_t begin, uint32_t end, const Use& use) {
  for (uint32_t first = begin; first < end; first += 32) {
    const uint32_t i = first + threadIdx.x % 32;
    const uint32_t c = ids.class_of(i, end);
    use(i, c, __match_any_sync(~0u, c));
    __syncwarp();
  }
}

// Adds the warp's choices to its counts.
__device__ inline void count_choices(const Ids& ids, uint32_t begin, uint32_t end,
                                     int32_t* warp_counts) {
  for_each_choice(ids, begin, end, [&](uint32_t i, uint32_t c, uint32_t peers) {
    if (i < end && threadIdx.x % 32 == __ffs(peers) - 1) warp_counts[c] += __popc(peers);
  });
}

// Part `index` of `parts` equal parts of [begin, end), in whole warps.
struct Part {
  uint32_t begin, end;
};
__device__ inline Part part_of(const Part& all, uint32_t index, uint32_t parts) {
  const uint32_t size = ((all.end - all.begin + parts - 1) / parts + 31) / 32 * 32;
  const uint32_t begin = min(all.end, all.begin + index * size);
  return {begin, min(all.end, begin + size)};
}

// Counts the choices of each warp of the CTA into counts[warp][class].
__device__ inline Part count_by_warp(const Ids& ids, uint32_t total, int32_t* counts) {
  const uint32_t classes = ids.experts + 1, warp = threadIdx.x / 32;
  const Part mine = part_of(part_of({0, total}, blockIdx.x, gridDim.x), warp, kWarps);
  for (uint32_t i = threadIdx.x; i < kWarps * classes; i += kThreads) counts[i] = 0;
  __syncthreads();
  count_choices(ids, mine.begin, mine.end, counts + warp * classes);
  __syncthreads();
  return mine;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    moe_count(Ids ids, uint32_t total, int32_t* counts) {
  extern __shared__ int32_t by_warp[];  // [kWarps][classes]
  const uint32_t classes = ids.experts + 1;
  count_by_warp(ids, total, by_warp);
  for (uint32_t c = threadIdx.x; c < classes; c += kThreads) {
    int32_t sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += by_warp[warp * classes + c];
    counts[blockIdx.x * classes + c] = sum;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    moe_place(Ids ids, uint32_t total, const int32_t* counts, int32_t* slots, int32_t* offsets) {
  extern __shared__ int32_t by_warp[];  // [kWarps][classes], then `firsts` [classes]
  const uint32_t classes = ids.experts + 1, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int32_t* firsts = by_warp + kWarps * classes;
  const Part mine = count_by_warp(ids, total, by_warp);

  // The number of choices of each class, in `firsts`, and of those in earlier CTAs.
  constexpr int kClassesPerThread = (kMaxExperts + 1 + kThreads - 1) / kThreads;
  int32_t earlier[kClassesPerThread];
#pragma unroll
  for (int j = 0; j < kClassesPerThread; ++j) {
    const uint32_t c = j * kThreads + threadIdx.x;
    earlier[j] = 0;
    if (c >= classes) continue;
    int32_t all = 0;
    if (gridDim.x == 1) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) all += by_warp[w * classes + c];
    } else {
#pragma unroll 8
      for (uint32_t cta = 0; cta < gridDim.x; ++cta) {
        const int32_t count = counts[cta * classes + c];
        all += count;
        earlier[j] += cta < blockIdx.x ? count : 0;
      }
    }
    firsts[c] = all;
  }
  __syncthreads();

  // The first row of each class, and where the rows of each expert end.
  if (warp == 0) {
    int32_t before = 0;
    for (uint32_t base = 0; base < classes; base += 32) {
      const uint32_t c = base + lane;
      const int32_t count = c < classes ? firsts[c] : 0;
      int32_t end = count;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int32_t left = __shfl_up_sync(~0u, end, distance);
        if (lane >= distance) end += left;
      }
      end += before;
      if (c < classes) firsts[c] = end - count;
      if (blockIdx.x == 0 && c < ids.experts) offsets[c] = end;
      before = __shfl_sync(~0u, end, 31);
    }
  }
  __syncthreads();

  // The next row of each warp and class.
#pragma unroll
  for (int j = 0; j < kClassesPerThread; ++j) {
    const uint32_t c = j * kThreads + threadIdx.x;
    if (c >= classes) continue;
    int32_t next = firsts[c] + earlier[j];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int32_t count = by_warp[w * classes + c];
      by_warp[w * classes + c] = next;
      next += count;
    }
  }
  __syncthreads();

  int32_t* next = by_warp + warp * classes;
  for_each_choice(ids, mine.begin, mine.end, [&](uint32_t i, uint32_t c, uint32_t peers) {
    const bool exists = i < mine.end;
    const int32_t row = exists ? next[c] : 0;
    if (exists) slots[i] = row + __popc(peers & ((1u << lane) - 1));
    __syncwarp();
    if (exists && lane == __ffs(peers) - 1) next[c] = row + __popc(peers);
  });
}

}  // namespace torchext::moe

namespace torchext {

void route_cuda(Device& device, const RouteView& view, int ctas, int32_t* counts, Buffer ids_read) {
  using namespace moe;
  const Ids ids{view.ids,          view.wide,          uint32_t(view.choices),
                view.token_stride, view.choice_stride, uint32_t(view.experts)};
  const uint32_t total = uint32_t(view.tokens * view.choices);
  const uint32_t row_bytes = uint32_t((view.experts + 1) * sizeof(int32_t));
  LaunchConfig config{{uint32_t(ctas)}, {kThreads}};
  config.shared_bytes = kWarps * row_bytes;
  if (ctas > 1)
    device.launch(TORCHEXT_KERNEL(moe_count), config,
                  {ids_read, {counts, ctas * row_bytes, Access::write, "counts"}}, ids, total,
                  counts);
  config.shared_bytes += row_bytes;
  device.launch(TORCHEXT_KERNEL(moe_place), config,
                {ids_read,
                 {counts, ctas > 1 ? ctas * row_bytes : 0, Access::read, "counts"},
                 {view.slots, total * sizeof(int32_t), Access::write, "slots"},
                 {view.offsets, view.experts * sizeof(int32_t), Access::write, "offsets"}},
                ids, total, counts, view.slots, view.offsets);
}

}  // namespace torchext
