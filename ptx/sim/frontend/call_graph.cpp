// Which functions a kernel may call, and which of those may call themselves.
#include <algorithm>
#include <set>

#include "../machine/calls.h"
#include "decode.h"

namespace torchext::sim {

namespace {

// The operand that names the function of a call.
const Arg* target_of(const RawInstruction& i) {
  const std::size_t k = !i.args.empty() && i.args[0].kind == Arg::list ? 1 : 0;
  return k < i.args.size() ? &i.args[k] : nullptr;
}

bool is_call(const RawInstruction& i) {
  return i.parts[0] == "call" && target_of(i) != nullptr;
}

template <class T>
const T* in_scope(const Function& f, const RawInstruction& i, const std::vector<T>& all,
                  const std::string& name) {
  for (int s = static_cast<int>(i.scope); s >= 0; s = f.scope_parent[static_cast<std::size_t>(s)]) {
    for (const T& one : all) {
      if (static_cast<int>(one.scope) == s && one.name == name) return &one;
    }
  }
  return nullptr;
}

}  // namespace

const ProgramBuilder::FunctionPlan* ProgramBuilder::plan(const Function& f) const {
  const auto it = plan_of_.find(&f);
  return it == plan_of_.end() ? nullptr : &plans_[it->second];
}

// Functions whose address is taken: by the initializer of a variable, or by an operand other than
// the target of a call.
const std::vector<const Function*>& ProgramBuilder::address_taken() {
  if (knows_address_taken_) return address_taken_;
  knows_address_taken_ = true;
  std::set<std::string> names;
  const auto add_references = [&](const Variable& v) {
    for (const Variable::Reference& r : v.references) names.insert(r.symbol);
  };
  for (const Variable& v : module_.variables) add_references(v);
  for (const Function& f : module_.functions) {
    for (const Variable& v : f.variables) add_references(v);
    for (const RawInstruction& i : f.code) {
      if (i.parts[0] == "call") continue;
      for (const Arg& a : i.args) collect_names(a, &names);
    }
  }
  for (const std::string& name : names) {
    const Function* f = module_.function(name);
    if (f != nullptr && f->has_body && !f->is_kernel) address_taken_.push_back(f);
  }
  std::sort(address_taken_.begin(), address_taken_.end());
  address_taken_.erase(std::unique(address_taken_.begin(), address_taken_.end()),
                       address_taken_.end());
  return address_taken_;
}

// The functions that an indirect call may reach: those listed by .calltargets or by a variable, or
// all functions with the signature of the .callprototype whose address is taken.
std::vector<const Function*> ProgramBuilder::indirect_callees(const Function& f,
                                                              const RawInstruction& i) {
  std::vector<const Function*> found;
  if (i.args.back().kind != Arg::name) return found;
  const std::string& signature = i.args.back().text;
  const auto add = [&](const std::string& name) {
    const Function* callee = module_.function(name);
    if (callee != nullptr && callee->has_body && !callee->is_kernel) found.push_back(callee);
  };
  if (const auto* prototype = in_scope(f, i, f.prototypes, signature)) {
    for (const Function* callee : address_taken()) {
      if (same_sizes(callee->params, prototype->params) &&
          same_sizes(callee->results, prototype->results))
        found.push_back(callee);
    }
  } else if (const auto* table = in_scope(f, i, f.call_tables, signature)) {
    for (const std::string& name : table->targets) add(name);
  } else if (const auto* variable = variables_.find(signature)) {
    for (const Variable::Reference& r : variable->variable->references) add(r.symbol);
  }
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  return found;
}

std::vector<const Function*> ProgramBuilder::callees_of(const Function& f) {
  std::vector<const Function*> all;
  for (const RawInstruction& i : f.code) {
    if (!is_call(i)) continue;
    const Arg& target = *target_of(i);
    if (target.kind == Arg::name) {
      const Function* callee = module_.function(target.text);
      if (callee != nullptr && callee->has_body) all.push_back(callee);
    } else {
      for (const Function* callee : indirect_callees(f, i)) all.push_back(callee);
    }
  }
  return all;
}

void ProgramBuilder::collect(const Function& kernel) {
  const auto add = [&](const Function& f) {
    if (!plan_of_.emplace(&f, plans_.size()).second) return;
    plans_.emplace_back();
    plans_.back().function = &f;
  };
  add(kernel);
  std::vector<std::vector<std::size_t>> calls;  // by plan
  for (std::size_t n = 0; n < plans_.size(); ++n) {
    calls.emplace_back();
    for (const Function* callee : callees_of(*plans_[n].function)) {
      add(*callee);
      calls[n].push_back(plan_of_.at(callee));
    }
  }
  // A function that can come back to itself needs a frame for each activation.
  for (std::size_t n = 1; n < plans_.size(); ++n) {
    std::vector<char> seen(plans_.size(), 0);
    std::vector<std::size_t> open = calls[n];
    while (!open.empty()) {
      const std::size_t m = open.back();
      open.pop_back();
      if (seen[m]) continue;
      seen[m] = 1;
      open.insert(open.end(), calls[m].begin(), calls[m].end());
    }
    plans_[n].framed = seen[n];
  }
}

}  // namespace torchext::sim
