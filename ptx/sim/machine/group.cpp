// A group: one grid a GPU, run turn by turn on one host thread, on memory that all of them may access.
#include <algorithm>
#include <set>
#include <sstream>
#include <stdexcept>
#include <tuple>

#include "../frontend/decode.h"
#include "machine.h"

namespace torchext::sim {

namespace {

// Instructions that a cluster executes in a turn. Short turns let every GPU overtake every other.
constexpr std::uint32_t kMostOfATurn = 4096;

// A grid, and its clusters that are on the GPU.
struct Running {
  std::unique_ptr<Grid> grid;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::uint64_t> counts;  // executions, by pc
  std::uint32_t next = 0, total = 0;  // clusters
};

class GridGroup {
 public:
  GridGroup(const std::vector<GroupMember>& members, const std::vector<Buffer>& buffers)
      : world_(members.size()), random_(members.front().options.seed ^ 0x67726f7570ull) {
    for (const Buffer& b : buffers) {
      if (b.bytes != 0)
        world_.buffers.push_back(Memory::make(b, members.front().options.checks, false));
    }
    for (const GroupMember& m : members) {
      Running running;
      running.grid = std::make_unique<Grid>(world_, *m.module, m.module->program(m.kernel),
                                            m.options, m.params, m.device);
      const std::uint64_t clusters = m.options.grid.volume() / running.grid->cluster_size;
      if (clusters >= 1u << kGpuShift)
        throw std::invalid_argument("launch of '" + m.kernel +
                                    "': grid must have fewer than 2^28 clusters in a group");
      running.total = static_cast<std::uint32_t>(clusters);
      running.counts.assign(running.grid->program->code.size(), 0);
      gpus_.push_back(std::move(running));
    }
  }

  std::vector<Report> run() {
    try {
      while (turn()) {
      }
      if (gpus_.front().grid->checks) check_remote_stores();
    } catch (const LaunchStopped&) {
      world_.stop = true;
    }
    std::vector<Report> reports;
    for (Running& gpu : gpus_) {
      for (const auto& cluster : gpu.clusters) account(gpu, *cluster);
      reports.push_back(gpu.grid->report_of(gpu.counts));
    }
    return reports;
  }

 private:
  static void account(Running& gpu, const Cluster& cluster) {
    for (std::size_t i = 0; i < gpu.counts.size(); ++i) gpu.counts[i] += cluster.counts[i];
  }

  // Runs each cluster once, in a new order. False if there are no more.
  bool turn() {
    std::vector<std::pair<Running*, Cluster*>> order;
    for (Running& gpu : gpus_) {
      while (gpu.next < gpu.total && gpu.clusters.size() < gpu.grid->options.num_sms)
        gpu.clusters.push_back(std::make_unique<Cluster>(*gpu.grid, gpu.next++));
      for (const auto& cluster : gpu.clusters) order.emplace_back(&gpu, cluster.get());
    }
    if (order.empty()) return false;
    for (std::size_t left = order.size(); left > 1; --left)
      std::swap(order[left - 1], order[random_.below(static_cast<std::uint32_t>(left))]);
    bool all_idle = true;
    for (const auto& [gpu, cluster] : order) all_idle &= !advances(*gpu, *cluster);
    const std::uint64_t world = world_.global_progress;
    all_idle = all_idle && std::all_of(order.begin(), order.end(), [&](const auto& entry) {
                 return entry.second->idle_at == world;
               });
    if (!all_idle) return true;
    bool more = false;
    for (const auto& [gpu, cluster] : order) more |= cluster->let_go_alone();
    if (!more) report_deadlock();
    ++world_.global_progress;
    return true;
  }

  // Runs a cluster for a while. True if it has changed something, or has ended.
  bool advances(Running& gpu, Cluster& cluster) {
    const std::uint64_t before = cluster.progress, world = world_.global_progress;
    const Cluster::State state = cluster.run(1 + random_.below(kMostOfATurn));
    if (state == Cluster::State::finished) {
      account(gpu, cluster);
      gpu.clusters.erase(std::find_if(gpu.clusters.begin(), gpu.clusters.end(),
                                      [&](const auto& c) { return c.get() == &cluster; }));
      ++world_.global_progress;
      return true;
    }
    const bool polled = cluster.progress == before;
    if (!polled) ++world_.global_progress;
    cluster.idle_at = polled && cluster.repeats() ? world : ~0ull;
    return !polled;
  }

  [[noreturn]] void report_deadlock() {
    Cluster::Waits waits;
    Warp* first = nullptr;
    const Group* group = nullptr;
    for (const Running& gpu : gpus_) {
      for (const auto& cluster : gpu.clusters) {
        std::ostringstream where;
        const Dim3& cta = cluster->ctas.front()->index;
        where << "device " << gpu.grid->device
              << (gpu.grid->cluster_size > 1 ? " cluster of CTA (" : " CTA (") << cta.x << ", "
              << cta.y << ", " << cta.z << ") ";
        const auto found = cluster->add_waits(where.str(), &waits);
        if (first == nullptr) std::tie(first, group) = found;
      }
    }
    std::string message = "no warp of any device can go on:";
    for (const auto& [why, who] : waits) message += "\n  " + who + ", " + why;
    if (first != nullptr) first->finding_at(group->pc, FindingKind::deadlock, message, group->mask);
    throw LaunchStopped{};
  }

  // Notes stores to the memory of other GPUs that no thread has released at .sys.
  void check_remote_stores() {
    const ForeignClocks released = world_.sync.released_to_all();
    for (const auto& buffer : world_.buffers) {
      if (buffer->shadow == nullptr) continue;
      std::set<std::pair<std::uint32_t, std::uint32_t>> noted;  // gpu, pc
      buffer->shadow->for_each_last_write([&](std::uint64_t offset, const LastWrite& write) {
        const Grid& grid = *world_.grids[gpu_of(write.cluster)];
        if (grid.device == buffer->device || write.scope == Scope::sys) return;
        if (write.agent >= grid.cluster_size * grid.warps_per_cta * 32) return;  // a bulk store
        const auto clocks = released.find(write.cluster);
        if (clocks != released.end() && write.agent < clocks->second->size() &&
            (*clocks->second)[write.agent] >= write.clock)
          return;
        if (noted.insert({grid.gpu, write.pc}).second) note_unreleased(*buffer, offset, write);
      });
    }
  }

  void note_unreleased(const GlobalBuffer& buffer, std::uint64_t offset, const LastWrite& write) {
    Grid& grid = *world_.grids[gpu_of(write.cluster)];
    const std::uint32_t cluster = write.cluster & ((1u << kGpuShift) - 1);
    const Dim3 cta = grid.cta_index(cluster, write.agent / (grid.warps_per_cta * 32));
    Finding f = grid.finding_of(write.pc);
    f.kind = FindingKind::unreleased_remote_store;
    f.message = "the grid ends, and nothing has released this store to byte " +
                std::to_string(offset) + " of " + buffer.described() + " at .sys scope";
    f.cta[0] = cta.x;
    f.cta[1] = cta.y;
    f.cta[2] = cta.z;
    f.warp = write.agent / 32 % grid.warps_per_cta;
    f.lanes = 1u << (write.agent % 32);
    f.address = buffer.begin + offset;
    grid.sink.add(std::move(f));
  }

  World world_;
  Random random_;
  std::vector<Running> gpus_;
};

// A module has one copy of its variables and one heap, as on one GPU.
void check_modules(const std::vector<GroupMember>& members) {
  for (std::size_t i = 0; i < members.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      const GroupMember &a = members[j], &b = members[i];
      const std::string devices = std::to_string(a.device) + " and " + std::to_string(b.device);
      if (a.device == b.device)
        throw std::invalid_argument("a device must have one launch of a group (got two on device " +
                                    std::to_string(a.device) + ")");
      if (a.module != b.module) continue;
      for (const auto& v : b.module->variables().entries) {
        if (v->bytes != 0 && !v->constant)
          throw std::invalid_argument(
              "each device must have a Module of its own, since the module has the variable '" +
              v->name + "' (got one for devices " + devices + "); make a Module a device");
      }
      if (b.module->program(b.kernel)->uses_heap)
        throw std::invalid_argument(
            "each device must have a Module of its own, since the kernel uses the device heap (got "
            "one for devices " +
            devices + "); make a Module a device");
    }
  }
}

}  // namespace

std::vector<Report> launch_group(const std::vector<GroupMember>& members,
                                 const std::vector<Buffer>& buffers) {
  if (members.empty() || members.size() > kMostGpus)
    throw std::invalid_argument("a group must have 1 to " + std::to_string(kMostGpus) +
                                " launches (got " + std::to_string(members.size()) + ")");
  check_modules(members);
  return GridGroup(members, buffers).run();
}

}  // namespace torchext::sim
