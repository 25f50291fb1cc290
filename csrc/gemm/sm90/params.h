// What the launcher (launch.cpp) hands to a Hopper GEMM kernel (fp8_gemm_nt.cuh), and the table of
// these kernels.
#pragma once

#include "../../device/sm90/boxes.h"
#include "../gemm.h"
#include "tiles.h"

namespace torchext::sm90 {

constexpr int kTileK = 128;
static_assert(kTileK == kScaleGroup, "one scale and one promotion cover a K block");

// The schedule lists the groups of an M-grouped GEMM in shared memory.
constexpr uint32_t kMaxGroups = 1024;
constexpr uint32_t kMaxSplits = 8;  // of K: the CTAs of the largest portable cluster

struct GemmParams : GemmTensors {
  // `rows` fill the 64 rows of wgmma, `columns` its N: a and b, or, for swapped tiles, b and a.
  // Boxes:
  //   rows           {128 of K, the tile's rows; half of them if two CTAs share them}
  //   columns        {128 of K, the tile's columns; gated: half of them}
  //   column_scale   {the tile's columns; gated: half of them, 1 K block}; only for 1x128 scales
  //   out_map        {128 bytes, 64 rows, 1 group}
  TensorMap rows, columns, column_scale, out_map;
  uint32_t m, n;      // of the output; with SwiGLU, b has 2 * n rows
  uint32_t k_blocks;  // of 128
  uint32_t groups, group_rows;
  // The two CTAs of a cluster share `rows`; otherwise a cluster splits K. Every release of a slot
  // reads this member: at a multiple of four bytes, the read takes one instruction less.
  alignas(4) bool multicast;
  bool out_aligned;  // rows of out start at multiples of 16 bytes
  bool out_by_tma;   // and end at multiples: past its row's end, TMA fills the last 16 bytes
};

// What the epilogue does with the product.
enum class Output {
  kStored,     // stores it
  kActivated,  // applies an activation of one operand, quantizes 1x128
  kGated,      // the same for SwiGLU; gate and up are computed side by side
};

inline Output output_of(const GemmProblem& p) {
  if (p.activation == Activation::kNone) return Output::kStored;
  return is_gated(p.activation) ? Output::kGated : Output::kActivated;
}

// A row of the table of kernels. tools/elf.py reads the first four fields out of the library.
struct GemmKernel {
  void (*function)(GemmParams);
  const char* name;
  uint32_t threads, shared_bytes;
  TileShape tile;
  Granularity granularity;
  bool a_e5m2, b_e5m2;
  Output output;

  bool computes(const GemmProblem& p) const {
    return granularity == p.granularity && output == output_of(p) &&
           a_e5m2 == (p.a_dtype == ScalarType::Float8_e5m2) &&
           b_e5m2 == (p.b_dtype == ScalarType::Float8_e5m2);
  }
};

struct KernelTable {
  const GemmKernel* kernels;
  size_t count;
};

// The .cu files here, one for each granularity and kind: APPLY(granularity, kind). Each defines
// kernels_<granularity>_<kind>.
// clang-format off
#define TORCHEXT_SM90_FILES(APPLY)                                                              \
  APPLY(1d2d, stored)    APPLY(1d2d, swapped)    APPLY(1d2d, e5m2)    APPLY(1d2d, activated)    \
  APPLY(1d1d, stored)    APPLY(1d1d, swapped)    APPLY(1d1d, e5m2)    APPLY(1d1d, activated)    \
  APPLY(rowwise, stored) APPLY(rowwise, swapped) APPLY(rowwise, e5m2) APPLY(rowwise, activated)
// clang-format on

#define TORCHEXT_DECLARE(G, KIND) extern const KernelTable kernels_##G##_##KIND;
TORCHEXT_SM90_FILES(TORCHEXT_DECLARE)
#undef TORCHEXT_DECLARE

}  // namespace torchext::sm90
