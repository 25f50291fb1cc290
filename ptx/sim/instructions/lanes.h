// Applies a function to the operands of every lane.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../check/validity.h"

namespace torchext::sim {

// Values narrower than 4 bytes sit in the low bits of a 4-byte element.
template <class T>
struct Element {
  using Storage = std::conditional_t<sizeof(T) == 8, std::uint64_t, std::uint32_t>;
  static T load(const std::uint8_t* base, int lane) {
    T value;
    std::memcpy(&value, base + lane * static_cast<int>(sizeof(Storage)), sizeof(T));
    return value;
  }
  static void store(std::uint8_t* base, int lane, T value) {
    Storage storage = 0;
    std::memcpy(&storage, &value, sizeof(T));
    std::memcpy(base + lane * static_cast<int>(sizeof(Storage)), &storage, sizeof(Storage));
  }
};

template <class F>
inline void each_lane(std::uint32_t mask, F&& f) {
  if (mask == ~0u) {
    for (int lane = 0; lane < 32; ++lane) f(lane);
  } else {
    for_lanes(mask, f);
  }
}

// Calls `compute`, which may overwrite an operand, and records which bits of the result are valid.
// F says how invalid bits spread (validity.h) from s[0], s[1], ..., which have the types A.
template <class R, class F, class... A, class Compute>
inline void with_validity(Warp& w, const Instruction& i, std::uint32_t mask, Compute&& compute) {
  std::uint32_t valid = mask;
  for (std::size_t k = 0; k < sizeof...(A); ++k) valid &= w.valid(i.s[k]);
  LaneBits bits;
  if (valid != mask) find_valid_bits<R, F, A...>(w, i, mask, &bits);
  compute();
  w.set_validity(i.d, mask, valid == mask, bits);
}

template <class R, class A, class F>
Step map1(Warp& w, const Instruction& i, std::uint32_t mask) {
  auto* d = w.at(i.d);
  const auto* a = w.at(i.s[0]);
  with_validity<R, F, A>(w, i, mask, [&] {
    each_lane(mask, [&](int l) { Element<R>::store(d, l, F()(Element<A>::load(a, l))); });
  });
  return Step::next;
}

template <class R, class A, class B, class F>
Step map2(Warp& w, const Instruction& i, std::uint32_t mask) {
  auto* d = w.at(i.d);
  const auto* a = w.at(i.s[0]);
  const auto* b = w.at(i.s[1]);
  with_validity<R, F, A, B>(w, i, mask, [&] {
    each_lane(mask, [&](int l) {
      Element<R>::store(d, l, F()(Element<A>::load(a, l), Element<B>::load(b, l)));
    });
  });
  return Step::next;
}

template <class R, class A, class B, class C, class F>
Step map3(Warp& w, const Instruction& i, std::uint32_t mask) {
  auto* d = w.at(i.d);
  const auto* a = w.at(i.s[0]);
  const auto* b = w.at(i.s[1]);
  const auto* c = w.at(i.s[2]);
  with_validity<R, F, A, B, C>(w, i, mask, [&] {
    each_lane(mask, [&](int l) {
      Element<R>::store(
          d, l, F()(Element<A>::load(a, l), Element<B>::load(b, l), Element<C>::load(c, l)));
    });
  });
  return Step::next;
}

// As map3, but F also gets, as its first argument, what the decoder has kept.
template <class R, class A, class B, class C, class F>
Step map3_form(Warp& w, const Instruction& i, std::uint32_t mask) {
  auto* d = w.at(i.d);
  const auto* a = w.at(i.s[0]);
  const auto* b = w.at(i.s[1]);
  const auto* c = w.at(i.s[2]);
  const auto& form = i.as<FormOf<F>>();
  with_validity<R, F, A, B, C>(w, i, mask, [&] {
    each_lane(mask, [&](int l) {
      Element<R>::store(
          d, l, F()(form, Element<A>::load(a, l), Element<B>::load(b, l), Element<C>::load(c, l)));
    });
  });
  return Step::next;
}

}  // namespace torchext::sim
