// What a tile's shape and granularity imply: how the work is divided, what lies in shared memory.
#pragma once

#include "params.h"
#include "ptx/isa/mbarrier.h"

namespace torchext::sm90 {

// How an operand's scales reach the accumulators.
enum class Scales {
  kNone,    // row-wise: in the epilogue
  kVector,  // 1x128: one for each row (or column), by TMA, with the K block
  kBlock,   // 128x128: one (a few, in wide tiles) for all of them
};

// What becomes of the product.
enum class Output {
  kStored,     // as it is
  kActivated,  // an activation of it, quantized 1x128
  kGated,      // the same of SwiGLU, whose gate and up are computed side by side
};

template <Granularity granularity, int rows, int columns, int stages, bool swapped,
          Output output = Output::kStored>
struct Layout {
  static constexpr Granularity kGranularity = granularity;
  static constexpr Output kOutput = output;
  static constexpr bool kGated = output == Output::kGated;
  static constexpr int kRows = rows, kColumns = columns, kStages = stages;
  static constexpr bool kSwapped = swapped;
  static constexpr int kTileM = swapped ? columns : rows;
  static constexpr int kTileN = swapped ? rows : kGated ? columns / 2 : columns;

  static constexpr bool k1D2D = granularity == Granularity::k1D2D;
  static constexpr bool kRowwise = granularity == Granularity::kRowwise;
  static constexpr Scales kRowScales = kRowwise           ? Scales::kNone
                                       : k1D2D && swapped ? Scales::kBlock
                                                          : Scales::kVector;
  static constexpr Scales kColumnScales = kRowwise            ? Scales::kNone
                                          : k1D2D && !swapped ? Scales::kBlock
                                                              : Scales::kVector;

  // Consumer warpgroups, one below the other. Each multiplies kSlices x kParts blocks of 64 rows
  // and kPartColumns columns, one after the other for each K block.
  static constexpr int kWarpgroups = rows == 64 ? 1 : 2;
  static constexpr int kConsumers = 128 * kWarpgroups, kThreads = 128 + kConsumers;
  static constexpr int kSlices = rows / (64 * kWarpgroups);
  static constexpr int kParts = columns > 192 ? columns / 128 : 1;
  static constexpr int kPartColumns = columns / kParts;
  static constexpr int kBlocks = kSlices * kParts;
  static constexpr int kRegisters = kPartColumns / 2;  // of an accumulator, a thread

  // With two accumulators in turns a warpgroup promotes one while the tensor cores fill the other.
  // With one, the other warpgroup has the tensor cores meanwhile.
  static constexpr int kBuffers =
      kBlocks == 1 && kPartColumns < (kColumnScales == Scales::kVector ? 128 : 192) ? 2 : 1;

  // 128x128 scales that a tile meets in a K block: one for kBlockSpan of its features. Gated, up's
  // may begin anywhere in a block: it has a second.
  static constexpr int kBlockSpan = swapped || columns <= 128 ? 128 : columns % 128 == 0 ? 128 : 64;
  static constexpr int kBlockScales = kGated                             ? 3
                                      : swapped || columns <= kBlockSpan ? 1
                                                                         : columns / kBlockSpan;
  static_assert(kTileN % 128 == 0 || 128 % kTileN == 0 || kTileN % 64 == 0);

  // Staging of the TMA store: boxes of 128 bytes by 64 rows for each warpgroup.
  static constexpr int kStoreBoxes = output != Output::kStored ? 1
                                     : columns >= 256          ? 4
                                     : kBlocks == 2            ? 4
                                                               : columns / 64;

  static_assert(rows == 64 || rows == 128 || rows == 256);
  static_assert(columns % 16 == 0 && columns <= 256);
  static_assert(!swapped || (kBlocks == 1 && rows <= 128),
                "swapped: a tile's features share a block of scales");
  static_assert(swapped || columns % 64 == 0, "whole boxes of the TMA store");
  static_assert(output == Output::kStored || (kPartColumns == kGroup && kSlices == 1 && !swapped),
                "a warpgroup holds whole groups of the output");
};

template <class L>
struct Shared {
  static constexpr bool kRowVector = L::kRowScales == Scales::kVector;
  static constexpr bool kColumnVector = L::kColumnScales == Scales::kVector;

  // TMA and wgmma under 128-byte swizzle want 1024-byte alignment; every array up to the scales
  // keeps it, and those TMA's 128.
  uint8_t rows[L::kStages][L::kRows * kTileK];
  uint8_t columns[L::kStages][L::kColumns * kTileK];
  uint8_t store[L::kSwapped ? 1 : L::kWarpgroups]
               [L::kSwapped ? 1024 : L::kStoreBoxes * kStoreBoxBytes];
  float row_scale[kRowVector ? L::kStages : 1][L::kRows];
  float column_scale[kColumnVector ? L::kStages : 1][L::kColumns < 32 ? 32 : L::kColumns];
  // Swapped: the product, transposed. Four more floats a row keep its writers off each other's
  // banks.
  float staged[L::kSwapped ? L::kColumns : 1][L::kRows + 4];
  // Not swapped: row-wise scale and bias of each column.
  float factor[L::kSwapped ? 1 : L::kWarpgroups][L::kColumns];
  float bias[L::kSwapped ? 1 : L::kWarpgroups][L::kColumns];
  ptx::mbarrier full[L::kStages], empty[L::kStages];
  ptx::mbarrier staged_full, staged_empty;  // over the cluster
  uint32_t tile_end[];                      // Schedule::list_groups; as many as there are groups

  static constexpr uint32_t kBytesPerStage = sizeof rows[0] + sizeof columns[0] +
                                             (kRowVector ? L::kRows * sizeof(float) : 0) +
                                             (kColumnVector ? L::kColumns * sizeof(float) : 0);
};

}  // namespace torchext::sm90
