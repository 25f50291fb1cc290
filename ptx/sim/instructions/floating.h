// Decoders that the files of floating-point instructions share.
#pragma once

#include "../frontend/decode.h"

namespace torchext::sim {

// add, sub, mul, div, fma, mad, min, max, neg, abs, copysign on floats. `type` is already taken.
void decode_float_arithmetic(Decoder& d, Type type);
void decode_f64_arithmetic(Decoder& d);
void decode_f64_root(Decoder& d);  // rcp, sqrt, rsqrt

}  // namespace torchext::sim
