// Validity of register bits: which bits of a result depend on bits that nothing has assigned. Most
// registers are assigned whole, and a mask of lanes says so (Warp::valid). Invalid bits of a lane
// are followed bit by bit, as Memcheck does: it is no fault to copy, pack or mask invalid bits, but
// an address, a predicate or a stored byte must not depend on them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../machine/machine.h"

namespace torchext::sim {

// How invalid operand bits make result bits invalid. A functor of lanes.h states its `spread`.
enum class Spread : std::uint8_t {
  all,     // one invalid operand bit makes all result bits invalid
  carry,   // it makes its own position and all higher ones invalid (addition)
  halves,  // it makes the 16 bits of its half invalid
  bits,    // each result bit depends on at most one bit of each operand
};

template <class F, class = void>
struct SpreadOf {
  static constexpr Spread value = Spread::all;
};
template <class F>
struct SpreadOf<F, std::void_t<decltype(F::spread)>> {
  static constexpr Spread value = F::spread;
};

// Valid bits of a result, given the invalid bits of its `count` operands. Not for Spread::bits.
std::uint64_t spread_invalid(Spread spread, const std::uint64_t* invalid, std::size_t count);

// For Spread::bits: the bits of result(operands) that do not depend on invalid bits. The first
// `data` operands are data. The operands after them (shift counts, selectors, positions) must be
// valid whole. Each result bit depends on at most one bit of each datum, so it is enough to try the
// invalid bits of each datum as all zeros and as all ones.
template <class Result>
std::uint64_t settled_bits(const std::uint64_t* operand, const std::uint64_t* invalid,
                           std::size_t count, std::size_t data, Result&& result) {
  for (std::size_t k = data; k < count; ++k) {
    if (invalid[k] != 0) return 0;
  }
  std::uint64_t filled[4] = {}, first = 0, differ = 0;
  for (std::uint32_t fill = 0; fill < 1u << data; ++fill) {
    for (std::size_t k = 0; k < count; ++k)
      filled[k] = (operand[k] & ~invalid[k]) | ((fill >> k) & 1 ? invalid[k] : 0);
    const std::uint64_t r = result(filled);
    if (fill == 0) first = r;
    differ |= r ^ first;
  }
  return ~differ;
}

template <class T>
constexpr std::uint64_t kAllBits =
    sizeof(T) == 8 ? ~std::uint64_t{0} : (std::uint64_t{1} << (8 * sizeof(T) % 64)) - 1;

template <class T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
std::uint64_t to_bits(T value) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

// 64 bits for each lane.
struct LaneBits {
  std::uint64_t of[32];
};

template <class F, class R, class Form, class... A>
std::decay_t<Form> first_argument(R (F::*)(Form, A...) const);
// What a function F that takes a form before its operands finds kept in the instruction.
template <class F>
using FormOf = decltype(first_argument(&F::operator()));

template <class R, class F, class... A, std::size_t... k>
R apply_to_bits(const Instruction& i, const std::uint64_t* x, std::index_sequence<k...>) {
  if constexpr (std::is_invocable_v<F, A...>)
    return F()(from_bits<A>(x[k])...);
  else
    return F()(i.as<FormOf<F>>(), from_bits<A>(x[k])...);
}

// The valid bits of R = F(A...) with the operands s[0], s[1], ... The functions of lanes.h call
// this if an operand is not valid whole in some lane.
template <class R, class F, class... A>
__attribute__((noinline, cold)) void find_valid_bits(Warp& w, const Instruction& i,
                                                     std::uint32_t mask, LaneBits* bits) {
  constexpr std::size_t count = sizeof...(A);
  constexpr std::uint64_t width[count] = {kAllBits<A>...};
  for_lanes(mask, [&](int l) {
    std::uint64_t invalid[count];
    for (std::size_t k = 0; k < count; ++k) invalid[k] = ~w.valid_bits(i.s[k], l) & width[k];
    std::uint64_t valid;
    if constexpr (SpreadOf<F>::value == Spread::bits) {
      std::uint64_t operand[count];
      for (std::size_t k = 0; k < count; ++k) operand[k] = w.integer(i.s[k], l);
      valid = settled_bits(operand, invalid, count, F::data, [&](const std::uint64_t* x) {
        return to_bits<R>(apply_to_bits<R, F, A...>(i, x, std::index_sequence_for<A...>{}));
      });
    } else {
      valid = spread_invalid(SpreadOf<F>::value, invalid, count);
    }
    bits->of[l] = valid | ~kAllBits<R>;
  });
}

}  // namespace torchext::sim
