// Several epochs of the dispatch in one launch, so that ranks may be in different ones.
#include "csrc/moe/cuda/symmetric_dispatch.cuh"

namespace symmetric = torchext::moe::symmetric;

extern "C" __global__ void __launch_bounds__(32 * symmetric::kWarps)
    epochs(symmetric::SymmetricDispatch p, uint32_t count) {
  extern __shared__ __align__(128) uint8_t messages[];
  __shared__ ptx::mbarrier full[symmetric::kWarps][symmetric::kStages];
  const symmetric::Stages stages{messages, full};
  if (threadIdx.x % 32 == 0) symmetric::start(stages);
  __syncthreads();
  uint32_t phases = 0;
  for (uint32_t epoch = 0; epoch < count; ++epoch) {
    p.epoch = epoch;
    if (!symmetric::dispatch(p, stages, phases)) return;
    p.messages += p.tokens * p.pitch;
    p.out += int64_t(p.ranks) * p.capacity * p.pitch;
    p.out_counts += p.ranks;
  }
}
