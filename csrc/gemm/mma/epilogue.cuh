// The epilogue of a tile, shared by all kernels for GPUs other than Hopper. The tile's product is
// in shared memory as FP32, row after row. A warp takes one row at a time; each lane handles four
// of its columns. Either the epilogue applies row-wise scales, bias and the old output, rounds and
// stores; or it applies an activation and quantizes the row's 128 columns, one scale group, to FP8.
// Contract: all threads have met at a barrier after the last write of the product.
#pragma once

#include "../../device/activations.cuh"
#include "../../device/conversions.cuh"
#include "../../device/loaders.cuh"
#include "../../device/numbers.cuh"
#include "kernels.h"
#include "ptx/isa/memory.h"
#include "schedule.cuh"

namespace torchext::mma {

// Floats from row to row: four more than columns, so that writing accumulators meets no bank
// conflict.
constexpr int kTilePitch = kTileN + 4;

// Where b, its scales and bias begin for a tile's group. M-grouped: b holds one group after
// another.
struct GroupOperand {
  const uint8_t* b;
  const float* scale;
  int64_t bias;  // index of column 0

  __device__ GroupOperand(const GemmProblem& p, uint32_t group) {
    const bool one = p.grouping == Grouping::kNone || p.grouping == Grouping::kAlongK;
    const int64_t g = one ? 0 : group;
    b = static_cast<const uint8_t*>(p.b) + g * p.n * p.b_stride;
    scale = p.b_scale + g * p.b_scale_group;
    bias = g * p.n;
  }
};

// Row-wise scales and biases of a lane's four columns, which are the rows of b from b_row on.
struct LaneColumns {
  float scale[4], bias[4];

  __device__ LaneColumns(const GemmProblem& p, const GroupOperand& group, uint32_t b_row,
                         uint32_t count) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scale[i] = 1;
      bias[i] = 0;
      if (i >= int(count)) continue;
      if (p.granularity == Granularity::kRowwise)
        scale[i] = ptx::ld_global_nc_f32(group.scale + (b_row + i) * p.b_scale_row);
      if (p.bias != nullptr)
        with_loader(p.bias_dtype,
                    [&](auto load) { bias[i] = load(p.bias, group.bias + b_row + i); });
    }
  }

  __device__ void finish(float row_scale, const float* product, float (&x)[4]) const {
    const float4 values = *reinterpret_cast<const float4*>(product);
    x[0] = values.x * (row_scale * scale[0]) + bias[0];
    x[1] = values.y * (row_scale * scale[1]) + bias[1];
    x[2] = values.z * (row_scale * scale[2]) + bias[2];
    x[3] = values.w * (row_scale * scale[3]) + bias[3];
  }
};

// Stores the first `count` of four elements.
__device__ __forceinline__ void store_four(const KernelParams& params, int64_t offset,
                                           const float (&x)[4], uint32_t count) {
  const GemmProblem& p = params.problem;
  if (p.out_dtype == ScalarType::Float) {
    float* out = static_cast<float*>(p.out) + offset;
    if (params.aligned_rows && count == 4) {
      *reinterpret_cast<float4*>(out) = {x[0], x[1], x[2], x[3]};
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < int(count)) out[i] = x[i];
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(p.out) + offset;
  const uint32_t pairs[2] = {pack_16bit(p.out_dtype, x[0], x[1]),
                             pack_16bit(p.out_dtype, x[2], x[3])};
  if (params.aligned_rows && count == 4) {
    *reinterpret_cast<uint2*>(out) = {pairs[0], pairs[1]};
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < int(count)) out[i] = uint16_t(pairs[i / 2] >> i % 2 * 16);
}

// Stores the first `count` of four elements as FP8, and the row's scale, which the warp computes
// together.
__device__ __forceinline__ void quantize_four(const KernelParams& params, const Tile& tile,
                                              uint32_t row, const float (&x)[4], uint32_t count) {
  const GemmProblem& p = params.problem;
  const bool e5m2 = p.out_dtype == ScalarType::Float8_e5m2;
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < int(count)) most = max(most, __float_as_uint(x[i]) & 0x7fffffff);
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2)
    most = max(most, __shfl_xor_sync(~0u, most, distance));
  const auto s = quantizers::scale_of(most, quantizers::fp8_max(e5m2),
                                      p.pow2_scale ? quantizers::kMantissa : 0);
  if (threadIdx.x % 32 == 0)
    p.out_scale[row + tile.column / kScaleGroup * p.out_scale_column_block] = s.scale;
  float q[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) q[i] = quantizers::divide(x[i] * s.lift, s);
  const uint32_t codes = pack_fp8(e5m2, q[1], q[0]) | uint32_t(pack_fp8(e5m2, q[3], q[2])) << 16;
  uint8_t* out =
      static_cast<uint8_t*>(p.out) + row * p.out_stride + tile.column + threadIdx.x % 32 * 4;
  if (count == 4 && params.aligned_rows) {
    *reinterpret_cast<uint32_t*>(out) = codes;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < int(count)) out[i] = uint8_t(codes >> 8 * i);
}

// `gate`: for SwiGLU, the product with the first half of b's rows; otherwise it is not read.
template <int kTileM>
__device__ __forceinline__ void finish_tile(const KernelParams& params, const Tile& tile,
                                            const GroupOperand& group, const float* product,
                                            const float* gate) {
  const GemmProblem& p = params.problem;
  if (p.accumulate && tile.k_begin == tile.k_end && p.grouping == Grouping::kAlongK) return;
  const bool gated = p.activation == Activation::kSwiGLU;
  const uint32_t lane_column = threadIdx.x % 32 * 4;
  const uint32_t column = tile.column + lane_column;
  const uint32_t count = column < params.width ? min(params.width - column, 4u) : 0;
  const LaneColumns columns(p, group, column + (gated ? params.width : 0), count);
  const int64_t first =
      column + (p.grouping == Grouping::kAlongK ? tile.group * p.out_group_stride : 0);
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < kTileM; i += blockDim.x / 32) {
    const uint32_t row = tile.row + i;
    if (!holds(p, tile, row)) continue;
    const float row_scale = p.granularity == Granularity::kRowwise && p.a_scale != nullptr
                                ? ptx::ld_global_nc_f32(p.a_scale + row * p.a_scale_row)
                                : 1;
    float x[4];
    columns.finish(row_scale, product + i * kTilePitch + lane_column, x);
    if (p.activation != Activation::kNone) {
      float g[4] = {};
      if (gated)
        LaneColumns(p, group, column, count)
            .finish(row_scale, gate + i * kTilePitch + lane_column, g);
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = activate(p.activation, g[j], x[j]);
      quantize_four(params, tile, row, x, count);
      continue;
    }
    const int64_t offset = first + row * p.out_stride;
    if (p.accumulate)
      with_loader(p.out_dtype, [&](auto load) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (j < int(count)) x[j] += load(p.out, offset + j);
      });
    store_four(params, offset, x, count);
  }
}

}  // namespace torchext::mma
