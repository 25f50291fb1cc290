// Matrices held by a warp: where their elements lie in the lanes' registers, and the products that
// mma.sync and wmma.mma make of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../frontend/decode.h"
#include "../machine/machine.h"
#include "../numerics/tensor_core.h"

namespace torchext::sim {

// The rows of A, or the columns of B: `rows` vectors of `k` elements. A register holds consecutive
// elements along k. With g = lane / 4 and t = lane % 4, the lane holds of vector g (and g + 8, ...)
// the elements from t * elements-per-register on (and from 4 registers' worth further on, ...).
// PTX documents this for mma.sync; wmma's placement is what ptxas 13.0 makes of it for sm_80.
struct OperandLayout {
  int rows = 0, k = 0;
  int bits = 0;       // of an element; 64: a register pair of one element
  bool is_b = false;  // 16 columns of B are two blocks of 8, 16 rows of A one of 16
  int registers = 0;  // wmma holds an f16 operand up to four times over
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
  // Where the registers' values go, by register and lane: bytes into the images of A and B,
  // elements of C.
  std::vector<std::uint16_t> a_at, b_at, c_at;
  int registers_c() const { return half_c ? c.elements() / 2 : c.elements(); }
  int registers_d() const { return half_d ? c.elements() / 2 : c.elements(); }
};

// Takes the shape, the types and what else belongs to the product from an mma or a wmma.mma.
WarpProduct take_product(Decoder& d, bool wmma);
// The operands D, A, B, C into d.out.list, and d.out.execute.
void decode_product(Decoder& d, const WarpProduct& product);

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
