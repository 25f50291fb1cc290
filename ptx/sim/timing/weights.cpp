// Default costs of PTX instructions. PTX has moves and address conversions that ptxas folds into
// others, and 64-bit operations that it splits; the slots here are what it usually makes of them.
// Opcodes are compared by name, because costs depend on modifiers that are no traits.
#include "weights.h"

#include <cstring>

namespace torchext::sim::timing {

namespace {

bool has(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}
bool begins(const std::string& text, const char* part) {
  return text.compare(0, std::strlen(part), part) == 0;
}

bool converts_integers_only(const std::string& opcode) {
  for (const char* type : {".f16", ".f32", ".f64", ".bf16", ".tf32", ".e4m3", ".e5m2", ".ue8m0"}) {
    if (has(opcode, type)) return false;
  }
  return true;
}

float slots_of(const std::string& op, OpClass op_class) {
  const bool wide = has(op, ".u64") || has(op, ".s64") || has(op, ".b64");
  switch (op_class) {
    case OpClass::hint:
    case OpClass::move:
      return 0;
    case OpClass::alu:
      return wide ? 2 : 1;
    case OpClass::multiply:
      if (begins(op, "div") || begins(op, "rem")) return wide ? 60 : 20;
      return wide && !has(op, ".wide") ? 4 : 1;
    case OpClass::special:
      if (begins(op, "div")) return has(op, ".rn") ? 9 : has(op, ".full") ? 4 : 2;
      return has(op, ".rn") ? 7 : 1;
    case OpClass::convert:
      return converts_integers_only(op) ? 0.5f : 1;
    case OpClass::bulk_copy:
      return 4;  // uniform registers for its operands
    case OpClass::wgmma:
      return 2;  // the descriptors go through uniform registers
    case OpClass::mbarrier:
      return 2;
    default:
      return 1;
  }
}

}  // namespace

std::vector<bool> past_l1(const Program& program) {
  std::vector<bool> past;
  for (const Instruction& i : program.code) {
    const std::string& op = program.opcodes[i.opcode];
    bool any = false;
    for (const char* part : {".cg", ".cv", ".volatile", ".relaxed", ".acquire", "L1::no_allocate"})
      any |= has(op, part);
    past.push_back(any);
  }
  return past;
}

std::vector<Cost> costs(const Program& program, const Constants& c) {
  std::vector<Cost> all;
  all.reserve(program.code.size());
  for (const Instruction& i : program.code) {
    const std::string& op = program.opcodes[i.opcode];
    const OpClass op_class = i.traits.op_class;
    Cost cost;
    cost.slots = slots_of(op, op_class);
    cost.latency = static_cast<float>(c.arithmetic_latency);
    const auto pipe = [&](Pipe p, double interval, double latency) {
      cost.pipe = p;
      cost.interval = static_cast<float>(interval);
      cost.latency = static_cast<float>(latency);
    };
    switch (op_class) {
      case OpClass::alu:
      case OpClass::warp:
        pipe(kAlu, c.alu_interval, c.arithmetic_latency);
        break;
      case OpClass::multiply:
      case OpClass::fp32:
      case OpClass::fp16:
        pipe(kFma, c.fma_interval, c.arithmetic_latency);
        break;
      case OpClass::fp64:
        pipe(kFp64, c.fp64_interval, 2 * c.arithmetic_latency);
        break;
      case OpClass::special:
        pipe(kSpecial, c.special_interval, c.special_latency);
        break;
      case OpClass::convert:
        if (converts_integers_only(op))
          pipe(kAlu, c.alu_interval, c.arithmetic_latency);
        else
          pipe(kConvert, c.convert_interval, c.special_latency);
        break;
      case OpClass::move:
      case OpClass::hint:
        cost.latency = 0;
        break;
      case OpClass::shuffle:
        cost.shuffle = true;
        cost.latency = static_cast<float>(c.shuffle_latency);
        break;
      case OpClass::mma:
        cost.tensor = true;
        cost.latency = static_cast<float>(c.mma_latency);
        break;
      case OpClass::load:
      case OpClass::store:
      case OpClass::atomic:
      case OpClass::matrix_memory:
      case OpClass::async_copy:
      case OpClass::async_store:
      case OpClass::bulk_copy:
        cost.in_order = true;
        break;
      default:
        cost.ends_block = true;
    }
    cost.ends_block |= i.traits.flow != Flow::next || i.traits.wait != Wait::nothing;
    cost.hoists = cost.pipe == kAlu || cost.pipe == kFma;
    // In machine code, arithmetic stands between the instructions that start wgmmas, and waits for a
    // wgmma are no end of a basic block; a try_wait issues before the arithmetic that precedes it.
    const bool wgmma = begins(op, "wgmma.");
    const bool waits = i.traits.wait != Wait::nothing;
    cost.splits = cost.ends_block && !wgmma && (waits || op_class != OpClass::mbarrier);
    if ((wgmma && !waits) || op_class == OpClass::mbarrier) {
      cost.ends_block = false;
      cost.in_order = true;
    }
    const auto add = [](std::vector<std::uint32_t>& to, const Slot& s) {
      if (s.reg != 0 && s.bank == 0 && !s.sink) to.push_back(s.reg);
    };
    if (i.guard >= 0) cost.reads.push_back(i.guard_reg);
    for (const Slot& s : i.s) add(cost.reads, s);
    add(cost.writes, i.d);
    add(cost.writes, i.d2);
    const bool loads = op_class == OpClass::load || op_class == OpClass::atomic ||
                       (op_class == OpClass::matrix_memory && i.traits.memory.reads);
    const bool other = op_class != OpClass::store && op_class != OpClass::async_store &&
                       op_class != OpClass::matrix_memory;
    if (op_class == OpClass::mma) {  // D, A, B, C; D is as large as C
      const std::size_t results = i.list.size() >= 11 ? 4 : 2;
      for (std::size_t k = 0; k < i.list.size(); ++k)
        add(k < results ? cost.writes : cost.reads, i.list[k]);
    } else if (op_class != OpClass::wgmma) {
      const bool results = loads || (other && cost.writes.empty());
      for (const Slot& s : i.list) add(results ? cost.writes : cost.reads, s);
    }
    all.push_back(std::move(cost));
  }
  return all;
}

}  // namespace torchext::sim::timing
