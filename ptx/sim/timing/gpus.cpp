// The tables of csrc/runtime/timing.inc, and what a thread asks the clock for.
#include "replay.h"

namespace torchext::sim::timing {

static thread_local Request* asked = nullptr;
Request* request() {
  return asked;
}
Asking::Asking(Request* request) {
  asked = request;
}
Asking::~Asking() {
  asked = nullptr;
}

const std::vector<Gpu>& gpus() {
  static const std::vector<Gpu> rows = {
#define TORCHEXT_GPU(name, ...) {#name, __VA_ARGS__},
#include "csrc/runtime/timing.inc"
  };
  return rows;
}

const Gpu* find_gpu(const std::string& name) {
  for (const Gpu& gpu : gpus()) {
    if (name == gpu.name) return &gpu;
  }
  return nullptr;
}

const std::vector<ConstantRow>& constant_rows() {
  static const std::vector<ConstantRow> rows = {
#define TORCHEXT_TIME(name, value, unit, fitted, grade, source) \
  {#name, value, unit, fitted != 0, grade, source},
#include "csrc/runtime/timing.inc"
  };
  return rows;
}

}  // namespace torchext::sim::timing
