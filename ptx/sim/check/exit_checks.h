// Checks of work that lanes must have finished before they exit.
#pragma once

#include <cstdint>

namespace torchext::sim {

class Warp;

void before_exit(Warp& warp, std::uint32_t lanes);
void after_exit(Warp& warp, std::uint32_t lanes);

}  // namespace torchext::sim
