// call and ret: passing values, direct and indirect calls, saving registers for recursion.
#include "calls.h"

#include <algorithm>
#include <cstring>

#include "../check/exit_checks.h"
#include "../frontend/decode.h"
#include "../instructions/lanes.h"
#include "runtime_functions.h"

namespace torchext::sim {

namespace {

// The bytes of a call's values: for each value, its lanes one after another.
struct Values {
  std::vector<std::uint8_t> data, valid;
};

void gather(Warp& w, const std::vector<CallValue>& from, U32 mask, Values* values) {
  for (const CallValue& v : from) {
    for_lanes(mask, [&](int l) {
      if (v.kind == CallValue::in_register) {
        const U64 value = w.integer(v.slot, l), valid = w.valid_bits(v.slot, l);
        const auto* bytes = reinterpret_cast<const std::uint8_t*>(&value);
        const auto* bits = reinterpret_cast<const std::uint8_t*>(&valid);
        values->data.insert(values->data.end(), bytes, bytes + v.bytes);
        values->valid.insert(values->valid.end(), bits, bits + v.bytes);
      } else {
        const LocalBytes at = w.local_bytes(l, v);
        values->data.insert(values->data.end(), at.data, at.data + v.bytes);
        values->valid.insert(values->valid.end(), at.valid, at.valid + v.bytes);
      }
    });
  }
}

// `sizes` are the sizes of the values. A destination may be larger, or absent.
void scatter(Warp& w, const std::vector<CallValue>& to, const std::vector<CallValue>& sizes,
             U32 mask, const Values& values) {
  std::size_t at = 0;
  for (std::size_t n = 0; n < sizes.size(); ++n) {
    const CallValue& v = to[n];
    const U32 bytes = sizes[n].bytes;
    LaneBits bits;
    for_lanes(mask, [&](int l) {
      if (v.kind == CallValue::in_register) {
        U64 value = 0;
        bits.of[l] = ~U64{0};
        std::memcpy(&value, values.data.data() + at, bytes);
        std::memcpy(&bits.of[l], values.valid.data() + at, bytes);
        w.put(v.slot, l, value);
      } else if (v.kind != CallValue::none) {
        const LocalBytes place = w.local_bytes(l, v);
        std::memcpy(place.data, values.data.data() + at, bytes);
        std::memcpy(place.valid, values.valid.data() + at, bytes);
      }
      at += bytes;
    });
    if (v.kind == CallValue::in_register) w.set_valid_bits(v.slot, mask, bits);
  }
}

const Callee* callee_at(Warp& w, const CallPlan& plan, int lane) {
  const U64 address = w.integer(plan.pointer, lane);
  const auto at = std::lower_bound(plan.candidates.begin(), plan.candidates.end(), address,
                                   [](const Callee* c, U64 a) { return c->address < a; });
  if (at != plan.candidates.end() && (*at)->address == address) return *at;
  w.finding(FindingKind::invalid_call,
            address == 0 ? "call through a null pointer"
                         : "call through " + hex(address) +
                               ", which is no function of this signature in the module",
            1u << lane);
  throw LaunchStopped{};
}

Step call(Warp& w, const Instruction& i, U32 mask) {
  const auto& plan = i.as<CallPlan>();
  const Callee* targets[32];
  if (plan.direct == nullptr) w.need(plan.pointer, mask, "as a function's address");
  for_lanes(mask, [&](int l) { targets[l] = plan.direct ? plan.direct : callee_at(w, plan, l); });
  // Read arguments before the callee's registers are saved: the callee may be the caller.
  std::vector<std::pair<U32, Values>> passed;
  for (U32 rest = mask; rest != 0;) {
    U32 same = 0;
    const Callee* target = targets[lane_of(rest)];
    for_lanes(rest, [&](int l) { same |= targets[l] == target ? 1u << l : 0; });
    rest &= ~same;
    passed.emplace_back(same, Values{});
    gather(w, plan.arguments, same, &passed.back().second);
  }
  w.enter(targets, mask);
  for (const auto& [lanes, values] : passed) {
    const Callee& callee = *targets[lane_of(lanes)];
    scatter(w, callee.params, callee.params, lanes, values);
  }
  return Step::jump;
}

Step leave(Warp& w, const Instruction&, U32 mask) {
  if (w.group().calls.empty()) {
    before_exit(w, mask);
    w.exit_lanes(mask);
    after_exit(w, mask);
    return Step::jump;
  }
  const CallFrame frame = w.group().calls.back();
  const auto& plan = w.program().code[frame.pc].as<CallPlan>();
  Values values;
  gather(w, frame.callee->results, mask, &values);
  w.leave(mask);
  scatter(w, plan.results, frame.callee->results, mask, values);
  return Step::jump;
}

// ---- Decoding -----------------------------------------------------------------------------------

void check_signature(Decoder& d, const std::vector<Variable>& params,
                     const std::vector<Variable>& results, std::size_t passed,
                     std::size_t received) {
  if (passed != params.size()) {
    d.fail("the number of arguments must be " + std::to_string(params.size()) + " (got " +
           std::to_string(passed) + ")");
  }
  if (received > results.size()) {
    d.fail("the number of results must be at most " + std::to_string(results.size()) + " (got " +
           std::to_string(received) + ")");
  }
}

// A variable's name without the suffix that makes it unique.
std::string plain_name(const std::string& name) {
  return name.substr(name[0] == '{' ? name.find('}') + 1 : 0);
}

CallValue actual(Decoder& d, const Arg& a, const Variable& formal, bool result) {
  CallValue v;
  v.bytes = static_cast<U32>(formal.bytes);
  if (result && a.kind == Arg::sink) return v;
  if (a.kind == Arg::name) {
    const Symbol* s = d.builder().symbol(d.function(), a.text);
    if (s == nullptr || s->space != Space::local || a.offset != 0)
      d.fail("an argument must be a .param variable, a register or a number (got '" +
             plain_name(a.text) + "')");
    if (s->bytes < formal.bytes) {
      d.fail("'" + plain_name(a.text) + "' must have " + std::to_string(formal.bytes) +
             " bytes, as the function's " + formal.name + " (got " + std::to_string(s->bytes) +
             ")");
    }
    v.kind = s->framed ? CallValue::in_frame : CallValue::in_local;
    v.offset = static_cast<U32>(s->address);
    return v;
  }
  if (!formal.dimensions.empty() || formal.lanes > 1 || formal.bytes > 8)
    d.fail_operand(a, "a .param variable, which an array is passed in");
  v.kind = CallValue::in_register;
  v.slot = result ? d.destination_at_least(a, static_cast<int>(formal.bytes))
                  : d.source_at_least(a, formal.type);
  return v;
}

void decode_call(Decoder& d) {
  d.take("uni");
  d.finish(1, 4);
  std::size_t k = 0;
  std::vector<Arg> results, arguments;
  if (d.arg(k).kind == Arg::list) results = d.arg(k++).args;
  const Arg& target = d.arg(k++);
  if (k < d.count() && d.arg(k).kind == Arg::list) arguments = d.arg(k++).args;
  const Arg* signature = k < d.count() ? &d.arg(k++) : nullptr;
  if (k != d.count() || (signature != nullptr && signature->kind != Arg::name))
    d.fail("the operands must be [results,] function [, arguments] [, prototype or targets]");
  const ParsedModule& module = d.builder().module();
  const std::vector<Variable>*params = nullptr, *returned = nullptr;
  CallPlan plan;
  const Function* callee = nullptr;
  if (target.kind == Arg::name) {
    callee = module.function(target.text);
    if (callee == nullptr) d.fail("unknown function '" + target.text + "'");
    if (callee->is_kernel) d.fail("the function must not be a kernel (got '" + target.text + "')");
    params = &callee->params, returned = &callee->results;
  } else {
    if (signature == nullptr)
      d.fail("the last operand of an indirect call must name a .callprototype or .calltargets");
    plan.pointer = d.source(target, Type::u64);
    const auto found = d.builder().indirect_callees(d.function(), d.raw);
    for (const Function* f : found) plan.candidates.push_back(d.builder().callee(*f));
    std::sort(plan.candidates.begin(), plan.candidates.end(),
              [](const Callee* a, const Callee* b) { return a->address < b->address; });
    const auto* prototype = d.in_scope(d.function().prototypes, signature->text);
    if (prototype != nullptr) {
      params = &prototype->params, returned = &prototype->results;
    } else if (!found.empty()) {
      params = &found[0]->params, returned = &found[0]->results;
    } else {
      d.fail_operand(*signature, "the name of a .callprototype or of a list of functions");
    }
  }
  check_signature(d, *params, *returned, arguments.size(), results.size());
  for (std::size_t n = 0; n < arguments.size(); ++n)
    plan.arguments.push_back(actual(d, arguments[n], (*params)[n], false));
  results.resize(returned->size());  // results that the caller leaves out are dropped
  for (std::size_t n = 0; n < results.size(); ++n)
    plan.results.push_back(actual(d, results[n], (*returned)[n], true));
  if (callee != nullptr && !callee->has_body) {
    decode_runtime_call(d, callee->name, std::move(plan));
    return;
  }
  if (callee != nullptr) plan.direct = d.builder().callee(*callee);
  d.keep(std::move(plan));
  d.out.traits.flow = Flow::call;
  d.out.execute = call;
}

void decode_return(Decoder& d) {
  d.take("uni");
  d.finish(0);
  d.out.traits.flow = Flow::ret;
  d.out.execute = leave;
}

}  // namespace

// ---- The warp's side ----------------------------------------------------------------------------

LocalBytes Warp::local_bytes(int lane, const CallValue& v) {
  const auto l = static_cast<std::size_t>(lane);
  if (v.kind == CallValue::in_frame) {
    const std::size_t at = frame_[l] - kStackBase + v.offset;
    return {stack_[l].data() + at, stack_valid_[l].data() + at};
  }
  const std::size_t at = l * program_.local_bytes + v.offset;
  return {local.data() + at, local_valid.data() + at};
}

// Saves what the return will restore, and makes a frame.
std::shared_ptr<const Activation> Warp::activate(const Callee& callee, U32 lanes) {
  if (!program_.uses_stack) return nullptr;
  auto saved = std::make_shared<Activation>();
  saved->stack_top = stack_top_;
  saved->frame = frame_;
  if (!callee.framed) return saved;
  const std::uint8_t* registers = banks_[0];
  saved->registers.assign(registers + callee.registers_begin, registers + callee.registers_end);
  const auto first = valid_.begin() + callee.first_register;
  saved->valid.assign(first, first + callee.register_count);
  for (U32 r = callee.first_register; r < callee.first_register + callee.register_count; ++r) {
    const auto partly = partly_valid_.find(r);
    if (partly != partly_valid_.end()) {
      saved->partly_valid.emplace_back(*partly);
      for_lanes(lanes, [&](int l) { partly->second[static_cast<std::size_t>(l)] = 0; });
    }
    valid_[r] &= ~lanes;
  }
  for_lanes(lanes, [&](int l) {
    const U32 base = grow_stack(l, callee.frame_bytes, kFrameAlign);
    frame_[static_cast<std::size_t>(l)] = base;
    for (const auto& [slot, offset] : callee.addresses) put(slot, l, U64{base} + offset);
  });
  for (const auto& [slot, offset] : callee.addresses) set_valid(slot, lanes, lanes);
  return saved;
}

void Warp::deactivate(const CallFrame& frame, U32 lanes) {
  if (frame.saved == nullptr) return;
  const Activation& saved = *frame.saved;
  for_lanes(lanes, [&](int l) {
    stack_top_[static_cast<std::size_t>(l)] = saved.stack_top[static_cast<std::size_t>(l)];
    frame_[static_cast<std::size_t>(l)] = saved.frame[static_cast<std::size_t>(l)];
  });
  const Callee& callee = *frame.callee;
  if (!callee.framed) return;
  const std::uint8_t* from = saved.registers.data();
  std::uint8_t* to = banks_[0] + callee.registers_begin;
  for (U32 r = 0; r < callee.register_count; ++r) {
    const U32 width = callee.widths[r];
    if (width == 0) {
      U32 now, then;
      std::memcpy(&now, to, 4);
      std::memcpy(&then, from, 4);
      now = (now & ~lanes) | (then & lanes);
      std::memcpy(to, &now, 4);
    } else {
      for_lanes(lanes, [&](int l) {
        const std::size_t at = static_cast<std::size_t>(l) * width;
        std::memcpy(to + at, from + at, width);
      });
    }
    const std::size_t bytes = width == 0 ? 8 : std::size_t{width} * 32;
    to += bytes, from += bytes;
    U32& valid = valid_[callee.first_register + r];
    valid = (valid & ~lanes) | (saved.valid[r] & lanes);
    const auto partly = partly_valid_.find(callee.first_register + r);
    if (partly != partly_valid_.end())
      for_lanes(lanes, [&](int l) { partly->second[static_cast<std::size_t>(l)] = 0; });
  }
  for (const auto& [reg, bits] : saved.partly_valid) {
    for_lanes(lanes, [&, reg = reg, &bits = bits](int l) {
      partly_valid_[reg][static_cast<std::size_t>(l)] = bits[static_cast<std::size_t>(l)];
    });
  }
}

// Each lane enters its own function. All lanes meet again after the call.
void Warp::enter(const Callee* const* targets, U32 mask) {
  Group base = groups_[current_];
  base.blocked = base.arrived = base.released = base.alone = base.give_up = false;
  const Callee* first = targets[lane_of(mask)];
  bool parts = mask != base.mask;
  for_lanes(mask, [&](int l) { parts |= targets[l] != first; });
  const U32 behind = base.pc + 1;
  const auto meets_behind = [&](const JoinPoint& t) {
    return t.pc == behind && t.depth == base.calls.size();
  };
  if (parts && (base.tokens.empty() || !meets_behind(*base.tokens.back()))) {
    auto token = std::make_shared<JoinPoint>();
    token->pc = behind;
    token->depth = base.calls.size();
    token->expected = base.mask;
    base.tokens.push_back(std::move(token));
  }
  if (mask != base.mask) {
    Group rest = base;
    rest.mask &= ~mask;
    rest.pc = behind;
    groups_.push_back(std::move(rest));
  }
  bool placed = false;
  for (U32 left = mask; left != 0;) {
    const Callee* target = targets[lane_of(left)];
    U32 lanes = 0;
    for_lanes(left, [&](int l) { lanes |= targets[l] == target ? 1u << l : 0; });
    left &= ~lanes;
    Group part = base;
    part.mask = lanes;
    part.pc = target->entry;
    part.calls.push_back({base.pc, target, activate(*target, lanes)});
    if (placed)
      groups_.push_back(std::move(part));
    else
      groups_[current_] = std::move(part);
    placed = true;
  }
}

void Warp::leave(U32 mask) {
  Group& g = groups_[current_];
  if (mask != g.mask) {
    Group rest = g;
    rest.mask &= ~mask;
    ++rest.pc;
    g.mask = mask;
    groups_.push_back(std::move(rest));
  }
  Group& returning = groups_[current_];
  deactivate(returning.calls.back(), mask);
  returning.pc = returning.calls.back().pc + 1;
  returning.calls.pop_back();
  // Branches inside the callee that end in return statements leave tokens behind.
  while (!returning.tokens.empty() && returning.tokens.back()->depth > returning.calls.size())
    drop_from_tokens(returning, returning.tokens.size() - 1);
  settle_tokens();
}

void add_calls(OpcodeTable& t) {
  t["call"] = {decode_call, {OpClass::control}};
  t["ret"] = {decode_return, {OpClass::control}};
}

}  // namespace torchext::sim
