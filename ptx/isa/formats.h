// The FP8 formats as operand types of matrix instructions.
#pragma once

namespace ptx {

struct e4m3 {};
struct e5m2 {};

}  // namespace ptx
