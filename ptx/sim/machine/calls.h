// Calls of device functions: where arguments and results lie, and what a return restores.
//
// The registers and local variables of a function have a fixed place in the warp, so entering it is
// free. A function that may call itself, directly or through others, is "framed": its local
// variables lie on the lane's stack, and a call saves its registers. alloca takes memory from the
// same stack.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../frontend/ir.h"

namespace torchext::sim {

// Addresses of local memory at or above this one lie on the lane's stack.
constexpr std::uint32_t kStackBase = 0x0100'0000;
constexpr std::uint32_t kStackBytes = 256 * 1024;
// The least size of a frame, so that endless recursion ends before the host's memory does.
constexpr std::uint32_t kLeastFrame = 64;
constexpr std::uint32_t kFrameAlign = 128;

// Where one argument or result of a call lies, for the caller or for the callee.
struct CallValue {
  enum Kind : std::uint8_t { none, in_register, in_local, in_frame };
  Kind kind = none;
  Slot slot;                 // in_register
  std::uint32_t offset = 0;  // in_local: of the lane's local memory; in_frame: of its frame
  std::uint32_t bytes = 0;
};

struct Callee {
  std::string name;
  std::uint64_t address = 0;  // what a pointer to it holds
  std::uint32_t entry = 0;
  std::vector<CallValue> params, results;
  bool framed = false;
  std::uint32_t frame_bytes = 0;
  std::uint32_t first_register = 0, register_count = 0;   // framed: what a call saves
  std::uint32_t registers_begin = 0, registers_end = 0;   // the same, in bytes of the register file
  std::vector<std::uint8_t> widths;                       // of each: 8, 4, or 0 for a predicate
  std::vector<std::pair<Slot, std::uint32_t>> addresses;  // of local variables: slot, offset
};

struct CallPlan {  // what the decoder of a call keeps
  std::vector<CallValue> arguments, results;
  const Callee* direct = nullptr;
  Slot pointer;                           // if it is not direct
  std::vector<const Callee*> candidates;  // whose signature fits, by address
};

// From this, a return restores the caller's stack and the registers of the entered function.
struct Activation {
  std::array<std::uint32_t, 32> stack_top, frame;
  std::vector<std::uint8_t> registers;
  std::vector<std::uint32_t> valid;
  std::vector<std::pair<std::uint32_t, std::array<std::uint64_t, 32>>> partly_valid;
};

struct CallFrame {
  std::uint32_t pc = 0;  // of the call instruction
  const Callee* callee = nullptr;
  std::shared_ptr<const Activation> saved;  // none in programs that use no stack
  bool operator==(const CallFrame& other) const {
    return pc == other.pc && callee == other.callee && saved == other.saved;
  }
};

}  // namespace torchext::sim
