// Kernels that use features of CUDA's headers, for test_cuda_features.py: wmma, intrinsics for
// rounding and for lanes of 32-bit words, cooperative groups, 16-byte atomics.
#include <cooperative_groups.h>
#include <cooperative_groups/memcpy_async.h>
#include <cooperative_groups/reduce.h>
#include <cooperative_groups/scan.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

namespace cg = cooperative_groups;
using namespace nvcuda;

// d = alpha * a * b + d; m and n are multiples of 16 * warps, a is row-major, b column-major. Tiles
// of a are staged in shared memory; the accumulator fragment is edited element by element.
template <class T>
__device__ void wmma_gemm(const T* a, const T* b, float* d, float alpha, int n, int k) {
  __shared__ __align__(32) T stage[16 * 24];
  const int row = 16 * blockIdx.y, column = 16 * blockIdx.x;
  wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> left;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> right;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum, old;
  wmma::fill_fragment(sum, 0.0f);
  for (int at = 0; at < k; at += 16) {
    for (int i = threadIdx.x; i < 256; i += 32)
      stage[i / 16 * 24 + i % 16] = a[(row + i / 16) * k + at + i % 16];
    __syncwarp();
    wmma::load_matrix_sync(left, stage, 24);
    wmma::load_matrix_sync(right, b + column * k + at, k);
    wmma::mma_sync(sum, left, right, sum);
    __syncwarp();
  }
  float* tile = d + row * n + column;
  wmma::load_matrix_sync(old, tile, n, wmma::mem_row_major);
  for (int i = 0; i < sum.num_elements; ++i) sum.x[i] = alpha * sum.x[i] + old.x[i];
  wmma::store_matrix_sync(tile, sum, n, wmma::mem_row_major);
}
extern "C" __global__ void wmma_f16(const __half* a, const __half* b, float* d, float alpha, int n,
                                    int k) {
  wmma_gemm(a, b, d, alpha, n, k);
}
#if __CUDA_ARCH__ >= 800
extern "C" __global__ void wmma_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d,
                                     float alpha, int n, int k) {
  wmma_gemm(a, b, d, alpha, n, k);
}
#endif

extern "C" __global__ void rounding(const double* a, const double* b, double* out) {
  const int t = threadIdx.x, n = blockDim.x;
  const double x = a[t], y = b[t];
  double* to = out + t;
#define ALL(f, ...)                                                       \
  *to = f##_rn(__VA_ARGS__), to += n, *to = f##_rz(__VA_ARGS__), to += n, \
  *to = f##_ru(__VA_ARGS__), to += n, *to = f##_rd(__VA_ARGS__), to += n
  ALL(__dadd, x, y);
  ALL(__dmul, x, y);
  ALL(__ddiv, x, y);
  ALL(__fma, x, y, x);
  ALL(__dsqrt, fabs(x));
  ALL(__ll2double, __double_as_longlong(x));
#undef ALL
}

extern "C" __global__ void words(const unsigned* a, const unsigned* b, unsigned* out) {
  const int t = threadIdx.x, n = blockDim.x;
  const unsigned x = a[t], y = b[t];
  unsigned* to = out + t;
#define PUT(value) *to = value, to += n
  PUT(__vadd4(x, y));
  PUT(__vsubus4(x, y));
  PUT(__vaddss2(x, y));
  PUT(__vabsdiffu4(x, y));
  PUT(__vabsdiffs2(x, y));
  PUT(__vsadu4(x, y));
  PUT(__vsads2(x, y));
  PUT(__vavgu4(x, y));
  PUT(__vavgs2(x, y));
  PUT(__vmaxs4(x, y));
  PUT(__vcmpgtu4(x, y));
  PUT(__vsetles2(x, y));
#undef PUT
}

// The FP16 functions whose last bits the header corrects with PTX of its own.
extern "C" __global__ void halves(const __half* a, __half2* out) {
  const int t = threadIdx.x, n = blockDim.x;
  const __half x = a[t];
  const __half2 both = __halves2half2(x, a[n - 1 - t]);
  __half2* to = out + t;
#define PUT(value) *to = value, to += n
  PUT(__halves2half2(hsqrt(x), hrsqrt(x)));
  PUT(__halves2half2(hrcp(x), hexp(x)));
  PUT(__halves2half2(hsin(x), hcos(x)));
  PUT(__halves2half2(hlog(x), htanh(x)));
  PUT(h2sqrt(both));
  PUT(h2rcp(both));
  PUT(h2cos(both));
  PUT(__hlt2(both, __lowhigh2highlow(both)));
  PUT(__hfma2_sat(both, both, both));
#undef PUT
}

// `steps` times, each thread of the grid adds the number of its left neighbor in the previous step.
extern "C" __global__ void grid_steps(int* now, int* next, int steps) {
  const auto grid = cg::this_grid();
  const unsigned i = grid.thread_rank(), n = grid.size();
  for (int s = 0; s < steps; ++s) {
    next[i] = now[i] + now[(i + n - 1) % n];
    grid.sync();
    int* swap = now;
    now = next;
    next = swap;
  }
}

extern "C" __global__ void groups(const int* in, int* out) {
  const auto block = cg::this_thread_block();
  const int t = block.thread_rank(), n = block.size(), v = in[t];
  int* to = out + t;
#define PUT(value) *to = value, to += n
  const auto eight = cg::tiled_partition<8>(block);
  PUT(cg::reduce(eight, v, cg::plus<int>()));
  PUT(cg::reduce(eight, v, cg::less<int>()));
  PUT(cg::inclusive_scan(eight, v));
  PUT(cg::exclusive_scan(eight, v, cg::bit_xor<int>()));
  const auto label = cg::labeled_partition(cg::tiled_partition<32>(block), v & 3);
  PUT(cg::reduce(label, v, cg::plus<int>()));
  PUT(label.num_threads());
  int sum = 0;
  if (v & 1) {
    const auto odd = cg::coalesced_threads();
    sum = cg::reduce(odd, v, cg::plus<int>()) + 1000 * odd.thread_rank();
  }
  PUT(sum);
#undef PUT
}

#if __CUDA_ARCH__ >= 800
extern "C" __global__ void wide_tiles(const int* in, int* out) {
  __shared__ cg::block_tile_memory<256> scratch;
  const auto block = cg::this_thread_block(scratch);
  const auto tile = cg::tiled_partition<64>(block);
  const int t = block.thread_rank(), n = block.size(), v = in[t];
  out[t] = cg::reduce(tile, v, cg::plus<int>());
  out[n + t] = tile.shfl(v, 5);
  out[2 * n + t] = tile.any(v == 7) + 2 * tile.all(v < 1000);
  out[3 * n + t] = cg::inclusive_scan(tile, v);
}
#endif

extern "C" __global__ void copies(const int4* in, int4* out) {
  __shared__ int4 stage[256];
  const auto block = cg::this_thread_block();
  cg::memcpy_async(block, stage, in, sizeof(int4) * block.size());
  cg::wait(block);
  const int t = block.thread_rank();
  out[t] = stage[block.size() - 1 - t];
}

#if __CUDA_ARCH__ >= 900
struct __align__(16) Pair {
  long long sum, count;
};
extern "C" __global__ void pairs(Pair* total, Pair* last) {
  Pair seen = {0, 0};
  while (true) {
    const Pair next = {seen.sum + threadIdx.x, seen.count + 1};
    const Pair before = atomicCAS(total, seen, next);
    if (before.sum == seen.sum && before.count == seen.count) break;
    seen = before;
  }
  const Pair mine = {static_cast<long long>(threadIdx.x), 1};
  atomicExch(last, mine);
}
#endif
