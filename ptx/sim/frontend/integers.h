// Short names of the integer types, and rounding up to a multiple.
#pragma once

#include <cstdint>

namespace torchext::sim {

using U8 = std::uint8_t;
using U16 = std::uint16_t;
using U32 = std::uint32_t;
using U64 = std::uint64_t;
using S8 = std::int8_t;
using S16 = std::int16_t;
using S32 = std::int32_t;
using S64 = std::int64_t;

inline U64 align_up(U64 value, U64 to) {
  return (value + to - 1) / to * to;
}

}  // namespace torchext::sim
