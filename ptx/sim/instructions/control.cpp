// Control flow within a function: bra, brx.idx, exit, trap, brkpt.
#include "../check/exit_checks.h"
#include "../frontend/decode.h"
#include "lanes.h"

namespace torchext::sim {

namespace {

Step bra(Warp& w, const Instruction& i, U32 mask) {
  w.branch(i, mask);
  return Step::jump;
}

void decode_bra(Decoder& d) {
  d.take("uni");
  d.finish(1);
  d.out.traits.flow = Flow::branch;
  d.out.targets.push_back(d.label(d.arg(0)));
  d.out.execute = bra;
}

Step brx(Warp& w, const Instruction& i, U32 mask) {
  const std::vector<U32>& targets = i.targets;
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
  d.need({"idx"});
  d.take("uni");
  d.finish(2);
  d.out.s[0] = d.source(0, Type::u32);
  d.out.traits.flow = Flow::branch;
  for (const std::string& name : d.branch_table(d.arg(1)).targets) {
    Arg label;
    label.kind = Arg::name;
    label.text = name;
    d.out.targets.push_back(d.label(label));
  }
  d.out.execute = brx;
}

Step exit(Warp& w, const Instruction&, U32 mask) {
  before_exit(w, mask);
  w.exit_lanes(mask);
  after_exit(w, mask);
  return Step::jump;
}

Step trap(Warp& w, const Instruction&, U32 mask) {
  w.finding(FindingKind::trap, "the kernel executed trap", mask);
  throw LaunchStopped{};
}

Step breakpoint(Warp& w, const Instruction&, U32 mask) {
  w.finding(FindingKind::trap,
            "the kernel executed brkpt, which ends a launch that no debugger watches", mask);
  throw LaunchStopped{};
}

template <Step (*execute)(Warp&, const Instruction&, U32), Flow flow>
void decode_plain(Decoder& d) {
  d.take("uni");
  d.finish(0);
  d.out.traits.flow = flow;
  d.out.execute = execute;
}

}  // namespace

void add_control(OpcodeTable& t) {
  t["bra"] = {decode_bra, {OpClass::control}};
  t["brx"] = {decode_brx, {OpClass::control}};
  t["exit"] = {decode_plain<exit, Flow::exit>, {OpClass::control}};
  t["trap"] = {decode_plain<trap, Flow::trap>, {OpClass::control}};
  t["brkpt"] = {decode_plain<breakpoint, Flow::trap>, {OpClass::machine}};
}

}  // namespace torchext::sim
