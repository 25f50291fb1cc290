// The names of an instruction's traits, and the unit of each class.
#include "traits.h"

#include <cstddef>

namespace torchext::sim {

Unit unit_of(OpClass op_class) {
  static const Unit kUnits[] = {
#define CLASS(name, unit, text) Unit::unit,
#include "traits.inc"
#undef CLASS
  };
  return kUnits[static_cast<std::size_t>(op_class)];
}

const char* name_of(Unit unit) {
  static const char* const kNames[] = {
#define UNIT(name, text) #name,
#include "traits.inc"
#undef UNIT
  };
  return kNames[static_cast<std::size_t>(unit)];
}

const char* name_of(OpClass op_class) {
  static const char* const kNames[] = {
#define CLASS(name, unit, text) #name,
#include "traits.inc"
#undef CLASS
  };
  return kNames[static_cast<std::size_t>(op_class)];
}

const char* name_of(Flow flow) {
  static const char* const kNames[] = {
#define FLOW(name) #name,
#include "traits.inc"
#undef FLOW
  };
  return kNames[static_cast<std::size_t>(flow)];
}

const char* name_of(Wait wait) {
  static const char* const kNames[] = {
#define WAIT(name) #name,
#include "traits.inc"
#undef WAIT
  };
  return kNames[static_cast<std::size_t>(wait)];
}

const char* name_of(Completion completion) {
  static const char* const kNames[] = {
#define COMPLETION(name) #name,
#include "traits.inc"
#undef COMPLETION
  };
  return kNames[static_cast<std::size_t>(completion)];
}

const char* name_of(Proxy proxy) {
  static const char* const kNames[] = {"generic", "async", "tensormap", "noncoherent"};
  return kNames[static_cast<std::size_t>(proxy)];
}

const char* name_of(Space space) {
  static const char* const kNames[] = {"generic", "global", "shared",  "shared::cluster",
                                       "local",   "param",  "constant"};
  return kNames[static_cast<std::size_t>(space)];
}

}  // namespace torchext::sim
