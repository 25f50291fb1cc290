// A kernel and all it calls, decoded: register file, memory layout, constants, post-dominators.
#include <algorithm>
#include <cstring>
#include <set>

#include "../machine/calls.h"
#include "../machine/memory.h"
#include "csrc/runtime/architecture.h"
#include "decode.h"
#include "targets.h"

namespace torchext::sim {

namespace {

OpcodeTable collect_opcodes() {
  OpcodeTable t;
  add_control(t);
  add_calls(t);
  add_stack(t);
  add_integer(t);
  add_moves(t);
  add_logic(t);
  add_bits(t);
  add_compare(t);
  add_floating(t);
  add_video(t);
  add_convert(t);
  add_load_store(t);
  add_atomics(t);
  add_collectives(t);
  add_barriers(t);
  add_mbarrier(t);
  add_copies(t);
  add_matrix(t);
  add_mma(t);
  add_wmma(t);
  add_wgmma(t);
  add_tensormap(t);
  add_system(t);
  return t;
}

// At the start of the register file: 256 bytes for a sink, 8 for carries.
constexpr std::uint32_t kScratchBytes = 264;
constexpr std::uint64_t kMostLocalBytes = 512 * 1024;  // of a thread, CUDA's limit

}  // namespace

Opcode::Opcode(void (*decoder)(Decoder&), std::vector<OpClass> all, const char* path)
    : decode(decoder), classes(std::move(all)), file(path) {
  file.erase(0, file.rfind('/') + 1);
}

const OpcodeTable& opcode_table() {
  static const OpcodeTable table = collect_opcodes();
  return table;
}

ProgramBuilder::ProgramBuilder(const ParsedModule& module, DeviceVariables& variables,
                               const std::string& kernel)
    : module_(module), variables_(variables), kernel_(kernel) {}

Slot ProgramBuilder::add_register(const std::string& name, Type type) {
  Program& p = *program_;
  Slot slot;
  slot.offset = p.register_bytes;
  slot.reg = p.register_count++;
  slot.bytes = static_cast<std::uint8_t>(size_of(type) == 8 ? 8 : 4);
  p.register_bytes += type == Type::pred ? 8 : 32u * slot.bytes;
  p.register_names.push_back(name);
  return slot;
}

void ProgramBuilder::lay_out_function(FunctionPlan& plan, std::uint64_t* local) {
  Program& p = *program_;
  const Function& f = *plan.function;
  auto callee = std::make_shared<Callee>();
  callee->registers_begin = p.register_bytes;
  callee->first_register = plan.first_register = p.register_count;
  for (const RegisterDecl& r : f.registers) {
    plan.register_offsets.push_back(p.register_bytes);
    const Slot slot = add_register(r.name, r.type);
    callee->widths.push_back(r.type == Type::pred ? 0 : slot.bytes);
  }
  std::uint64_t frame = 0;
  const auto place = [&](const Variable& v) {
    std::uint64_t& at = plan.framed ? frame : *local;
    at = align_up(at, std::max(1u, plan.framed ? std::min(v.align, kFrameAlign) : v.align));
    Symbol& symbol = plan.symbols[v.name];
    symbol = {Space::local, at, v.bytes, false, plan.framed, {}};
    if (plan.framed) {
      symbol.slot = add_register("address of " + v.name, Type::u64);
      callee->widths.push_back(8);
      callee->addresses.emplace_back(symbol.slot, static_cast<std::uint32_t>(at));
    }
    at += v.bytes;
    if (at > kMostLocalBytes)
      throw module_.error(f.source, f.line,
                          "the local memory of '" + f.name + "' must be at most " +
                              std::to_string(kMostLocalBytes) + " bytes (got " +
                              std::to_string(at) + ")");
  };
  const auto value_of = [&](const Variable& v) {
    CallValue value;
    value.bytes = static_cast<std::uint32_t>(v.bytes);
    if (v.reg >= 0) {
      const auto reg = static_cast<std::uint32_t>(v.reg);
      value.kind = CallValue::in_register;
      value.slot.offset = plan.register_offsets[reg];
      value.slot.reg = plan.first_register + reg;
      value.slot.bytes = static_cast<std::uint8_t>(size_of(v.type) == 8 ? 8 : 4);
    } else {
      place(v);
      value.kind = plan.framed ? CallValue::in_frame : CallValue::in_local;
      value.offset = static_cast<std::uint32_t>(plan.symbols.at(v.name).address);
    }
    return value;
  };
  if (!f.is_kernel) {
    for (const Variable& v : f.params) callee->params.push_back(value_of(v));
    for (const Variable& v : f.results) callee->results.push_back(value_of(v));
  }
  for (const Variable& v : f.variables) {
    if (v.space == Space::local || v.space == Space::param) place(v);
  }
  callee->name = f.name;
  callee->address = module_.address_of(f);
  callee->framed = plan.framed;
  callee->frame_bytes = std::max(kLeastFrame, static_cast<std::uint32_t>(align_up(frame, 16)));
  callee->register_count = p.register_count - callee->first_register;
  callee->registers_end = p.register_bytes;
  p.uses_stack |= plan.framed;
  plan.callee = callee.get();
  p.owned.push_back(std::move(callee));
}

void ProgramBuilder::lay_out() {
  Program& p = *program_;
  p.register_names = {"", "_"};  // 0: always valid, 1: sink
  std::uint64_t local = 0;
  std::set<std::string> used;
  p.register_bytes = kScratchBytes;
  p.register_count = 2;
  for (FunctionPlan& plan : plans_) {
    lay_out_function(plan, &local);
    for (const RawInstruction& i : plan.function->code) {
      for (const Arg& a : i.args) collect_names(a, &used);
    }
  }
  p.local_bytes = static_cast<std::uint32_t>(align_up(local, 16));

  std::uint64_t shared = kSharedBase;
  std::uint32_t dynamic_align = 16;
  std::vector<const Variable*> dynamic;
  const auto place_shared = [&](const Variable& v) {
    if (v.space != Space::shared || used.count(v.name) == 0) return;
    if (v.is_external()) {
      dynamic.push_back(&v);
      dynamic_align = std::max(dynamic_align, v.align);
      return;
    }
    shared = align_up(shared, v.align);
    globals_[v.name] = {Space::shared, shared, v.bytes, false, false, {}};
    shared += v.bytes;
  };
  for (const Variable& v : module_.variables) place_shared(v);
  for (const FunctionPlan& plan : plans_) {
    for (const Variable& v : plan.function->variables) place_shared(v);
  }
  if (shared > limits::shared_per_block_default + kSharedBase) {
    throw module_.error(plans_[0].function->source, plans_[0].function->line,
                        "static shared memory must be at most " +
                            std::to_string(limits::shared_per_block_default) + " bytes (got " +
                            std::to_string(shared - kSharedBase) +
                            "); make larger arrays dynamic (.extern .shared)");
  }
  p.shared_static_end = static_cast<std::uint32_t>(shared);
  p.shared_dynamic_begin = static_cast<std::uint32_t>(align_up(shared, dynamic_align));
  for (const Variable* v : dynamic)
    globals_[v->name] = {Space::shared, p.shared_dynamic_begin, 0, false, false, {}};

  for (const auto& e : variables_.entries) {
    globals_[e->name] = {e->constant ? Space::constant : Space::global,
                         reinterpret_cast<std::uint64_t>(e->data),
                         e->bytes,
                         false,
                         false,
                         {}};
  }
  std::uint64_t at = 0;
  const Function& kernel = *plans_[0].function;
  for (const Variable& v : kernel.params) {
    at = align_up(at, v.align);
    p.param_offsets.push_back(static_cast<std::uint32_t>(at));
    plans_[0].symbols[v.name] = {Space::param, at, v.bytes, true, false, {}};
    at += v.bytes;
  }
  if (at > 32764)
    throw module_.error(
        kernel.source, kernel.line,
        "parameters must have at most 32764 bytes (got " + std::to_string(at) + ")");
  p.param_bytes = static_cast<std::uint32_t>(at);
  p.params = kernel.params;
}

const Symbol* ProgramBuilder::symbol(const Function& f, const std::string& name) const {
  const auto& symbols = plan(f)->symbols;
  if (const auto it = symbols.find(name); it != symbols.end()) return &it->second;
  if (const auto it = globals_.find(name); it != globals_.end()) return &it->second;
  return nullptr;
}

Slot ProgramBuilder::constant(std::uint64_t value, int bytes) {
  auto [it, fresh] = constants_.try_emplace({value, bytes});
  if (fresh) {
    auto& bank = program_->constants;
    bank.resize(align_up(bank.size(), 8));
    it->second.offset = static_cast<std::uint32_t>(bank.size());
    it->second.bank = 1;
    it->second.bytes = static_cast<std::uint8_t>(bytes);
    for (int lane = 0; lane < 32; ++lane) {
      for (int b = 0; b < bytes; ++b) bank.push_back(static_cast<std::uint8_t>(value >> (8 * b)));
    }
  }
  return it->second;
}

Slot ProgramBuilder::param_address(std::int64_t addend) {
  auto [it, fresh] = param_constants_.try_emplace(addend);
  if (fresh) {
    auto& bank = program_->constants;
    bank.resize(align_up(bank.size(), 8));
    it->second.offset = static_cast<std::uint32_t>(bank.size());
    it->second.bank = 1;
    it->second.bytes = 8;
    bank.resize(bank.size() + 256);
    program_->param_addresses.push_back({it->second.offset, addend});
  }
  return it->second;
}

Slot ProgramBuilder::special(Special which, int bytes, bool predicate) {
  auto [it, fresh] = specials_.try_emplace({which, bytes, predicate});
  if (fresh) {
    it->second.offset = program_->register_bytes;
    it->second.bytes = static_cast<std::uint8_t>(bytes);
    program_->register_bytes += bytes == 8 ? 256 : 128;
    program_->specials.push_back({which, it->second, predicate});
  }
  return it->second;
}

std::shared_ptr<Program> ProgramBuilder::build() {
  const Function* kernel = module_.function(kernel_);
  program_ = std::make_shared<Program>();
  Program& p = *program_;
  p.kernel = kernel_;
  p.module = module_.name;
  p.sources = module_.sources;
  p.target_number = module_.target_number;
  collect(*kernel);
  lay_out();
  p.attributes = *kernel;
  p.attributes.code.clear();

  std::uint32_t pc = 0;
  for (FunctionPlan& plan : plans_) {
    plan.entry = plan.callee->entry = pc;
    pc += static_cast<std::uint32_t>(plan.function->code.size()) + 1;
  }
  p.code.reserve(pc);
  const OpcodeTable& table = opcode_table();
  for (const FunctionPlan& plan : plans_) {
    const Function& f = *plan.function;
    const ParsedModule::Source& source = module_.sources.at(f.source);
    check_target(source, f);
    RawInstruction end;  // falling off the end returns
    end.parts = {"ret"};
    end.opcode = "ret";
    end.line = f.code.empty() ? f.line : f.code.back().line;
    for (std::size_t i = 0; i <= f.code.size(); ++i) {
      const RawInstruction& raw = i < f.code.size() ? f.code[i] : end;
      p.code.emplace_back();
      Instruction& out = p.code.back();
      out.line = raw.line;
      out.file = raw.file;
      out.source_line = raw.source_line;
      const auto [it, fresh] =
          opcode_index_.try_emplace(raw.opcode, static_cast<std::uint32_t>(p.opcodes.size()));
      if (fresh) p.opcodes.push_back(raw.opcode);
      out.opcode = it->second;
      if (raw.guard >= 0) {
        const auto reg = static_cast<std::uint32_t>(raw.guard);
        out.guard = static_cast<std::int32_t>(plan.register_offsets[reg]);
        out.guard_reg = plan.first_register + reg;
        out.guard_negated = raw.guard_negated;
      }
      check_target(source, raw);
      const auto row = table.find(raw.parts[0]);
      if (row == table.end())
        throw module_.error(f.source, raw.line, why_unknown(raw.opcode, raw.parts[0]));
      const std::vector<OpClass>& classes = row->second.classes;
      out.traits.op_class = classes[0];
      Decoder d(*this, f, raw, out);
      row->second.decode(d);
      if (std::find(classes.begin(), classes.end(), out.traits.op_class) == classes.end())
        throw std::logic_error(raw.opcode + ": its row lacks the class " +
                               name_of(out.traits.op_class));
    }
  }
  for (std::size_t i = 0; i < plans_.size(); ++i) {
    const std::uint32_t end =
        i + 1 < plans_.size() ? plans_[i + 1].entry : static_cast<std::uint32_t>(p.code.size());
    find_post_dominators(plans_[i].entry, end);
  }
  track_wgmma_registers();
  return program_;
}

void ProgramBuilder::track_wgmma_registers() {
  Program& p = *program_;
  std::set<std::uint32_t> fragments;
  for (const Instruction& i : p.code) {
    if (i.traits.op_class != OpClass::wgmma) continue;
    p.uses_wgmma = true;
    for (const Slot& s : i.list) fragments.insert(s.reg);
  }
  if (!p.uses_wgmma) return;
  for (Instruction& i : p.code) {
    if (i.traits.op_class == OpClass::wgmma) continue;
    const auto touch = [&](const Slot& s) {
      if (s.reg > 1 && s.bank == 0 && fragments.count(s.reg)) i.tracked.push_back(s.reg);
    };
    touch(i.d);
    touch(i.d2);
    for (const Slot& s : i.s) touch(s);
    for (const Slot& s : i.list) touch(s);
  }
}

// Cooper, Harvey, Kennedy, "A Simple, Fast Dominance Algorithm", on the reversed graph. No lane
// waits for lanes that leave the function. So a path that ends in an early return or a trap counts
// only if there is no other path.
void ProgramBuilder::find_post_dominators(std::uint32_t begin, std::uint32_t end) {
  Program& p = *program_;
  struct Block {
    std::uint32_t first, last;
    std::vector<int> next;
    bool leaves = false;
  };
  std::set<std::uint32_t> starts{begin};
  const auto leaves = [](const Instruction& i) {
    const Flow flow = i.traits.flow;
    return flow == Flow::ret || flow == Flow::exit || flow == Flow::trap;
  };
  for (std::uint32_t pc = begin; pc < end; ++pc) {
    const auto& targets = p.code[pc].targets;
    for (std::uint32_t t : targets) starts.insert(t);
    if ((!targets.empty() || leaves(p.code[pc])) && pc + 1 < end) starts.insert(pc + 1);
  }
  std::vector<Block> blocks;
  std::map<std::uint32_t, int> block_at;
  for (auto it = starts.begin(); it != starts.end(); ++it) {
    const auto following = std::next(it);
    block_at[*it] = static_cast<int>(blocks.size());
    blocks.push_back({*it, (following == starts.end() ? end : *following) - 1, {}, false});
  }
  const int exit_block = static_cast<int>(blocks.size());
  for (Block& b : blocks) {
    const Instruction& i = p.code[b.last];
    for (std::uint32_t t : i.targets) b.next.push_back(block_at[t]);
    if (leaves(i) && i.guard < 0) {
      b.leaves = true;
    } else if ((i.targets.empty() || i.guard >= 0) && b.last + 1 < end) {
      b.next.push_back(block_at[b.last + 1]);
    }
  }
  int final_return = -1;
  for (std::size_t b = 0; b < blocks.size(); ++b) {
    const bool returns = blocks[b].leaves && p.code[blocks[b].last].traits.flow != Flow::trap;
    const bool sentinel = blocks[b].last + 1 == end && blocks[b].first == blocks[b].last;
    if (returns && !(sentinel && final_return >= 0)) final_return = static_cast<int>(b);
  }

  const auto solve = [&](bool every_exit) {
    std::vector<std::vector<int>> previous(blocks.size() + 1);  // successors in the reversed graph
    std::vector<std::vector<int>> next(blocks.size() + 1);
    for (std::size_t b = 0; b < blocks.size(); ++b) {
      next[b] = blocks[b].next;
      if (blocks[b].leaves && (every_exit || static_cast<int>(b) == final_return))
        next[b].push_back(exit_block);
      for (int n : next[b]) previous[static_cast<std::size_t>(n)].push_back(static_cast<int>(b));
    }
    std::vector<int> order, position(blocks.size() + 1, -1);
    std::vector<std::pair<int, std::size_t>> stack{{exit_block, 0}};
    std::vector<char> seen(blocks.size() + 1, 0);
    seen[static_cast<std::size_t>(exit_block)] = 1;
    while (!stack.empty()) {
      auto& [node, edge] = stack.back();
      const auto& edges = previous[static_cast<std::size_t>(node)];
      if (edge < edges.size()) {
        const int to = edges[edge++];
        if (!seen[static_cast<std::size_t>(to)]) {
          seen[static_cast<std::size_t>(to)] = 1;
          stack.push_back({to, 0});
        }
      } else {
        position[static_cast<std::size_t>(node)] = static_cast<int>(order.size());
        order.push_back(node);
        stack.pop_back();
      }
    }
    std::vector<int> idom(blocks.size() + 1, -1);
    idom[static_cast<std::size_t>(exit_block)] = exit_block;
    for (bool changed = true; changed;) {
      changed = false;
      for (auto it = order.rbegin(); it != order.rend(); ++it) {
        const auto b = static_cast<std::size_t>(*it);
        if (*it == exit_block) continue;
        int best = -1;
        for (int n : next[b]) {
          if (idom[static_cast<std::size_t>(n)] < 0) continue;
          if (best < 0) {
            best = n;
            continue;
          }
          int x = n, y = best;
          while (x != y) {
            while (position[static_cast<std::size_t>(x)] < position[static_cast<std::size_t>(y)])
              x = idom[static_cast<std::size_t>(x)];
            while (position[static_cast<std::size_t>(y)] < position[static_cast<std::size_t>(x)])
              y = idom[static_cast<std::size_t>(y)];
          }
          best = x;
        }
        if (best >= 0 && idom[b] != best) {
          idom[b] = best;
          changed = true;
        }
      }
    }
    return idom;
  };
  const auto all = solve(true);
  const auto main_path = solve(false);
  for (std::size_t b = 0; b < blocks.size(); ++b) {
    Instruction& i = p.code[blocks[b].last];
    if (blocks[b].next.size() < 2) continue;
    int r = all[b];
    if (r < 0 || r == exit_block) r = main_path[b];
    if (r >= 0 && r != exit_block) i.reconverge = blocks[static_cast<std::size_t>(r)].first;
  }
}

}  // namespace torchext::sim
