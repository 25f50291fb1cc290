// Decoders of bulk and tensor copies, which the decoder of `cp` in copies.cpp calls.
#pragma once

namespace torchext::sim {

class Decoder;

void decode_bulk(Decoder& d, bool reduce);         // bulk_copies.cpp: cp.async.bulk
void decode_bulk_tensor(Decoder& d, bool reduce);  // tensor_copies.cpp: cp.async.bulk.tensor

}  // namespace torchext::sim
