// Programmatic dependent launch (PTX ISA "griddepcontrol"; PTX 7.8, sm_90): a kernel may start
// while its predecessor in the stream still runs, if LaunchConfig::overlaps is set.
#pragma once

#include "common.h"

namespace ptx {

// Waits until the kernels that this one depends on have ended and their writes are visible. Before
// this wait, a kernel must not read what they write, nor write what they read.
TORCHEXT_PTX void griddepcontrol_wait() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Lets the next kernel start as soon as every CTA has executed this or exited. It does not order
// memory: the next kernel's griddepcontrol_wait() waits for this kernel's end.
TORCHEXT_PTX void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace ptx
