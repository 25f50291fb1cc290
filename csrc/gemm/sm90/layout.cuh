// What a tile's shape and granularity imply: how the work is divided among warpgroups, and what is
// in shared memory. The static asserts of Layout are the contract of a tile.
#pragma once

#include "params.h"
#include "ptx/isa/mbarrier.h"

namespace torchext::sm90 {

// How an operand's scales reach the accumulators.
enum class Scales {
  kNone,    // row-wise: the epilogue applies them
  kVector,  // 1x128: one for each row or column. Columns': TMA brings them with the K block. Rows':
            // each thread loads those of its rows
  kBlock,   // 128x128: one for all rows (or columns), a few in wide tiles; by ld.global
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
  static constexpr int kTileColumns = kGated ? columns / 2 : columns;  // that one box of b holds
  static constexpr int kTileN = swapped ? rows : kTileColumns;

  // Which operand has which scales:
  //
  //   granularity   rows       columns
  //   1D1D          vector     vector
  //   1D2D          vector     block     (swapped: block, vector: b's scales are the blocks)
  //   row-wise      none       none
  static constexpr bool k1D2D = granularity == Granularity::k1D2D;
  static constexpr bool kRowwise = granularity == Granularity::kRowwise;
  static constexpr bool kRowsAreB = swapped;
  static constexpr Scales scales_of(bool is_b) {
    if (kRowwise) return Scales::kNone;
    return k1D2D && is_b ? Scales::kBlock : Scales::kVector;
  }
  static constexpr Scales kRowScales = scales_of(kRowsAreB);
  static constexpr Scales kColumnScales = scales_of(!kRowsAreB);

  // Consumer warpgroups divide the tile's rows. For each K block, a warpgroup computes its kBlocks
  // = kSlices x kParts blocks of 64 rows and kPartColumns columns, one after another.
  static constexpr int kWarpgroups = rows == 64 ? 1 : 2;
  static constexpr int kConsumers = 128 * kWarpgroups, kThreads = 128 + kConsumers;
  static constexpr int kSlices = rows / (64 * kWarpgroups);
  static constexpr int kParts = columns > 192 ? columns / 128 : 1;
  static constexpr int kPartColumns = columns / kParts;
  static constexpr int kBlocks = kSlices * kParts;
  static constexpr int kRegisters = kPartColumns / 2;  // of an accumulator, in each thread

  // What follows from the tile's shape and granularity:
  //
  //                  buffers, by column scales   128x128   store boxes
  //   columns        block or none    vector      scales    (not swapped)
  //   16, 32, 64           2             2           1            1
  //   128                  2             1           1            2
  //   128, 256 rows        1             1           1            4
  //   192                  1             1           3            3
  //   256                  1             1           2            4
  //   256, gated           1             1           3            1
  //   128, activated       2             1           1            1
  //
  // With two buffers, a warpgroup promotes one while the tensor cores fill the other. With one
  // buffer, the other warpgroup uses the tensor cores while this one promotes.
  static constexpr int kMostColumnsOfTwo = kColumnScales == Scales::kVector ? 127 : 191;
  static constexpr bool kTwoBuffersFit = kBlocks == 1 && kPartColumns <= kMostColumnsOfTwo;
  static constexpr int kBuffers = kTwoBuffersFit ? 2 : 1;

  // The 128x128 scales that a tile needs for a K block: one for each kBlockSpan features. A tile's
  // features begin at a multiple of its width, so 192 of them may begin in the middle of a block. A
  // gated tile needs one scale for the gate and two for up, which may begin anywhere in a block.
  static constexpr bool kSharesOneBlock = swapped || columns <= 128;
  static constexpr bool kStartsAtBlock = kSharesOneBlock || columns % 128 == 0;
  static constexpr int kBlockSpan = kStartsAtBlock ? 128 : 64;
  static constexpr int count_block_scales() {
    if (kGated) return 3;
    return kSharesOneBlock ? 1 : columns / kBlockSpan;
  }
  static constexpr int kBlockScales = count_block_scales();
  static_assert(128 % kTileN == 0 || kTileN % 64 == 0, "a tile begins at half a block of scales");

  // How many boxes of the TMA store, each of 64 rows and 128 bytes, a warpgroup fills in turns.
  static constexpr int count_store_boxes() {
    if (output != Output::kStored) return 1;
    return kBlocks == 2 || columns >= 256 ? 4 : columns / 64;
  }
  static constexpr int kStoreBoxes = count_store_boxes();

  static_assert(rows == 64 || rows == 128 || rows == 256);
  static_assert(columns % 16 == 0 && columns <= 256);
  static_assert(!swapped || (kBlocks == 1 && rows <= 128),
                "swapped: a tile's features share a block of scales");
  static_assert(swapped || columns % 64 == 0, "whole boxes of the TMA store");
  static_assert(output == Output::kStored ||
                    (kPartColumns == kScaleGroup && kSlices == 1 && !swapped),
                "a warpgroup holds whole groups of the output");
};

template <class L>
struct Shared {
  static constexpr bool kColumnVector = L::kColumnScales == Scales::kVector;

  // Under 128-byte swizzle, TMA and wgmma need an alignment of 1024 bytes, which every array before
  // the scales has. The scales have the 128 bytes that TMA needs without swizzle.
  uint8_t rows[L::kStages][L::kRows * kTileK];
  uint8_t columns[L::kStages][L::kColumns * kTileK];
  uint8_t store[L::kSwapped ? 1 : L::kWarpgroups]
               [L::kSwapped ? 1024 : L::kStoreBoxes * kStoreBoxBytes];
  float column_scale[kColumnVector ? L::kStages : 1][L::kColumns < 32 ? 32 : L::kColumns];
  // Swapped tiles: the transposed product. Rows have four extra floats, so that the threads that
  // write a column use different banks.
  float staged[L::kSwapped ? L::kColumns : 1][L::kRows + 4];
  // Other tiles: row-wise scale and bias of each column.
  float factor[L::kSwapped ? 1 : L::kWarpgroups][L::kColumns];
  float bias[L::kSwapped ? 1 : L::kWarpgroups][L::kColumns];
  ptx::mbarrier full[L::kStages], empty[L::kStages];
  ptx::mbarrier staged_full, staged_empty;  // all CTAs of the cluster arrive
  uint32_t tile_end[];                      // Schedule::list_groups; as many as there are groups

  static constexpr uint32_t kBytesPerStage = sizeof rows[0] + sizeof columns[0];  // no scales
};

}  // namespace torchext::sm90
