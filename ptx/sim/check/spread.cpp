// How instructions spread invalid bits, without a warp: tests link it alone.
#include "validity.h"

namespace torchext::sim {

std::uint64_t spread_invalid(Spread spread, const std::uint64_t* invalid, std::size_t count) {
  std::uint64_t any = 0;
  for (std::size_t k = 0; k < count; ++k) any |= invalid[k];
  switch (spread) {
    case Spread::carry:
      return any == 0 ? ~std::uint64_t{0} : (any & -any) - 1;
    case Spread::halves: {
      std::uint64_t valid = ~std::uint64_t{0};
      for (int at = 0; at < 64; at += 16) {
        if ((any >> at) & 0xffff) valid &= ~(std::uint64_t{0xffff} << at);
      }
      return valid;
    }
    default:
      return any == 0 ? ~std::uint64_t{0} : 0;
  }
}

}  // namespace torchext::sim
