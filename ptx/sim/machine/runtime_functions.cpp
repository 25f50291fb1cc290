// printf, assert, malloc and free in device code.
#include "runtime_functions.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "../check/validity.h"
#include "device_heap.h"
#include "machine.h"

namespace torchext::sim {

namespace {

U64 argument(Warp& w, const CallPlan& c, std::size_t n, int lane) {
  const CallValue& v = c.arguments[n];
  if (v.kind == CallValue::in_register) return w.integer(v.slot, lane);
  U64 value = 0;
  std::memcpy(&value, w.local_bytes(lane, v).data, std::min<std::size_t>(v.bytes, 8));
  return value;
}

void put_result(Warp& w, const CallPlan& c, int lane, U64 value) {
  const CallValue& v = c.results[0];
  if (v.kind == CallValue::in_register) {
    w.put(v.slot, lane, value);
    w.set_valid(v.slot, 1u << lane, 1u << lane);
  } else if (v.kind != CallValue::none) {
    const LocalBytes at = w.local_bytes(lane, v);
    std::memcpy(at.data, &value, v.bytes);
    std::memset(at.valid, 0xff, v.bytes);
  }
}

std::int64_t sign_extended(U64 value, int bits) {
  return static_cast<std::int64_t>(value << (64 - bits)) >> (64 - bits);
}

bool read_byte(Warp& w, int lane, U64 address, char* out) {
  Place place;
  if (!w.resolve(lane, Space::generic, address, 1, false, &place)) return false;
  w.read(place, w.actor(lane), out, 1, 1u << lane, address);
  return true;
}

std::string read_string(Warp& w, int lane, U64 address) {
  std::string s;
  char c;
  while (s.size() < 4096 && read_byte(w, lane, address++, &c) && c != '\0') s += c;
  return s;
}

std::string format(Warp& w, int lane, const std::string& f, U64 arguments) {
  std::string out;
  U64 at = arguments;
  const auto next = [&](U32 bytes) {
    at = align_up(at, bytes);
    U64 value = 0;
    for (U32 b = 0; b < bytes; ++b) {
      char c = 0;
      if (!read_byte(w, lane, at + b, &c)) return U64{0};
      value |= U64{static_cast<unsigned char>(c)} << (8 * b);
    }
    at += bytes;
    return value;
  };
  for (std::size_t k = 0; k < f.size(); ++k) {
    if (f[k] != '%') {
      out += f[k];
      continue;
    }
    std::string flags = "%";
    int longs = 0, shorts = 0;
    for (++k; k < f.size() && std::strchr("-+ #0123456789.*hlzjt", f[k]) != nullptr; ++k) {
      if (f[k] == 'l' || f[k] == 'z' || f[k] == 'j' || f[k] == 't')
        longs += f[k] == 'l' ? 1 : 2;
      else if (f[k] == '*')
        flags += std::to_string(static_cast<int>(next(4)));
      else if (f[k] == 'h')
        ++shorts;
      else
        flags += f[k];
    }
    if (k >= f.size()) break;
    char text[512];
    switch (f[k]) {
      case '%':
        out += '%';
        continue;
      case 's': {
        out += read_string(w, lane, next(8));
        continue;
      }
      case 'c':
        out += static_cast<char>(next(4));
        continue;
      case 'd':
      case 'i':
        std::snprintf(text, sizeof text, (flags + PRId64).c_str(),
                      sign_extended(next(longs ? 8 : 4), longs ? 64 : 32 >> std::min(shorts, 2)));
        break;
      case 'u':
      case 'x':
      case 'X':
      case 'o': {
        const std::string conversion = f[k] == 'u'   ? PRIu64
                                       : f[k] == 'x' ? PRIx64
                                       : f[k] == 'X' ? PRIX64
                                                     : PRIo64;
        std::snprintf(text, sizeof text, (flags + conversion).c_str(),
                      next(longs ? 8 : 4) &
                          (longs ? ~U64{0} : ~U64{0} >> (64 - (32 >> std::min(shorts, 2)))));
        break;
      }
      case 'p':
        std::snprintf(text, sizeof text, "0x%" PRIx64, next(8));
        break;
      case 'f':
      case 'F':
      case 'e':
      case 'E':
      case 'g':
      case 'G':
      case 'a':
      case 'A': {
        const U64 bits = next(8);
        double v;
        std::memcpy(&v, &bits, 8);
        std::snprintf(text, sizeof text, (flags + f[k]).c_str(), v);
        break;
      }
      default:
        continue;
    }
    out += text;
  }
  return out;
}

Step print(Warp& w, const Instruction& i, U32 mask) {
  const auto& c = i.as<CallPlan>();
  for_lanes(mask, [&](int l) {
    w.grid().print(format(w, l, read_string(w, l, argument(w, c, 0, l)), argument(w, c, 1, l)));
    put_result(w, c, l, 0);
  });
  return Step::next;
}

Step assertion(Warp& w, const Instruction& i, U32 mask) {
  const auto& c = i.as<CallPlan>();
  const auto l = static_cast<int>(lane_of(mask));
  w.finding(FindingKind::assertion,
            read_string(w, l, argument(w, c, 1, l)) + ":" + std::to_string(argument(w, c, 2, l)) +
                ": " + read_string(w, l, argument(w, c, 3, l)) + ": assertion '" +
                read_string(w, l, argument(w, c, 0, l)) + "' failed",
            mask);
  throw LaunchStopped{};
}

Step allocate(Warp& w, const Instruction& i, U32 mask) {
  const auto& c = i.as<CallPlan>();
  for_lanes(mask, [&](int l) {
    const U64 bytes = argument(w, c, 0, l);
    const U64 address = w.grid().heap().allocate(bytes, w.pc(), w.grid().heap_launch());
    if (address != 0) w.start_block(address, bytes);
    put_result(w, c, l, address);
  });
  ++w.cluster().progress;
  return Step::next;
}

Step release(Warp& w, const Instruction& i, U32 mask) {
  const auto& c = i.as<CallPlan>();
  for_lanes(mask, [&](int l) {
    const U64 address = argument(w, c, 0, l);
    if (address == 0) return;
    DeviceHeap& heap = w.grid().heap();
    const U64 launch = w.grid().heap_launch();
    DeviceHeap::Block block;
    if (!heap.find(address, &block) || block.begin != address) {
      w.finding(FindingKind::invalid_free, "free of " + heap.describe(address, w.program(), launch),
                1u << l, address);
      return;
    }
    Place place;  // free counts as a store to the whole block
    if (block.live && block.bytes != 0 && w.resolve(l, Space::global, address, 1, true, &place))
      w.check_write(place, w.actor(l), static_cast<U32>(block.bytes), 1u << l, address);
    if (!heap.release(address, w.pc(), launch)) {
      w.finding(FindingKind::invalid_free,
                "second free of " + heap.describe(address, w.program(), launch), 1u << l, address);
    }
  });
  ++w.cluster().progress;
  return Step::next;
}

struct RuntimeFunction {
  const char* name;
  std::size_t arguments, results;
  Execute execute;
  bool heap;
};

const RuntimeFunction kFunctions[] = {{"vprintf", 2, 1, print, false},
                                      {"__assertfail", 5, 0, assertion, false},
                                      {"malloc", 1, 1, allocate, true},
                                      {"free", 1, 0, release, true}};

}  // namespace

bool is_runtime_function(const std::string& name) {
  return std::any_of(std::begin(kFunctions), std::end(kFunctions),
                     [&](const RuntimeFunction& f) { return name == f.name; });
}

void decode_runtime_call(Decoder& d, const std::string& name, CallPlan plan) {
  if (name.compare(0, 4, "cuda") == 0 || name.compare(0, 3, "cnp") == 0)
    d.fail("'" + name + "': dynamic parallelism is not supported");
  for (const RuntimeFunction& f : kFunctions) {
    if (name != f.name) continue;
    if (plan.arguments.size() != f.arguments || plan.results.size() != f.results)
      d.fail("'" + name + "' must be declared as the CUDA runtime has it, with " +
             std::to_string(f.arguments) + " parameters and " + std::to_string(f.results) +
             " results");
    d.builder().program().uses_heap |= f.heap;
    d.keep(std::move(plan));
    d.out.execute = f.execute;
    return;
  }
  d.fail("'" + name + "' has no body: link the module that defines it, with sim.Module([...])");
}

}  // namespace torchext::sim
