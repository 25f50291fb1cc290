// Kernels that call other projects' code, for test_third_party.py: CUB's collectives and libcu++'s
// asynchronous copy, both of which come with the CUDA toolkit.
#include <cuda/barrier>
#include <cuda/ptx>

#include <cub/cub.cuh>

extern "C" __global__ void __launch_bounds__(128) block_sum(const float* x, float* sum, int n) {
  using Reduce = cub::BlockReduce<float, 128>;
  __shared__ typename Reduce::TempStorage storage;
  float mine = 0;
  for (int i = threadIdx.x; i < n; i += 128) mine += x[i];
  const float all = Reduce(storage).Sum(mine);
  if (threadIdx.x == 0) *sum = all;
}

extern "C" __global__ void __launch_bounds__(128) block_sort(unsigned* keys) {
  using Sort = cub::BlockRadixSort<unsigned, 128, 4>;
  __shared__ typename Sort::TempStorage storage;
  unsigned mine[4];
  for (int i = 0; i < 4; ++i) mine[i] = keys[threadIdx.x * 4 + i];
  Sort(storage).Sort(mine);
  for (int i = 0; i < 4; ++i) keys[threadIdx.x * 4 + i] = mine[i];
}

extern "C" __global__ void __launch_bounds__(256) block_scan(int* x) {
  using Scan = cub::BlockScan<int, 256>;
  __shared__ typename Scan::TempStorage storage;
  int mine = x[threadIdx.x];
  Scan(storage).InclusiveSum(mine, mine);
  x[threadIdx.x] = mine;
}

// cuda::memcpy_async becomes cp.async.bulk, which signals the barrier from the async proxy.
template <bool fenced>
__device__ void reverse(const int4* from, int4* to) {
  __shared__ alignas(16) int4 tile[256];
  __shared__ cuda::barrier<cuda::thread_scope_block> barrier;
  if (threadIdx.x == 0) {
    init(&barrier, blockDim.x);
    if (fenced) cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
  }
  __syncthreads();
  const unsigned at = blockIdx.x * 256 + threadIdx.x;
  cuda::memcpy_async(&tile[threadIdx.x], &from[at], cuda::aligned_size_t<16>(16), barrier);
  barrier.arrive_and_wait();
  to[at] = tile[255 - threadIdx.x];
}
extern "C" __global__ void reverse_fenced(const int4* from, int4* to) {
  reverse<true>(from, to);
}
extern "C" __global__ void reverse_unfenced(const int4* from, int4* to) {
  reverse<false>(from, to);
}
