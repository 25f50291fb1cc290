// Moves registers between warpgroups (PTX ISA "Miscellaneous Instructions: setmaxnreg"; PTX 8.0,
// sm_90a). All warps of a warpgroup execute it. ptxas honors it only in a kernel declared with
// __launch_bounds__(threads, 1); otherwise it warns (C7508), and the build fails.
#pragma once

#include "common.h"

namespace ptx {

// Returns the registers above `count` of each thread to the CTA's pool. `count` is a multiple of 8
// from 24 to 256.
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
