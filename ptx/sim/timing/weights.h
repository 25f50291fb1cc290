// The cost of each instruction of a program: issue slots, unit, latency, registers.
#pragma once

#include <cstdint>
#include <vector>

#include "replay.h"

namespace torchext::sim::timing {

enum Pipe : std::uint8_t { kAlu, kFma, kSpecial, kConvert, kFp64, kPipes, kNoPipe = kPipes };

struct Cost {
  float slots = 1;     // issue slots: machine instructions that ptxas makes of it
  float interval = 1;  // cycles of its pipe
  float latency = 4;   // until its result may be used
  Pipe pipe = kNoPipe;
  bool in_order = false;    // waits for its operands before later instructions may issue
  bool ends_block = false;  // waits until all instructions before it have started
  bool splits = false;      // ptxas moves no arithmetic from behind it to before it
  bool hoists = false;      // arithmetic that ptxas issues as soon as its operands are there
  bool tensor = false, shuffle = false;
  std::vector<std::uint32_t> reads, writes;  // registers
};

// By instruction: true if L1 does not serve its loads.
std::vector<bool> past_l1(const Program& program);

std::vector<Cost> costs(const Program& program, const Constants& constants);

}  // namespace torchext::sim::timing
