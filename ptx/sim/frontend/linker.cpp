// Linking: local names, definitions, declarations, and names that no module defines.
#include "linker.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "../machine/runtime_functions.h"

namespace torchext::sim {

namespace {

using Names = std::map<std::string, std::string>;

const std::string& renamed(const Names& names, const std::string& name) {
  const auto it = names.find(name);
  return it == names.end() ? name : it->second;
}

// Labels are not renamed: a label never has the name of something that its module defines.
void rename(Arg& arg, const Names& names) {
  if (arg.kind == Arg::name) arg.text = renamed(names, arg.text);
  for (Arg& a : arg.args) rename(a, names);
}

void rename(Variable& v, const Names& names) {
  v.name = renamed(names, v.name);
  for (Variable::Reference& r : v.references) r.symbol = renamed(names, r.symbol);
}

void rename(ParsedModule& m, const Names& names) {
  for (Variable& v : m.variables) rename(v, names);
  for (Function& f : m.functions) {
    f.name = renamed(names, f.name);
    for (Variable& v : f.variables) rename(v, names);
    for (RawInstruction& i : f.code) {
      for (Arg& a : i.args) rename(a, names);
    }
    for (Function::Table& t : f.call_tables) {
      for (std::string& target : t.targets) target = renamed(names, target);
    }
  }
  std::map<std::string, std::string> aliases;
  for (const auto& [name, meant] : m.aliases) aliases[renamed(names, name)] = renamed(names, meant);
  m.aliases = std::move(aliases);
}

// Names that only this module sees: internal definitions, and what its functions' bodies declare.
std::set<std::string> own_names(const ParsedModule& m) {
  std::set<std::string> names;
  for (const Variable& v : m.variables) {
    if (v.linkage == Linkage::internal) names.insert(v.name);
  }
  for (const Function& f : m.functions) {
    if (f.linkage == Linkage::internal && !f.is_kernel) names.insert(f.name);
    for (const Variable& v : f.variables) names.insert(v.name);
  }
  for (const Function& f : m.functions) {  // ".func f;" may precede ".visible .func f {...}"
    if (f.linkage != Linkage::internal) names.erase(f.name);
  }
  return names;
}

std::set<std::string> all_names(const ParsedModule& m) {
  std::set<std::string> names = own_names(m);
  for (const Variable& v : m.variables) names.insert(v.name);
  for (const Function& f : m.functions) names.insert(f.name);
  return names;
}

// Renames the local names of each module so that no two modules share one.
void part_names(std::vector<ParsedModule>& modules) {
  std::set<std::string> taken = all_names(modules[0]);
  for (std::size_t n = 1; n < modules.size(); ++n) {
    const std::set<std::string> mine = all_names(modules[n]);
    Names names;
    for (const std::string& name : own_names(modules[n])) {
      if (taken.count(name) == 0) continue;
      std::string fresh = name + "@" + std::to_string(n + 1);
      while (taken.count(fresh) != 0 || mine.count(fresh) != 0) fresh += "'";
      names[name] = std::move(fresh);
    }
    if (!names.empty()) rename(modules[n], names);
    taken.merge(all_names(modules[n]));
  }
}

std::string place(const ParsedModule& m, std::uint32_t source, std::uint32_t line) {
  const auto& s = m.sources[source];
  return s.name + ":" + std::to_string(line - s.lines_before);
}

// A strong definition wins over a weak one, and a weak one over a common one.
int strength(Linkage linkage) {
  return linkage == Linkage::weak ? 1 : linkage == Linkage::common ? 2 : 0;
}

void keep_one_variable(ParsedModule& m, std::vector<Variable*>& same,
                       std::set<const Variable*>* drop) {
  Variable* kept = nullptr;
  for (Variable* v : same) {
    if (v->is_external()) continue;
    if (kept == nullptr || strength(v->linkage) < strength(kept->linkage) ||
        (v->linkage == Linkage::common && kept->linkage == Linkage::common &&
         v->bytes > kept->bytes)) {
      kept = v;
    } else if (strength(v->linkage) == 0 && strength(kept->linkage) == 0) {
      throw m.error(
          v->source, v->line,
          "'" + v->name + "' is defined in " + place(m, kept->source, kept->line) + " too");
    }
  }
  if (kept == nullptr) {  // .extern throughout: dynamic shared memory, or missing
    kept = same[0];
    for (Variable* v : same) kept->align = std::max(kept->align, v->align);
  }
  for (Variable* v : same) {
    if (v == kept) continue;
    drop->insert(v);
    const bool sized = v->bytes != 0 && kept->bytes != 0;
    const bool smaller_common = v->linkage == Linkage::common && v->bytes <= kept->bytes;
    if (v->space == kept->space && (!sized || v->bytes == kept->bytes || smaller_common)) continue;
    throw m.error(v->source, v->line,
                  "'" + v->name + "' has another size or state space in " +
                      place(m, kept->source, kept->line));
  }
}

void keep_one_function(ParsedModule& m, std::vector<Function*>& same,
                       std::set<const Function*>* drop) {
  Function* kept = nullptr;
  for (Function* f : same) {
    if (!f->has_body) continue;
    if (kept == nullptr || strength(f->linkage) < strength(kept->linkage)) {
      kept = f;
    } else if (strength(f->linkage) == 0 && strength(kept->linkage) == 0) {
      throw m.error(
          f->source, f->line,
          "'" + f->name + "' is defined in " + place(m, kept->source, kept->line) + " too");
    }
  }
  if (kept == nullptr) kept = same[0];
  for (Function* f : same) {
    if (f == kept) continue;
    drop->insert(f);
    if (f->is_kernel != kept->is_kernel || !same_sizes(f->params, kept->params) ||
        !same_sizes(f->results, kept->results)) {
      throw m.error(f->source, f->line,
                    "'" + f->name + "' has other parameters or results in " +
                        place(m, kept->source, kept->line));
    }
  }
}

template <class T, class KeepOne>
void keep_definitions(ParsedModule& m, std::vector<T>& all, KeepOne&& keep_one) {
  std::map<std::string, std::vector<T*>> by_name;
  for (T& one : all) by_name[one.name].push_back(&one);
  std::set<const T*> drop;
  for (auto& [name, same] : by_name) {
    if (same.size() > 1) keep_one(m, same, &drop);
  }
  std::vector<T> kept;
  for (T& one : all) {
    if (drop.count(&one) == 0) kept.push_back(std::move(one));
  }
  all = std::move(kept);
}

// Names that functions and initializers use must be defined, or belong to the runtime.
void find_missing(const ParsedModule& m) {
  std::set<std::string> missing;
  for (const Variable& v : m.variables) {
    if (v.is_external() && v.space != Space::shared) missing.insert(v.name);
  }
  for (const Function& f : m.functions) {
    if (!f.has_body && m.aliases.count(f.name) == 0 && !is_runtime_function(f.name))
      missing.insert(f.name);
  }
  if (missing.empty()) return;
  const auto check = [&](const std::string& name, std::uint32_t source, std::uint32_t line) {
    if (missing.count(name) == 0) return;
    std::string modules;
    for (const auto& s : m.sources) modules += (modules.empty() ? "" : ", ") + s.name;
    throw m.error(source, line,
                  "none of the linked modules (" + modules + ") defines '" + name + "'");
  };
  const auto check_variable = [&](const Variable& v) {
    for (const auto& r : v.references) check(r.symbol, v.source, r.line);
  };
  for (const Variable& v : m.variables) check_variable(v);
  for (const Function& f : m.functions) {
    for (const Variable& v : f.variables) check_variable(v);
    for (const RawInstruction& i : f.code) {
      std::vector<const Arg*> open;
      for (const Arg& a : i.args) open.push_back(&a);
      while (!open.empty()) {
        const Arg& a = *open.back();
        open.pop_back();
        if (a.kind == Arg::name) check(a.text, f.source, i.line);
        for (const Arg& inner : a.args) open.push_back(&inner);
      }
    }
  }
}

// Offsets the module's line and file numbers by those of the modules before it.
void place_behind(ParsedModule& m, std::uint32_t source, std::uint32_t lines, std::uint32_t files) {
  const auto place_variable = [&](Variable& v) {
    v.source = source;
    v.line += lines;
    for (Variable::Reference& r : v.references) r.line += lines;
  };
  for (Variable& v : m.variables) place_variable(v);
  for (Function& f : m.functions) {
    f.source = source;
    f.line += lines;
    for (auto* all : {&f.params, &f.results, &f.variables}) {
      for (Variable& v : *all) place_variable(v);
    }
    for (RawInstruction& i : f.code) {
      i.line += lines;
      i.file += files;
    }
  }
  m.sources[0].lines_before = lines;
}

}  // namespace

ParsedModule link_modules(std::vector<ParsedModule> modules, const std::string& name) {
  part_names(modules);
  ParsedModule whole;
  whole.name = name;
  std::uint32_t lines = 0;
  for (ParsedModule& m : modules) {
    place_behind(m, static_cast<std::uint32_t>(whole.sources.size()), lines,
                 static_cast<std::uint32_t>(whole.files.size()));
    lines += m.sources[0].lines;
    if (m.target_number >= whole.target_number) {
      whole.target = m.target;
      whole.target_number = m.target_number;
    }
    whole.sources.push_back(m.sources[0]);
    for (const auto& alias : m.aliases) whole.aliases.insert(alias);
    whole.files.insert(whole.files.end(), m.files.begin(), m.files.end());
    std::move(m.functions.begin(), m.functions.end(), std::back_inserter(whole.functions));
    std::move(m.variables.begin(), m.variables.end(), std::back_inserter(whole.variables));
  }
  keep_definitions(whole, whole.variables, keep_one_variable);
  keep_definitions(whole, whole.functions, keep_one_function);
  find_missing(whole);
  return whole;
}

}  // namespace torchext::sim
