// A kernel and all it calls, decoded: register file, memory layout, constants, post-dominators.
#include <algorithm>
#include <cstring>
#include <functional>
#include <set>

#include "csrc/runtime/architecture.h"
#include "decode.h"
#include "memory.h"

namespace torchext::sim {

namespace {

const DecodeTable& decode_table() {
  static const DecodeTable table = [] {
    DecodeTable t;
    add_control(t);
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
  }();
  return table;
}

std::uint64_t align_up(std::uint64_t value, std::uint64_t to) {
  return (value + to - 1) / to * to;
}

void visit_names(const Arg& arg, const std::function<void(const std::string&)>& visit) {
  if (arg.kind == Arg::name) visit(arg.text);
  for (const Arg& a : arg.args) visit_names(a, visit);
}

}  // namespace

const Function* ParsedModule::function(const std::string& name) const {
  const auto alias = aliases.find(name);
  const std::string& meant = alias == aliases.end() ? name : alias->second;
  const Function* found = nullptr;
  for (const Function& f : functions) {
    if (f.name == meant && (found == nullptr || f.has_body)) found = &f;
  }
  return found;
}

std::uint64_t ParsedModule::address_of(const Function& f) const {
  return kFunctionWindow | (static_cast<std::uint64_t>(&f - functions.data()) + 1) << 4;
}

DeviceVariables::DeviceVariables(const ParsedModule& module) : module_(module) {
  const auto add = [&](const Variable& v) {
    if ((v.space != Space::global && v.space != Space::constant) || v.is_external()) return;
    if (v.bytes > (1ull << 32))
      throw PtxError(module.sources[v.source].name, v.line, "'" + v.name + "' is too large");
    auto e = std::make_unique<Entry>();
    e->name = v.name;
    e->bytes = v.bytes;
    e->constant = v.space == Space::constant;
    e->variable = &v;
    e->storage.resize(v.bytes / 8 + 2 + v.align / 8);
    const auto base = reinterpret_cast<std::uint64_t>(e->storage.data());
    e->data = reinterpret_cast<std::uint8_t*>(align_up(base, std::max(8u, v.align)));
    by_name[v.name] = e.get();
    entries.push_back(std::move(e));
  };
  for (const Variable& v : module.variables) add(v);
  for (const Function& f : module.functions) {
    for (const Variable& v : f.variables) add(v);
  }
  reset();
}

void DeviceVariables::reset() {
  for (const auto& e : entries) {
    const Variable& v = *e->variable;
    std::memset(e->data, 0, e->bytes);
    std::copy(v.initial.begin(), v.initial.end(), e->data);
    for (const Variable::Reference& r : v.references) {
      std::uint64_t address = 0;
      if (const Entry* to = find(r.symbol); to != nullptr) {
        address = reinterpret_cast<std::uint64_t>(to->data);
      } else if (const Function* f = module_.function(r.symbol); f != nullptr) {
        address = module_.address_of(*f);
      } else {
        throw PtxError(module_.sources[v.source].name, r.line,
                       "the initialiser of '" + v.name + "' refers to '" + r.symbol +
                           "', which is no .global or .const variable and no function");
      }
      const std::uint64_t value = (address + static_cast<std::uint64_t>(r.addend)) >> r.shift;
      std::memcpy(e->data + r.at, &value, static_cast<std::size_t>(r.bytes));
    }
  }
}

const DeviceVariables::Entry* DeviceVariables::find(const std::string& name) const {
  const auto it = by_name.find(name);
  return it == by_name.end() ? nullptr : it->second;
}

ProgramBuilder::ProgramBuilder(const ParsedModule& module, DeviceVariables& variables,
                               const std::string& kernel)
    : module_(module), variables_(variables), kernel_(kernel) {}

const ProgramBuilder::FunctionPlan* ProgramBuilder::plan(const std::string& name) const {
  for (const FunctionPlan& p : plans_) {
    if (p.function->name == name) return &p;
  }
  return nullptr;
}

void ProgramBuilder::collect(const Function& f, std::vector<std::string>& stack) {
  if (std::find(stack.begin(), stack.end(), f.name) != stack.end())
    throw PtxError(module_.name, f.line, "recursion ('" + f.name + "') is not supported");
  if (plan(f.name) == nullptr) {
    FunctionPlan p;
    p.function = &f;
    plans_.push_back(std::move(p));
  }
  stack.push_back(f.name);
  for (const RawInstruction& i : f.code) {
    if (i.parts[0] != "call") continue;
    for (const Arg& a : i.args) {
      if (a.kind != Arg::name) continue;
      const Function* callee = module_.function(a.text);
      if (callee != nullptr && callee->has_body) collect(*callee, stack);
    }
  }
  stack.pop_back();
}

void ProgramBuilder::lay_out() {
  Program& p = *program_;
  std::uint32_t registers = 2,
                bytes = 264;  // 0: always valid, 1: sink; 256 bytes for it, 8 for carries
  p.register_names = {"", "_"};
  std::uint64_t local = 0;
  const auto place_local = [&](const Variable& v) {
    local = align_up(local, std::max(1u, v.align));
    const std::uint64_t at = local;
    local += v.bytes;
    return at;
  };
  std::set<std::string> used;
  for (FunctionPlan& plan : plans_) {
    const Function& f = *plan.function;
    plan.first_register = registers;
    for (const RegisterDecl& r : f.registers) {
      plan.register_offsets.push_back(bytes);
      bytes += r.type == Type::pred ? 8 : size_of(r.type) == 8 ? 256 : 128;
      p.register_names.push_back(r.name);
      ++registers;
    }
    if (!f.is_kernel) {
      for (const auto* formals : {&f.params, &f.results}) {
        for (const Variable& v : *formals)
          plan.symbols[v.name] = {Space::local, place_local(v), v.bytes, false};
      }
    }
    for (const Variable& v : f.variables) {
      if (v.space == Space::local || v.space == Space::param)
        plan.symbols[v.name] = {Space::local, place_local(v), v.bytes, false};
    }
    for (const RawInstruction& i : f.code) {
      for (const Arg& a : i.args) visit_names(a, [&](const std::string& n) { used.insert(n); });
    }
  }
  p.register_bytes = bytes;
  p.register_count = registers;
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
    globals_[v.name] = {Space::shared, shared, v.bytes, false};
    shared += v.bytes;
  };
  for (const Variable& v : module_.variables) place_shared(v);
  for (const FunctionPlan& plan : plans_) {
    for (const Variable& v : plan.function->variables) place_shared(v);
  }
  if (shared > kSharedPerBlockByDefault + kSharedBase) {
    throw PtxError(module_.name, plans_[0].function->line,
                   std::to_string(shared - kSharedBase) +
                       " bytes of static shared memory; at most " +
                       std::to_string(kSharedPerBlockByDefault) + " (more must be dynamic)");
  }
  p.shared_static_end = static_cast<std::uint32_t>(shared);
  p.shared_dynamic_begin = static_cast<std::uint32_t>(align_up(shared, dynamic_align));
  for (const Variable* v : dynamic)
    globals_[v->name] = {Space::shared, p.shared_dynamic_begin, 0, false};

  for (const auto& e : variables_.entries) {
    globals_[e->name] = {e->constant ? Space::constant : Space::global,
                         reinterpret_cast<std::uint64_t>(e->data), e->bytes, false};
  }
  std::uint64_t at = 0;
  const Function& kernel = *plans_[0].function;
  for (const Variable& v : kernel.params) {
    at = align_up(at, v.align);
    p.param_offsets.push_back(static_cast<std::uint32_t>(at));
    plans_[0].symbols[v.name] = {Space::param, at, v.bytes, true};
    at += v.bytes;
  }
  if (at > 32764) throw PtxError(module_.name, kernel.line, "parameters larger than 32764 bytes");
  p.param_bytes = static_cast<std::uint32_t>(at);
  p.params = kernel.params;
}

const Symbol* ProgramBuilder::symbol(const Function& f, const std::string& name) const {
  const FunctionPlan& p = plan(f);
  if (const auto it = p.symbols.find(name); it != p.symbols.end()) return &it->second;
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
  p.target_number = module_.target_number;
  std::vector<std::string> stack;
  collect(*kernel, stack);
  lay_out();
  p.attributes = *kernel;
  p.attributes.code.clear();

  std::uint32_t pc = 0;
  for (FunctionPlan& plan : plans_) {
    plan.entry = pc;
    pc += static_cast<std::uint32_t>(plan.function->code.size()) + 1;
  }
  p.code.reserve(pc);
  const DecodeTable& table = decode_table();
  for (const FunctionPlan& plan : plans_) {
    const Function& f = *plan.function;
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
      const auto decoder = table.find(raw.parts[0]);
      if (decoder == table.end())
        throw PtxError(module_.name, raw.line, why_unknown(raw.opcode, raw.parts[0]));
      Decoder d(*this, f, raw, out);
      decoder->second(d);
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
    if (p.opcodes[i.opcode].compare(0, 15, "wgmma.mma_async") != 0) continue;
    p.uses_wgmma = true;
    for (const Slot& s : i.list) fragments.insert(s.reg);
  }
  if (!p.uses_wgmma) return;
  for (Instruction& i : p.code) {
    if (p.opcodes[i.opcode].compare(0, 5, "wgmma") == 0) continue;
    const auto touch = [&](const Slot& s) {
      if (s.reg > 1 && s.bank == 0 && fragments.count(s.reg)) i.tracked.push_back(s.reg);
    };
    touch(i.d);
    touch(i.d2);
    for (const Slot& s : i.s) touch(s);
    for (const Slot& s : i.list) touch(s);
  }
}

// Cooper, Harvey, Kennedy, "A Simple, Fast Dominance Algorithm", on the reversed graph. Lanes that
// leave the function need nobody to wait for them, so a path that ends in an early return or a
// trap counts only where it is all there is.
void ProgramBuilder::find_post_dominators(std::uint32_t begin, std::uint32_t end) {
  Program& p = *program_;
  struct Block {
    std::uint32_t first, last;
    std::vector<int> next;
    bool leaves = false;
  };
  std::set<std::uint32_t> starts{begin};
  const auto branches = [&](const Instruction& i) -> std::vector<std::uint32_t> {
    const std::string& op = p.opcodes[i.opcode];
    if (op == "bra" || op == "bra.uni") return {i.target};
    if (op.compare(0, 7, "brx.idx") == 0) {
      return *static_cast<const std::vector<std::uint32_t>*>(i.extra);
    }
    return {};
  };
  const auto leaves = [&](const Instruction& i) {
    const std::string& op = p.opcodes[i.opcode];
    return op == "ret" || op == "ret.uni" || op == "exit" || op == "trap";
  };
  for (std::uint32_t pc = begin; pc < end; ++pc) {
    const auto targets = branches(p.code[pc]);
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
    const auto targets = branches(i);
    for (std::uint32_t t : targets) b.next.push_back(block_at[t]);
    if (leaves(i) && i.guard < 0) {
      b.leaves = true;
    } else if ((targets.empty() || i.guard >= 0) && b.last + 1 < end) {
      b.next.push_back(block_at[b.last + 1]);
    }
  }
  int final_return = -1;
  for (std::size_t b = 0; b < blocks.size(); ++b) {
    const std::string& op = p.opcodes[p.code[blocks[b].last].opcode];
    const bool returns = blocks[b].leaves && op != "trap";
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
