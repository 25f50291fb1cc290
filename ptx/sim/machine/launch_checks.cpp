// Launch limits of the architecture, and of the kernel's own directives.
#include "launch_checks.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "csrc/runtime/architecture.h"
#include "memory.h"

namespace torchext::sim {
namespace {

std::string text(const Dim3& d) {
  return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
}

class Checker {
 public:
  Checker(const Program& program, const LaunchOptions& options)
      : program_(program),
        options_(options),
        gpu_(options.compute_capability != 0 ? options.compute_capability : program.target_number),
        architecture_(architecture_of(gpu_)) {
    if (architecture_ == nullptr)
      refuse("the GPU must be one whose limits the simulator knows (got sm_" +
             std::to_string(gpu_) + ")");
    if (program.target_number > gpu_) {
      refuse("the GPU must be sm_" + std::to_string(program.target_number) +
             " or later, as the module's .target says (got sm_" + std::to_string(gpu_) + ")");
    }
  }

  void check_dimensions() const {
    check_extent("grid", options_.grid, limits::grid);
    check_extent("block", options_.block, limits::block);
    const std::uint64_t threads = options_.block.volume();
    const Function& f = program_.attributes;
    if (threads > limits::threads_per_block) {
      refuse("block must have at most " + std::to_string(limits::threads_per_block) +
             " threads (got " + std::to_string(threads) + ")");
    }
    const Dim3 most{f.max_threads[0], f.max_threads[1], f.max_threads[2]};
    if (most.x != 0 && threads > most.volume()) {
      refuse("block must have at most " + std::to_string(most.volume()) +
             " threads, as the kernel's .maxntid says (got " + std::to_string(threads) + ")");
    }
    check_required("block", options_.block, f.required_threads, ".reqntid");
  }

  Dim3 cluster() const {
    const auto& own = program_.attributes.cluster;
    Dim3 cluster = options_.cluster;
    if (cluster.volume() == 0) {
      if (own[0] == 0) return Dim3{1, 1, 1};
      cluster = Dim3{own[0], own[1], own[2]};
    }
    check_required("cluster", cluster, own, ".reqnctapercluster");
    const std::uint64_t ctas = cluster.volume();
    if (ctas > 1 && architecture_->ctas_per_cluster == 0)
      refuse("cluster must be one CTA before sm_90 (got " + std::to_string(ctas) + " CTAs on sm_" +
             std::to_string(gpu_) + ")");
    if (ctas > std::max(1u, architecture_->ctas_per_cluster_max)) {
      refuse("cluster must have at most " + std::to_string(architecture_->ctas_per_cluster_max) +
             " CTAs (got " + std::to_string(ctas) + ")");
    }
    if (ctas > std::max(1u, architecture_->ctas_per_cluster) && !options_.non_portable_cluster) {
      refuse("cluster must have at most " + std::to_string(architecture_->ctas_per_cluster) +
             " CTAs (got " + std::to_string(ctas) +
             "); pass non_portable_cluster=True, as CUDA needs "
             "cudaFuncAttributeNonPortableClusterSizeAllowed");
    }
    const Dim3& grid = options_.grid;
    if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) {
      refuse("grid must be a multiple of the cluster, " + text(cluster) + " (got " + text(grid) +
             ")");
    }
    return cluster;
  }

  std::uint32_t shared_bytes() const {
    const std::uint64_t end = std::uint64_t{program_.shared_dynamic_begin} + options_.dynamic_smem;
    const std::uint64_t bytes = end - kSharedBase;
    if (bytes > architecture_->shared_per_block) {
      refuse("the shared memory of a block on sm_" + std::to_string(gpu_) + " must be at most " +
             std::to_string(architecture_->shared_per_block) + " bytes (got " +
             std::to_string(bytes) + ", of which " + std::to_string(options_.dynamic_smem) +
             " are dynamic)");
    }
    return static_cast<std::uint32_t>(end);
  }

  // Registers may allow fewer, but PTX does not fix their number.
  std::uint64_t most_resident_ctas(std::uint32_t shared_end) const {
    const auto threads = static_cast<std::uint32_t>((options_.block.volume() + 31) / 32 * 32);
    const std::uint32_t reserved = architecture_->shared_per_sm - architecture_->shared_per_block;
    const std::uint32_t shared = std::max(1u, shared_end - kSharedBase + reserved);
    return std::uint64_t{options_.num_sms} *
           std::min({architecture_->ctas_per_sm, architecture_->threads_per_sm / threads,
                     architecture_->shared_per_sm / shared});
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw std::invalid_argument("launch of '" + program_.kernel + "': " + what);
  }

  void check_extent(const char* name, const Dim3& d, const std::uint32_t (&limits)[3]) const {
    if (d.volume() == 0) refuse(std::string(name) + " must not be empty (got " + text(d) + ")");
    const std::uint32_t extents[3] = {d.x, d.y, d.z};
    for (int i = 0; i < 3; ++i) {
      if (extents[i] <= limits[i]) continue;
      refuse(std::string(name) + "." + "xyz"[i] + " must be at most " + std::to_string(limits[i]) +
             " (got " + std::to_string(extents[i]) + ")");
    }
  }

  void check_required(const char* name, const Dim3& d, const std::uint32_t (&required)[3],
                      const char* directive) const {
    if (required[0] == 0) return;
    const Dim3 wanted{required[0], required[1], required[2]};
    if (d.x == wanted.x && d.y == wanted.y && d.z == wanted.z) return;
    refuse(std::string(name) + " must be " + text(wanted) + ", as the kernel's " + directive +
           " says (got " + text(d) + ")");
  }

  const Program& program_;
  const LaunchOptions& options_;
  int gpu_;
  const Architecture* architecture_;
};

}  // namespace

LaunchShape check_launch(const Program& program, const LaunchOptions& options) {
  const Checker checker(program, options);
  checker.check_dimensions();
  LaunchShape shape;
  shape.cluster = checker.cluster();
  shape.shared_bytes = checker.shared_bytes();
  shape.reuses_shared = options.grid.volume() > checker.most_resident_ctas(shape.shared_bytes);
  return shape;
}

}  // namespace torchext::sim
