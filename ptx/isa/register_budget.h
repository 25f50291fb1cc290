// Moving registers between warpgroups (PTX ISA "Miscellaneous Instructions: setmaxnreg"; PTX 8.0,
// sm_90a). All warps of a warpgroup run it. ptxas honors it only in a kernel declared with
// __launch_bounds__(threads, 1); the build fails on its warning C7508 otherwise.
#pragma once

#include "common.h"

namespace ptx {

// Gives back registers above `count` (24 to 256, a multiple of 8).
template <int count>
TORCHEXT_PTX void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

// Waits until the CTA's pool can lift this warpgroup to `count` registers a thread.
template <int count>
TORCHEXT_PTX void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

}  // namespace ptx
