// Module: parsed PTX, its kernels' signatures, programs decoded on first use.
#include <map>
#include <mutex>
#include <stdexcept>

#include "../machine/device_heap.h"
#include "../machine/launch.h"
#include "decode.h"
#include "linker.h"
#include "parser.h"

namespace torchext::sim {

struct Module::Cache {
  std::mutex mutex;
  std::map<std::string, std::shared_ptr<const Program>> programs;
};

std::shared_ptr<Module> Module::parse(const std::vector<SourceText>& texts) {
  std::shared_ptr<Module> m(new Module);
  std::vector<ParsedModule> parsed;
  std::string names;
  for (const SourceText& t : texts) {
    parsed.push_back(parse_ptx(t.text, t.name));
    names += (names.empty() ? "" : ", ") + t.name;
  }
  m->parsed_ = std::make_unique<ParsedModule>(
      parsed.size() == 1 ? std::move(parsed[0]) : link_modules(std::move(parsed), names));
  m->variables_ = std::make_unique<DeviceVariables>(*m->parsed_);
  m->heap_ = std::make_unique<DeviceHeap>();
  m->cache_ = std::make_unique<Cache>();
  for (const Function& f : m->parsed_->functions) {
    if (!f.is_kernel || !f.has_body) continue;
    Kernel k;
    k.name = f.name;
    k.line = f.line - m->parsed_->sources[f.source].lines_before;
    std::size_t at = 0;
    for (const Variable& v : f.params) {
      at = align_up(at, v.align);
      k.params.push_back({v.name, v.bytes, v.align, at, name_of(v.type),
                          !v.dimensions.empty() || v.lanes > 1, v.pointer});
      at += v.bytes;
    }
    for (int i = 0; i < 3; ++i) {
      k.max_threads[i] = f.max_threads[i];
      k.required_threads[i] = f.required_threads[i];
      k.cluster[i] = f.cluster[i];
    }
    k.min_ctas = f.min_ctas;
    k.max_registers = f.max_registers;
    m->kernels_.push_back(std::move(k));
  }
  return m;
}

Module::~Module() = default;

std::string Module::target() const {
  return parsed_->target;
}
const std::vector<std::string>& Module::files() const {
  return parsed_->files;
}

const Kernel& Module::kernel(const std::string& name) const {
  for (const Kernel& k : kernels_) {
    if (k.name == name) return k;
  }
  std::string known;
  for (const Kernel& k : kernels_) known += (known.empty() ? "" : ", ") + k.name;
  throw std::invalid_argument("kernel must be one of those in '" + parsed_->name + "', " +
                              (known.empty() ? "which has none" : known) + " (got '" + name + "')");
}

std::shared_ptr<const Program> Module::program(const std::string& name) const {
  kernel(name);
  const std::lock_guard<std::mutex> lock(cache_->mutex);
  auto& program = cache_->programs[name];
  if (program == nullptr) program = ProgramBuilder(*parsed_, *variables_, name).build();
  return program;
}

}  // namespace torchext::sim
