// Picks one thread of a converged warp (PTX ISA "elect.sync"; PTX 8.0, sm_90). The compiler then
// knows that one lane executes what follows, and keeps the addresses of TMA instructions in uniform
// registers.
#pragma once

#include "common.h"

namespace ptx {

// True in exactly one lane; all 32 lanes call it.
TORCHEXT_PTX bool elect_sync() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred leader;\n"
      "elect.sync _|leader, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, leader;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

}  // namespace ptx
