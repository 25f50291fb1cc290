// Control flow: bra, brx.idx, call, ret, exit, trap; and the device functions that the CUDA runtime
// provides (vprintf, __assertfail).
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "decode.h"
#include "exit_checks.h"
#include "lanes.h"

namespace torchext::sim {

namespace {

using U32 = std::uint32_t;
using U64 = std::uint64_t;

Step bra(Warp& w, const Instruction& i, U32 mask) {
  w.branch(i, mask);
  return Step::jump;
}

void decode_bra(Decoder& d) {
  d.take("uni");
  d.finish(1);
  d.out.target = d.label(d.arg(0));
  d.out.execute = bra;
}

Step brx(Warp& w, const Instruction& i, U32 mask) {
  const auto& targets = *static_cast<const std::vector<U32>*>(i.extra);
  w.need(i.s[0], mask, "as a branch index");
  U32 to[32] = {};
  for_lanes(mask, [&](int l) {
    const U64 index = w.integer(i.s[0], l);
    if (index >= targets.size()) {
      w.finding(FindingKind::invalid_operand,
                "branch index " + std::to_string(index) + " of a table of " +
                    std::to_string(targets.size()),
                1u << l);
      throw LaunchStopped{};
    }
    to[l] = targets[index];
  });
  w.branch_each(to, mask, i.reconverge);
  return Step::jump;
}

void decode_brx(Decoder& d) {
  if (!d.take("idx")) d.fail("expected .idx");
  d.take("uni");
  d.finish(2);
  d.out.s[0] = d.source(0, Type::u32);
  std::vector<U32> targets;
  for (const std::string& name : d.branch_table(d.arg(1)).targets) {
    Arg label;
    label.kind = Arg::name;
    label.text = name;
    targets.push_back(d.label(label));
  }
  d.own(std::move(targets));
  d.out.execute = brx;
}

// ---- Calls --------------------------------------------------------------------------------------

struct CallPlan {
  struct Copy {
    U32 from, to, bytes;
  };  // within a lane's local memory
  std::vector<Copy> arguments, results;
};

void copy(Warp& w, const std::vector<CallPlan::Copy>& copies, U32 mask) {
  const U32 size = w.program().local_bytes;
  for_lanes(mask, [&](int l) {
    for (const auto& c : copies) {
      const std::size_t base = static_cast<std::size_t>(l) * size;
      std::memcpy(w.local.data() + base + c.to, w.local.data() + base + c.from, c.bytes);
      std::memcpy(w.local_valid.data() + base + c.to, w.local_valid.data() + base + c.from,
                  c.bytes);
    }
  });
}

Step call(Warp& w, const Instruction& i, U32 mask) {
  const auto& plan = *static_cast<const CallPlan*>(i.extra);
  copy(w, plan.arguments, mask);
  w.enter(i.target, mask);
  return Step::jump;
}

Step leave(Warp& w, const Instruction&, U32 mask) {
  if (w.group().calls.empty()) {
    before_exit(w, mask);
    w.exit_lanes(mask);
    after_exit(w);
    return Step::jump;
  }
  const U32 at = w.group().calls.back();
  copy(w, static_cast<const CallPlan*>(w.program().code[at].extra)->results, mask);
  w.leave(mask);
  return Step::jump;
}

Step exit(Warp& w, const Instruction&, U32 mask) {
  before_exit(w, mask);
  w.exit_lanes(mask);
  after_exit(w);
  return Step::jump;
}

Step trap(Warp& w, const Instruction&, U32 mask) {
  w.finding(FindingKind::trap, "the kernel executed trap", mask);
  throw LaunchStopped{};
}

// ---- Runtime functions --------------------------------------------------------------------------

struct RuntimeCall {
  std::vector<std::pair<U32, U32>> arguments;
  U32 result = ~0u;
};

U64 argument(Warp& w, const RuntimeCall& c, std::size_t n, int lane) {
  U64 value = 0;
  const auto [at, bytes] = c.arguments.at(n);
  std::memcpy(&value,
              w.local.data() + static_cast<std::size_t>(lane) * w.program().local_bytes + at,
              bytes < 8 ? bytes : 8);
  return value;
}

bool read_byte(Warp& w, int lane, U64 address, char* out) {
  Place place;
  if (!w.resolve(lane, Space::generic, address, 1, false, &place)) return false;
  *out = static_cast<char>(*place.host);
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
    at = (at + bytes - 1) / bytes * bytes;
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
    int longs = 0;
    for (++k; k < f.size() && std::strchr("-+ #0123456789.*hlzjt", f[k]) != nullptr; ++k) {
      if (f[k] == 'l' || f[k] == 'z' || f[k] == 'j' || f[k] == 't')
        longs += f[k] == 'l' ? 1 : 2;
      else if (f[k] == '*')
        flags += std::to_string(static_cast<int>(next(4)));
      else if (f[k] != 'h')
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
                      longs ? static_cast<std::int64_t>(next(8))
                            : std::int64_t{static_cast<std::int32_t>(next(4))});
        break;
      case 'u':
      case 'x':
      case 'X':
      case 'o': {
        const std::string conversion = f[k] == 'u'   ? PRIu64
                                       : f[k] == 'x' ? PRIx64
                                       : f[k] == 'X' ? PRIX64
                                                     : PRIo64;
        std::snprintf(text, sizeof text, (flags + conversion).c_str(), longs ? next(8) : next(4));
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
  const auto& c = *static_cast<const RuntimeCall*>(i.extra);
  for_lanes(mask, [&](int l) {
    w.grid().print(format(w, l, read_string(w, l, argument(w, c, 0, l)), argument(w, c, 1, l)));
    const std::size_t at = static_cast<std::size_t>(l) * w.program().local_bytes + c.result;
    if (c.result != ~0u) {
      std::memset(w.local.data() + at, 0, 4);
      std::memset(w.local_valid.data() + at, 0xff, 4);
    }
  });
  return Step::next;
}

Step assertion(Warp& w, const Instruction& i, U32 mask) {
  const auto& c = *static_cast<const RuntimeCall*>(i.extra);
  const auto l = static_cast<int>(lane_of(mask));
  w.finding(FindingKind::assertion,
            read_string(w, l, argument(w, c, 1, l)) + ":" + std::to_string(argument(w, c, 2, l)) +
                ": " + read_string(w, l, argument(w, c, 3, l)) + ": assertion '" +
                read_string(w, l, argument(w, c, 0, l)) + "' failed",
            mask);
  throw LaunchStopped{};
}

void decode_call(Decoder& d) {
  d.take("uni");
  d.finish(1, 4);
  std::size_t k = 0;
  std::vector<Arg> results, arguments;
  if (d.arg(k).kind == Arg::list) results = d.arg(k++).args;
  const Arg& target = d.arg(k++);
  if (k < d.count() && d.arg(k).kind == Arg::list) arguments = d.arg(k++).args;
  if (target.kind != Arg::name) d.fail("indirect calls are not supported");
  const Function* callee = d.builder().module().function(target.text);
  if (callee == nullptr) d.fail("unknown function '" + target.text + "'");
  const auto variable = [&](const Arg& a) {
    const Symbol* s = a.kind == Arg::name ? d.builder().symbol(d.function(), a.text) : nullptr;
    if (s == nullptr || s->space != Space::local) d.fail("an argument is not a .param variable");
    return s;
  };
  if (!callee->has_body) {
    RuntimeCall c;
    for (const Arg& a : arguments) {
      const Symbol* s = variable(a);
      c.arguments.emplace_back(static_cast<U32>(s->address), static_cast<U32>(s->bytes));
    }
    if (!results.empty()) c.result = static_cast<U32>(variable(results[0])->address);
    if (target.text == "vprintf" && arguments.size() == 2)
      d.out.execute = print;
    else if (target.text == "__assertfail" && arguments.size() == 5)
      d.out.execute = assertion;
    else
      d.fail("function '" + target.text + "' has no body and is not provided");
    d.own(std::move(c));
    return;
  }
  const auto& plan = d.builder().plan(*callee);
  if (arguments.size() != callee->params.size() || results.size() != callee->results.size())
    d.fail("wrong number of arguments");
  CallPlan c;
  for (std::size_t n = 0; n < arguments.size(); ++n) {
    const Symbol* s = variable(arguments[n]);
    const Symbol& formal = plan.symbols.at(callee->params[n].name);
    if (s->bytes < formal.bytes) d.fail("an argument is smaller than the parameter");
    c.arguments.push_back({static_cast<U32>(s->address), static_cast<U32>(formal.address),
                           static_cast<U32>(formal.bytes)});
  }
  for (std::size_t n = 0; n < results.size(); ++n) {
    const Symbol* s = variable(results[n]);
    const Symbol& formal = plan.symbols.at(callee->results[n].name);
    if (s->bytes < formal.bytes) d.fail("a result variable is too small");
    c.results.push_back({static_cast<U32>(formal.address), static_cast<U32>(s->address),
                         static_cast<U32>(formal.bytes)});
  }
  d.out.target = plan.entry;
  d.own(std::move(c));
  d.out.execute = call;
}

template <Step (*execute)(Warp&, const Instruction&, U32)>
void decode_plain(Decoder& d) {
  d.take("uni");
  d.finish(0);
  d.out.execute = execute;
}

Step nothing(Warp&, const Instruction&, U32) {
  return Step::next;
}

}  // namespace

void add_control(DecodeTable& t) {
  t["bra"] = decode_bra;
  t["brx"] = decode_brx;
  t["call"] = decode_call;
  t["ret"] = decode_plain<leave>;
  t["exit"] = decode_plain<exit>;
  t["trap"] = decode_plain<trap>;
  t["brkpt"] = decode_plain<nothing>;
}

}  // namespace torchext::sim
