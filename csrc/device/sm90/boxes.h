// The boxes in which TMA moves tiles under 128-byte swizzle: facts that a launcher, which encodes
// tensor maps, shares with the kernel that fills the boxes. Plain C++.
#pragma once

namespace torchext::sm90 {

constexpr int kSwizzleBytes = 128;  // bytes of a row of a box
constexpr int kStoreRows = 64;      // rows of a store's box: those of a warpgroup's accumulator
constexpr int kStoreBoxBytes = kStoreRows * kSwizzleBytes;

}  // namespace torchext::sm90
