// Kernels for NEON, which every aarch64 processor has. The loops: loops.h.
#include <algorithm>
#include <cfloat>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#ifdef TORCHEXT_ARM_LEVELS
#include <arm_neon.h>

namespace torchext::cpu {
namespace {

// The operations of loops.h. A register is one lane of 16 bytes.
struct Neon {
  using I = uint8x16_t;
  using F = float32x4_t;
  using Squares = Neon;
  static constexpr int kBytes = 16;

  static uint16x8_t as16(I a) { return vreinterpretq_u16_u8(a); }
  static uint32x4_t as32(I a) { return vreinterpretq_u32_u8(a); }
  static int32x4_t as_s32(I a) { return vreinterpretq_s32_u8(a); }
  static I bytes(uint16x8_t a) { return vreinterpretq_u8_u16(a); }
  static I bytes(int16x8_t a) { return vreinterpretq_u8_s16(a); }
  static I bytes(uint32x4_t a) { return vreinterpretq_u8_u32(a); }
  static I bytes(int32x4_t a) { return vreinterpretq_u8_s32(a); }
  static I bytes(uint64x2_t a) { return vreinterpretq_u8_u64(a); }

  static I load(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
  static I load_first(const void* p, int n) {
    alignas(kBytes) uint8_t bytes[kBytes] = {};
    std::memcpy(bytes, p, size_t(n));
    return load(bytes);
  }
  static void store_first(void* p, I a, int n) {
    alignas(kBytes) uint8_t bytes[kBytes];
    store(bytes, a);
    std::memcpy(p, bytes, size_t(n));
  }
  static void store(void* p, I a) { vst1q_u8(static_cast<uint8_t*>(p), a); }
  static void stream(void* p, I a) { store(p, a); }
  static void fence() {}
  static I zero() { return vdupq_n_u8(0); }
  static I set8(uint8_t a) { return vdupq_n_u8(a); }
  static I set16(uint16_t a) { return bytes(vdupq_n_u16(a)); }
  static I set32(uint32_t a) { return bytes(vdupq_n_u32(a)); }
  static F setf(float a) { return vdupq_n_f32(a); }
  static I as_int(F a) { return vreinterpretq_u8_f32(a); }
  static F as_float(I a) { return vreinterpretq_f32_u8(a); }

  static constexpr bool kHasPlanes = false;  // both_loops.h

  static I and_(I a, I b) { return vandq_u8(a, b); }
  static I sub8(I a, I b) { return vsubq_u8(a, b); }
  static I subs_u8(I a, I b) { return vqsubq_u8(a, b); }
  static I add16(I a, I b) { return bytes(vaddq_u16(as16(a), as16(b))); }
  static I sub16(I a, I b) { return bytes(vsubq_u16(as16(a), as16(b))); }
  static I max_u16(I a, I b) { return bytes(vmaxq_u16(as16(a), as16(b))); }
  static I add32(I a, I b) { return bytes(vaddq_u32(as32(a), as32(b))); }
  static I sub32(I a, I b) { return bytes(vsubq_u32(as32(a), as32(b))); }
  static I max_u32(I a, I b) { return bytes(vmaxq_u32(as32(a), as32(b))); }
  static I max_s32(I a, I b) { return bytes(vmaxq_s32(as_s32(a), as_s32(b))); }
  template <int kBits>
  static I srl16(I a) {
    return bytes(vshrq_n_u16(as16(a), kBits));
  }
  template <int kBits>
  static I srl32(I a) {
    return bytes(vshrq_n_u32(as32(a), kBits));
  }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F fmadd(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F fmsub(F a, F b, F c) { return vfmaq_f32(vnegq_f32(c), a, b); }
  static F fnmadd(F a, F b, F c) { return vfmsq_f32(c, a, b); }

  static I zip8_low(I a, I b) { return vzip1q_u8(a, b); }
  static I zip8_high(I a, I b) { return vzip2q_u8(a, b); }
  static I zip16_low(I a, I b) { return bytes(vzip1q_u16(as16(a), as16(b))); }
  static I zip16_high(I a, I b) { return bytes(vzip2q_u16(as16(a), as16(b))); }
  static I zip32_low(I a, I b) { return bytes(vzip1q_u32(as32(a), as32(b))); }
  static I zip32_high(I a, I b) { return bytes(vzip2q_u32(as32(a), as32(b))); }
  static I zip64_low(I a, I b) {
    return bytes(vzip1q_u64(vreinterpretq_u64_u8(a), vreinterpretq_u64_u8(b)));
  }
  static I zip64_high(I a, I b) {
    return bytes(vzip2q_u64(vreinterpretq_u64_u8(a), vreinterpretq_u64_u8(b)));
  }
  // There is one lane: nothing to join.
  template <class Join>
  static void join_lanes(const I (&a)[4], I (&joined)[4], const Join&) {
    for (int i = 0; i < 4; ++i) joined[i] = a[i];
  }

  static uint32_t reduce_max_u16(I a) { return vmaxvq_u16(as16(a)); }
  static uint32_t reduce_max_u32(I a) { return vmaxvq_u32(as32(a)); }

  // 4 elements as FP32.
  template <class In>
  static F load_wide(const typename In::Bits* x) {
    if constexpr (std::is_same_v<In, Float>)
      return vreinterpretq_f32_u32(vld1q_u32(x));
    else if constexpr (std::is_same_v<In, Half>)
      return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x)));
    else
      return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(x), 16));
  }
  // 4 finite FP8 codes as FP32.
  template <bool kE5m2>
  static F load_codes(const uint8_t* data) {
    uint32_t four;
    std::memcpy(&four, data, 4);
    const uint16x4_t words = vget_low_u16(vmovl_u8(vcreate_u8(four)));
    if constexpr (kE5m2) {
      return vcvt_f32_f16(vreinterpret_f16_u16(vshl_n_u16(words, 8)));
    } else {
      // As FP16, E4M3 codes stand for 2^-8 times their values.
      const uint16x4_t magnitude = vand_u16(words, vdup_n_u16(0x7f));
      const uint16x4_t sign = vand_u16(words, vdup_n_u16(0x80));
      const uint16x4_t half = vorr_u16(vshl_n_u16(magnitude, 7), vshl_n_u16(sign, 8));
      return vmulq_f32(vcvt_f32_f16(vreinterpret_f16_u16(half)), vdupq_n_f32(0x1p8f));
    }
  }
  static void store_half(uint8_t* to, F a, bool) {
    vst1_u8(to, vreinterpret_u8_f16(vcvt_f16_f32(a)));
  }

  // The low and the high halves of each word of two registers, in an order that joined_in_order
  // undoes after two rounds.
  static I low_words(I a, I b) { return bytes(vuzp1q_u16(as16(a), as16(b))); }
  static I high_words(I a, I b) { return bytes(vuzp2q_u16(as16(a), as16(b))); }
  static I low_bytes(I a, I b) { return vuzp1q_u8(a, b); }
  static I high_bytes(I a, I b) { return vuzp2q_u8(a, b); }
  static I joined_in_order(I a) { return a; }
  // The largest power of two of at most |a|, but at least that of kLeast, with the sign of a.
  template <uint32_t kLeast>
  static F signed_power(F a) {
    const I power = max_s32(and_(as_int(a), set32(0x7f800000)), set32(kLeast));
    return as_float(vorrq_u8(power, and_(as_int(a), set32(0x80000000))));
  }
  // `code` with the sign bits of `sign`.
  static I merge_sign(I code, I sign) { return vorrq_u8(code, and_(sign, set8(0x80))); }

  // ---- BF16 to FP8 ----

  struct Table {
    I first, limit;
  };
  static Table significands(const Significands& tables, uint32_t key) {
    return {load(tables.first[key]), load(tables.limit[key])};
  }
  // Encodes 16 elements. False if one of them might have a subnormal code.
  template <int kMantissa>
  static bool encode_bf16(const uint16_t* x, const Table& table, I base, I& codes) {
    const I a = load(x), b = load(x + 8);
    const I low = vuzp1q_u8(a, b), high = vuzp2q_u8(a, b);
    const I exponents = vsriq_n_u8(vshlq_n_u8(high, 1), low, 7);
    const I fractions = and_(low, set8(0x7f));
    const I block = vshrq_n_u8(fractions, 3);
    const I above = vcgtq_u8(fractions, vqtbl1q_u8(table.limit, block));
    const I significands = sub8(vqtbl1q_u8(table.first, block), above);
    const I excess = subs_u8(exponents, base);
    const I small = vceqzq_u8(excess);
    const I sum = vaddq_u8(vshlq_n_u8(excess, kMantissa), significands);
    codes = merge_sign(vbicq_u8(sum, small), high);
    return vmaxvq_u8(vbicq_u8(small, vceqzq_u8(exponents))) == 0;
  }

  // ---- FP8 to BF16 ----

  struct Products {
    I low, high;  // bytes of products
  };
  static I look_up(I table, I index) { return vqtbl1q_u8(table, index); }
  // BF16(i * unit * scale) for i = 0 to 15.
  static Products products(float scale, float unit) {
    const auto rounded = [=](float first) {
      const F numbers = {first, first + 1, first + 2, first + 3};
      const I bits = as_int(mul(mul(numbers, setf(unit)), setf(scale)));
      const I odd = and_(srl32<16>(bits), set32(1));
      return vmovn_u32(as32(srl32<16>(add32(bits, add32(odd, set32(0x7fff))))));
    };
    const I first = bytes(vcombine_u16(rounded(0), rounded(4)));
    const I second = bytes(vcombine_u16(rounded(8), rounded(12)));
    return {vuzp1q_u8(first, second), vuzp2q_u8(first, second)};
  }
  static I spread(I a) { return a; }
  // True if all codes are below `limit`, signs aside.
  static bool all_below(I codes, uint8_t limit) {
    return vmaxvq_u8(and_(codes, set8(0x7f))) < limit;
  }

  // ---- transposes ----

  static I load_lanes(const uint8_t* p, int64_t) { return load(p); }
};

#include "loops.h"
}  // namespace

const Kernels neon_kernels = make_kernels<Neon>();
}  // namespace torchext::cpu
#endif
