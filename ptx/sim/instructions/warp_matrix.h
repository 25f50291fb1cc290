// Matrices in the registers of a warp: which lane holds which element, and the products that
// mma.sync and wmma.mma compute.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../frontend/decode.h"
#include "../machine/machine.h"
#include "../numerics/tensor_core.h"

namespace torchext::sim {

// The rows of A, or the columns of B: `rows` vectors of `k` elements. A register holds `per`
// elements that are consecutive along k. With g = lane / 4 and t = lane % 4, a lane holds elements
// of the vectors g, g + 8, ...; its registers begin at the elements t * per, (t + 4) * per, ...
// PTX documents this for mma.sync. For wmma, it is the placement in ptxas 13.0's code for sm_80.
struct OperandLayout {
  int rows = 0, k = 0;
  int bits = 0;       // of an element; 64: a register pair of one element
  bool is_b = false;  // B has two blocks of 8 columns where A has one of 16 rows
  int registers = 0;  // wmma holds up to four copies of an f16 operand
  int per() const { return bits == 64 ? 1 : 32 / bits; }
  int distinct() const { return rows * k / 32 / per(); }
  // The vector and the first element along k of register r.
  void position(int lane, int r, int* row, int* kk) const;
};

// C or D, m x n.
struct AccumulatorLayout {
  int m = 0, n = 0;
  int elements() const { return m * n / 32; }  // in each lane
  void position(int lane, int e, int* row, int* column) const;
};

// D = A * B + C as one instruction of a warp computes it.
struct WarpProduct {
  enum Kind : std::uint8_t { tensor_core, integers, single_bits, doubles };
  Kind kind = tensor_core;
  OperandLayout a, b;
  AccumulatorLayout c;
  // tensor_core
  NumberFormat a_format = NumberFormat::f16, b_format = NumberFormat::f16;
  MmaModel model{};
  bool half_c = false, half_d = false;  // f16, in pairs
  // integers: 8 or 4 bits
  bool a_signed = false, b_signed = false, saturate = false;
  bool conjunction = false;  // single_bits: count a & b, not a ^ b
  int rounding = 0;          // doubles: the <cfenv> mode
  // Where each register of each lane goes: byte offsets in the images of A and B, and element
  // indices in C.
  std::vector<std::uint16_t> a_at, b_at, c_at;
  int registers_c() const { return half_c ? c.elements() / 2 : c.elements(); }
  int registers_d() const { return half_d ? c.elements() / 2 : c.elements(); }
};

// Takes the shape, the types and the other modifiers of an mma or a wmma.mma.
WarpProduct take_product(Decoder& d, bool wmma);
// The operands D, A, B, C into d.out.list, and d.out.execute.
void decode_product(Decoder& d, WarpProduct product);

// "m16n8k16"
struct MatrixShape {
  int m = 0, n = 0, k = 0;
};
MatrixShape take_shape(Decoder& d);
int element_bits(const std::string& type);
// Fails unless wmma has a fragment of this type in this shape.
void require_wmma_shape(Decoder& d, bool accumulator, const std::string& type,
                        const MatrixShape& shape);
int rounding_mode(const std::string& modifier);  // rn, rz, rm, rp: the <cfenv> mode

// Reports a warp-wide matrix instruction that not all 32 lanes execute.
void need_whole_warp(Warp& w, std::uint32_t mask);

}  // namespace torchext::sim
