// The GPUs: architectures.inc in C++, and the rule that gives each GPU its GEMM kernels. Launchers
// choose kernels that fit a GPU's limits; the PTX simulator refuses launches that exceed them. No
// other header of torchext is needed.
#pragma once

#include <algorithm>
#include <cstdint>

namespace torchext {

// Which GEMM kernels a GPU runs. A path's number is the oldest capability that can run it.
enum class Path : std::int32_t {
#define TORCHEXT_PATH(name, number, own) name = number,
#include "architectures.inc"
};

struct PathRow {
  Path path;
  const char* name;
  bool own;  // only one capability can run it
};
constexpr PathRow kPaths[] = {
#define TORCHEXT_PATH(name, number, own) {Path::name, #name, own},
#include "architectures.inc"
};

struct Architecture {
#define TORCHEXT_COLUMN(type, name) type name;
#include "architectures.inc"
};
constexpr Architecture kArchitectures[] = {
#define TORCHEXT_ARCHITECTURE(capability, path, target, ...) \
  {capability, Path::path, #target, __VA_ARGS__},
#include "architectures.inc"
};

// Limits that are the same for all GPUs.
namespace limits {
#define TORCHEXT_LIMIT(name, value) constexpr std::uint32_t name = value;
#include "architectures.inc"
constexpr std::uint32_t block[3] = {threads_per_block, threads_per_block, 64};
constexpr std::uint32_t grid[3] = {0x7fffffff, 65535, 65535};
}  // namespace limits

// The first row is the oldest GPU that CUDA 13, which compiles the kernels, supports.
constexpr int kOldestCapability = kArchitectures[0].capability;

// The row of exactly this capability, or nullptr.
constexpr const Architecture* find_architecture(int capability) {
  for (const Architecture& a : kArchitectures)
    if (a.capability == capability) return &a;
  return nullptr;
}

// The row of this capability, or nullptr. A capability before all rows gets the first row: that is
// the oldest GPU that can run such old PTX here.
constexpr const Architecture* architecture_of(int capability) {
  return find_architecture(std::max(capability, kOldestCapability));
}

constexpr bool runs_on(const PathRow& path, int capability) {
  return path.own ? capability == int(path.path) : capability >= int(path.path);
}
constexpr bool runs_on(Path path, int capability) {
  for (const PathRow& row : kPaths)
    if (row.path == path) return runs_on(row, capability);
  return false;
}

// The path of a GPU. A capability without a row gets the path of the nearest earlier row of its
// major version (an sm_122 that of sm_121). If there is no such row, or if only one capability can
// run that path, it gets the latest path that every later GPU can run.
constexpr Path path_of_capability(int capability) {
  const Architecture* nearest = nullptr;
  for (const Architecture& a : kArchitectures)
    if (a.capability <= capability && a.capability / 10 == capability / 10) nearest = &a;
  if (nearest != nullptr && runs_on(nearest->path, capability)) return nearest->path;
  for (const PathRow& row : kPaths)
    if (!row.own && runs_on(row, capability)) return row.path;
  return kArchitectures[0].path;
}

}  // namespace torchext

// The functions below are for the Python package, which reads the table from the compiled library.

// path_of_capability(); 0 for a GPU older than the first row, which can run no kernel.
extern "C" __attribute__((visibility("default"))) std::int32_t torchext_path_of_capability(
    std::int32_t capability);

// architectures.inc as JSON: {"paths": {name: number}, "limits": {name: value}, "architectures":
// [{column: value}]}. The text lives as long as the library.
extern "C" __attribute__((visibility("default"))) const char* torchext_architectures();
