// Places .global and .const variables, initializes them, and finds them by name.
#include <algorithm>
#include <cstring>

#include "../frontend/decode.h"
#include "memory.h"

namespace torchext::sim {

namespace {

constexpr std::uint64_t kMostConstantBytes = 64 * 1024;

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

std::string Program::place(std::uint32_t line) const {
  std::size_t s = sources.size();
  while (s > 1 && sources[s - 1].lines_before >= line) --s;
  const ParsedModule::Source& source = sources[s - 1];
  const std::string number = "line " + std::to_string(line - source.lines_before);
  return sources.size() == 1 ? number : number + " of " + source.name;
}

std::uint64_t ParsedModule::address_of(const Function& f) const {
  return kFunctionWindow | (static_cast<std::uint64_t>(&f - functions.data()) + 1) << 4;
}

DeviceVariables::DeviceVariables(const ParsedModule& module) : module_(module) {
  std::uint64_t constants = 0;
  const auto add = [&](const Variable& v) {
    if ((v.space != Space::global && v.space != Space::constant) || v.is_external()) return;
    if (v.bytes > (1ull << 32))
      throw module.error(v.source, v.line, "'" + v.name + "' is too large");
    if (v.space == Space::constant && (constants += v.bytes) > kMostConstantBytes) {
      throw module.error(v.source, v.line,
                         "with '" + v.name + "' the .const variables have " +
                             std::to_string(constants) + " bytes; a module has room for " +
                             std::to_string(kMostConstantBytes));
    }
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
        throw module_.error(v.source, r.line,
                            "the initializer of '" + v.name + "' refers to '" + r.symbol +
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

}  // namespace torchext::sim
