// The facts about an instruction that code outside its family may use: scheduler, checks, deadlock
// reports, a timing model. Decoders set them. Nothing else compares an opcode's name.
#pragma once

#include <cstdint>
#include <string>

namespace torchext::sim {

#define UNIT(name, text) name,
enum class Unit : std::uint8_t {
#include "traits.inc"
};
#undef UNIT

#define CLASS(name, unit, text) name,
enum class OpClass : std::uint8_t {
#include "traits.inc"
};
#undef CLASS

#define FLOW(name) name,
enum class Flow : std::uint8_t {
#include "traits.inc"
};
#undef FLOW

#define WAIT(name) name,
enum class Wait : std::uint8_t {
#include "traits.inc"
};
#undef WAIT

#define COMPLETION(name) name,
enum class Completion : std::uint8_t {
#include "traits.inc"
};
#undef COMPLETION

enum class Space : std::uint8_t { generic, global, shared, shared_cluster, local, param, constant };

// The path to memory. noncoherent is ld.global.nc's, through a cache that no store updates.
enum class Proxy : std::uint8_t { generic, async, tensormap, noncoherent };

// The memory that an instruction reads and writes, at once or asynchronously.
struct MemoryUse {
  bool reads = false, writes = false;
  Proxy proxy = Proxy::generic;
  Space from = Space::generic, to = Space::generic;  // read from, written to
  std::uint32_t bytes = 0;  // for each lane; 0: none, or known only at execution
};

class Warp;
struct Group;
// The text of a deadlock report about waiting lanes: "waits at barrier 0, where ...".
using DescribeWait = std::string (*)(Warp&, const Group&);

struct Traits {
  OpClass op_class = OpClass::hint;
  Flow flow = Flow::next;
  Wait wait = Wait::nothing;
  Completion completion = Completion::at_once;
  bool times_out = false;                // its wait may end without success, as its predicate says
  DescribeWait describe_wait = nullptr;  // nullptr: "waits at OPCODE"
  MemoryUse memory;
  bool compares = false;  // the integers s[0] and s[1]: deadlock reports say with what

  bool asynchronous() const { return completion != Completion::at_once; }
};

Unit unit_of(OpClass op_class);
const char* name_of(Unit unit);
const char* name_of(OpClass op_class);
const char* name_of(Flow flow);
const char* name_of(Wait wait);
const char* name_of(Completion completion);
const char* name_of(Proxy proxy);
const char* name_of(Space space);

}  // namespace torchext::sim
