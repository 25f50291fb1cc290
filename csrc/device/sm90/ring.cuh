// A producer's or consumer's position in a ring of `stages` slots in shared memory, each with two
// mbarriers: full[slot], which loads complete, and empty[slot], at which consumers arrive when they
// have read the slot. Every role walks the ring by itself, one step for each load:
//
//   producer: wait for empty[slot], parity phase ^ 1 (returns at once in the first round);
//             arrive_expect_tx at full[slot]; start the loads; advance().
//   consumer: wait for full[slot], parity phase; read; arrive at empty[slot]; advance().
#pragma once

#include <cstdint>

namespace torchext::sm90 {

template <int stages>
struct RingPosition {
  uint32_t slot = 0, phase = 0;
  __device__ void advance() {
    if (++slot == stages) {
      slot = 0;
      phase ^= 1;  // a slot's phase flips each time round
    }
  }
};

}  // namespace torchext::sm90
