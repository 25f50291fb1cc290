// Registers in which only some bits have been assigned.
#include "validity.h"

#include <string>

namespace torchext::sim {

std::uint64_t Warp::partly_valid_bits(const Slot& slot, int lane) const {
  const auto it = partly_valid_.find(slot.reg);
  return it == partly_valid_.end() ? 0 : it->second[static_cast<std::size_t>(lane)];
}

void Warp::forget_valid_bits(const Slot& slot, std::uint32_t lanes) {
  const auto it = partly_valid_.find(slot.reg);
  if (it == partly_valid_.end()) return;
  for_lanes(lanes, [&](int l) { it->second[static_cast<std::size_t>(l)] = 0; });
}

void Warp::set_valid_bits(const Slot& slot, std::uint32_t mask, const LaneBits& bits) {
  const std::uint64_t all = slot.bytes == 8 ? ~std::uint64_t{0} : 0xffffffff;
  std::uint32_t whole = 0;
  for_lanes(mask,
            [&](int l) { whole |= static_cast<std::uint32_t>((bits.of[l] & all) == all) << l; });
  set_valid(slot, mask, whole);
  for_lanes(mask & ~whole, [&](int l) {
    if ((bits.of[l] & all) != 0) partly_valid_[slot.reg][static_cast<std::size_t>(l)] = bits.of[l];
  });
}

void Warp::copy_valid(const Slot& to, std::uint32_t mask, const Slot& from) {
  if ((mask & ~valid(from)) == 0 || partly_valid_.empty()) {
    set_valid(to, mask, valid(from));
    return;
  }
  LaneBits bits;
  for_lanes(mask, [&](int l) { bits.of[l] = valid_bits(from, l); });
  set_valid_bits(to, mask, bits);
}

void Warp::need(const Slot& slot, std::uint32_t mask, const char* use, std::uint64_t bits) {
  std::uint32_t missing = mask & ~valid_[slot.reg];
  if (missing == 0 || !grid_.checks) return;
  std::uint64_t lacking = 0, present = 0;
  if (slot.bytes != 8) bits &= 0xffffffff;
  for_lanes(missing, [&](int l) {
    const std::uint64_t valid = valid_bits(slot, l);
    if ((valid & bits) == bits)
      missing &= ~(1u << l);
    else
      lacking |= bits & ~valid, present |= valid;
  });
  if (missing == 0) return;
  std::string what = "register " + program_.register_names[slot.reg] + " is used " + use;
  if (present == 0) {
    what += " but was never assigned";
  } else {
    what += " but bits " + std::to_string(__builtin_ctzll(lacking)) + " to " +
            std::to_string(63 - __builtin_clzll(lacking)) + " of it were never assigned";
  }
  finding(FindingKind::uninitialized_register, what, missing);
  set_valid(slot, missing, missing);  // report it only once
}

}  // namespace torchext::sim
