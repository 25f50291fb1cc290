// A launch: lays out constants and memory, runs clusters on all cores.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <sstream>
#include <thread>

#include "../frontend/decode.h"
#include "../timing/replay.h"
#include "csrc/runtime/architecture.h"
#include "launch_checks.h"
#include "machine.h"

namespace torchext::sim {

namespace {

[[noreturn]] void refuse(const std::string& kernel, const std::string& what) {
  throw std::invalid_argument("launch of '" + kernel + "': " + what);
}

// Registers that ptxas gives each thread at the start: as many as the launch bounds allow, in steps
// of eight, but not above the largest count of a setmaxnreg if the kernel ever increases its count.
std::uint32_t default_registers(const Program& program, const Dim3& block) {
  const Function& f = program.attributes;
  const auto volume = [](const std::uint32_t (&n)[3]) { return std::uint64_t{n[0]} * n[1] * n[2]; };
  std::uint64_t threads = f.required_threads[0] != 0 ? volume(f.required_threads)
                          : f.max_threads[0] != 0    ? volume(f.max_threads)
                                                     : block.volume();
  threads = (threads + 31) / 32 * 32;
  const std::uint64_t share = limits::registers_per_sm / std::max(1u, f.min_ctas);
  auto most = static_cast<std::uint32_t>(std::min<std::uint64_t>(256, share / threads));
  if (f.max_registers != 0) most = std::min(most, f.max_registers);
  if (program.asks_for_registers) most = std::min(most, program.most_registers);
  return std::max(16u, most / 8 * 8);
}

// Bytes around the parameters. Stores beyond an array that the host has allocated next to them would
// otherwise be "read-only memory" in some runs.
constexpr std::size_t kParamGuard = 16 << 10;

// The clock replays the traces of some clusters: the first, the last, and others between them,
// until they have so many events.
constexpr std::uint64_t kTracedEvents = 2'000'000;
constexpr std::uint32_t kTracedClusters = 16;

std::vector<std::uint32_t> to_trace(std::uint32_t clusters) {
  std::vector<std::uint32_t> chosen{0};
  const auto add = [&](std::uint32_t n) {
    if (std::find(chosen.begin(), chosen.end(), n) == chosen.end()) chosen.push_back(n);
  };
  add(clusters - 1);
  for (std::uint32_t parts = 2; parts <= kTracedClusters / 2; parts *= 2) {
    for (std::uint32_t k = 1; k < parts; k += 2)
      add(static_cast<std::uint32_t>(std::uint64_t{clusters} * k / parts));
  }
  return chosen;
}

}  // namespace

Grid::Grid(World& in, const Module& module, std::shared_ptr<const Program> p,
           const LaunchOptions& o, const std::vector<ParamBytes>& params, int of_device)
    : program(std::move(p)),
      options(o),
      sink(o.max_findings),
      checks(o.checks),
      world(in),
      gpu(static_cast<std::uint32_t>(in.grids.size())),
      device(of_device),
      stop(in.stop),
      executed(in.executed),
      global_progress(in.global_progress),
      sync(in.sync),
      files_(module.files()),
      heap_(module.heap()),
      heap_launch_(heap_.start_launch()) {
  const Function& f = program->attributes;
  const std::string& name = program->kernel;
  const LaunchShape shape = check_launch(*program, o);
  threads = static_cast<std::uint32_t>(o.block.volume());
  warps_per_cta = (threads + 31) / 32;
  cluster_dim = shape.cluster;
  cluster_size = static_cast<std::uint32_t>(cluster_dim.volume());
  explicit_cluster = f.cluster[0] != 0 || f.explicit_cluster || o.cluster.volume() != 0;
  shared_bytes = shape.shared_bytes;
  reuses_shared = shape.reuses_shared;
  registers_per_thread = o.registers_per_thread;
  if (registers_per_thread == 0) registers_per_thread = default_registers(*program, o.block);

  if (params.size() != program->params.size()) {
    refuse(name, "the number of arguments must be " + std::to_string(program->params.size()) +
                     " (got " + std::to_string(params.size()) + ")");
  }
  param_block.assign(program->param_bytes / 8 + 32 + 2 * kParamGuard / 8, 0);
  auto base = reinterpret_cast<std::uint64_t>(param_block.data()) + kParamGuard;
  base = (base + 127) / 128 * 128;
  for (std::size_t i = 0; i < params.size(); ++i) {
    if (params[i].size() != program->params[i].bytes) {
      refuse(name, "argument " + std::to_string(i) + " must have " +
                       std::to_string(program->params[i].bytes) + " bytes, as parameter " +
                       program->params[i].name + " (got " + std::to_string(params[i].size()) + ")");
    }
    std::memcpy(reinterpret_cast<void*>(base + program->param_offsets[i]), params[i].data(),
                params[i].size());
  }
  constants.assign(program->constants.size() / 8 + 1, 0);
  if (!program->constants.empty())
    std::memcpy(constants.data(), program->constants.data(), program->constants.size());
  for (const auto& [offset, addend] : program->param_addresses) {
    for (std::size_t lane = 0; lane < 32; ++lane)
      constants[offset / 8 + lane] = base + static_cast<std::uint64_t>(addend);
  }

  world.grids.push_back(this);
  for (const auto& buffer : world.buffers) memory.add(buffer);
  if (program->param_bytes != 0)
    memory.add({reinterpret_cast<void*>(base), program->param_bytes, Buffer::Read, "parameters"},
               checks, true);
  for (const auto& v : module.variables().entries) {
    if (v->bytes == 0) continue;
    memory.add({v->data, v->bytes, v->constant ? Buffer::Read : Buffer::ReadWrite, v->name}, checks,
               true);
  }
  const auto reads = [&](Special which) {
    return std::any_of(program->specials.begin(), program->specials.end(),
                       [&](const auto& s) { return s.which == which; });
  };
  if (reads(Special::workspace_low))
    memory.add({workspace_, sizeof workspace_, Buffer::ReadWrite, "grid workspace"}, checks, true);
  if (reads(Special::reserved_shared_slot)) shared_begin = 0;
  const bool uses_heap = program->uses_heap || heap_.exists();
  if (uses_heap)
    memory.add({heap_.data(), DeviceHeap::kBytes, Buffer::ReadWrite, "device heap"}, checks, true);
  memory.sort();
  if (uses_heap) memory.find(reinterpret_cast<std::uint64_t>(heap_.data()))->heap = &heap_;
}

void Grid::print(const std::string& text) {
  const std::lock_guard<std::mutex> lock(output_mutex_);
  output_ += text;
}

std::size_t Report::count(Grade grade) const {
  return static_cast<std::size_t>(std::count_if(
      findings.begin(), findings.end(), [grade](const Finding& f) { return f.grade() == grade; }));
}

Dim3 Grid::cta_index(std::uint32_t cluster, std::uint32_t rank) const {
  const Dim3& size = cluster_dim;
  const std::uint32_t across = options.grid.x / size.x, up = options.grid.y / size.y;
  return Dim3{cluster % across * size.x + rank % size.x,
              cluster / across % up * size.y + rank / size.x % size.y,
              cluster / across / up * size.z + rank / size.x / size.y};
}

Finding Grid::finding_of(std::uint32_t pc) const {
  const Instruction& i = program->code[pc];
  Finding f;
  f.kernel = program->kernel;
  f.ptx_line = i.line;
  f.opcode = program->opcodes[i.opcode];
  if (i.source_line != 0 && i.file < files_.size()) {
    f.file = files_[i.file];
    f.source_line = i.source_line;
  }
  f.seed = options.seed;
  f.device = device;
  return f;
}

// Notes the blocks of the device heap that the launch has not freed, by the call of malloc.
void Grid::note_kept_blocks() {
  std::map<std::uint32_t, std::pair<std::uint64_t, std::uint64_t>> kept;  // pc: blocks, bytes
  for (const DeviceHeap::Block& block : heap_.kept(heap_launch_)) {
    ++kept[block.pc].first;
    kept[block.pc].second += block.bytes;
  }
  for (const auto& [pc, sum] : kept) {
    Finding f = finding_of(pc);
    f.kind = FindingKind::heap_leak;
    f.message = std::to_string(sum.first) +
                (sum.first == 1 ? " block of " : " blocks of together ") +
                std::to_string(sum.second) + " bytes, allocated here, not freed by the launch";
    sink.add(std::move(f));
  }
}

Report Grid::run() {
  const auto started = std::chrono::steady_clock::now();
  const auto clusters_of_grid = static_cast<std::uint32_t>(options.grid.volume() / cluster_size);
  timing::Request* const request = timing::request();
  const bool only = request != nullptr && request->only;
  const std::vector<std::uint32_t> traced =
      request == nullptr ? std::vector<std::uint32_t>() : to_trace(clusters_of_grid);
  const auto total = only ? static_cast<std::uint32_t>(traced.size()) : clusters_of_grid;
  std::map<std::uint32_t, std::unique_ptr<timing::ClusterTrace>> traces;  // by place in `traced`
  std::atomic<std::uint64_t> traced_events{0};
  unsigned workers =
      options.num_threads ? options.num_threads : std::thread::hardware_concurrency();
  workers = only ? 1 : std::max(1u, std::min(workers, total));

  std::atomic<std::uint32_t> next{0};
  std::mutex counts_mutex;
  std::vector<std::uint64_t> counts(program->code.size(), 0);
  std::exception_ptr failure;
  // A polling cluster yields to others. As many clusters are resident as the GPU holds at once.
  const std::uint32_t resident = only ? 1 : std::max(1u, (options.num_sms + workers - 1) / workers);
  std::map<std::uint32_t, std::unique_ptr<timing::Recorder>> recorders;  // by cluster
  const auto new_cluster = [&](std::uint32_t n) {
    auto cluster = std::make_unique<Cluster>(*this, only ? traced[n] : n);
    if (std::find(traced.begin(), traced.end(), cluster->number) != traced.end()) {
      const std::lock_guard<std::mutex> lock(counts_mutex);
      recorders[cluster->number] = std::make_unique<timing::Recorder>(*cluster, warps_per_cta);
    }
    return cluster;
  };
  const auto run_cluster = [&](Cluster& cluster) {
    timing::Recorder* recorder = nullptr;
    if (!traced.empty()) {
      const std::lock_guard<std::mutex> lock(counts_mutex);
      const auto it = recorders.find(cluster.number);
      if (it != recorders.end()) recorder = it->second.get();
    }
    const timing::Listening listening(recorder, only);
    return cluster.run(1'000'000);
  };
  // All workers must agree that there is a deadlock. Each stores here the value of global_progress
  // at which all of its clusters repeated, and whether it has tried every remaining step.
  enum : std::uint64_t { kBusy = ~0ull, kGone = ~1ull };
  const auto idle = [](std::uint64_t world, bool tried) { return world * 2 + tried; };
  std::vector<std::atomic<std::uint64_t>> verdicts(workers);
  for (auto& v : verdicts) v = kBusy;
  std::atomic<bool> reported{false};
  const auto all_idle = [&](std::uint64_t world, bool tried) {
    const bool agree = std::all_of(verdicts.begin(), verdicts.end(), [&](const auto& verdict) {
      const std::uint64_t v = verdict.load();
      return v == kGone || v == idle(world, true) || (!tried && v == idle(world, false));
    });
    return agree && global_progress.load() == world;  // an ended worker may have advanced it
  };

  const auto work = [&](unsigned me) {
    std::deque<std::unique_ptr<Cluster>> clusters;
    const auto account = [&](const Cluster& c) {
      const std::lock_guard<std::mutex> lock(counts_mutex);
      for (std::size_t i = 0; i < counts.size(); ++i) counts[i] += c.counts[i];
      const auto recorder = recorders.find(c.number);
      if (recorder == recorders.end()) return;
      auto trace = recorder->second->take();
      traced_events += trace->events();
      const auto place = std::find(traced.begin(), traced.end(), c.number) - traced.begin();
      traces[static_cast<std::uint32_t>(place)] = std::move(trace);
    };
    try {
      while (!stop.load()) {
        if (clusters.empty()) {
          const std::uint32_t n = next.fetch_add(1);
          if (n >= total || (only && traced_events.load() > kTracedEvents)) break;
          clusters.push_back(new_cluster(n));
        }
        std::unique_ptr<Cluster> c = std::move(clusters.front());
        clusters.pop_front();
        const std::uint64_t before = c->progress, world = global_progress.load();
        Cluster::State state;
        try {
          state = run_cluster(*c);
        } catch (const LaunchStopped&) {
          account(*c);
          throw;
        }
        if (state == Cluster::State::finished) {
          account(*c);
          verdicts[me] = kBusy;
          global_progress.fetch_add(1);
          continue;
        }
        const bool polled = c->progress == before;
        if (!polled) {
          verdicts[me] = kBusy;
          global_progress.fetch_add(1);
        }
        c->idle_at = polled && c->repeats() ? world : kBusy;
        Cluster& waiting = *c;
        clusters.push_back(std::move(c));
        // The cluster waits for another one, or runs long: let another cluster run.
        if (clusters.size() < resident) {
          const std::uint32_t n = next.fetch_add(1);
          if (n < total) {
            clusters.push_front(new_cluster(n));
            continue;
          }
        }
        if (!polled) continue;
        std::this_thread::yield();
        if (!std::all_of(clusters.begin(), clusters.end(),
                         [&](const auto& other) { return other->idle_at == world; })) {
          continue;
        }
        if (verdicts[me] != idle(world, true)) verdicts[me] = idle(world, false);
        if (!all_idle(world, false)) continue;
        bool more = false;
        for (const auto& other : clusters) more |= other->let_go_alone();
        if (more) {
          verdicts[me] = kBusy;
          global_progress.fetch_add(1);
          continue;
        }
        verdicts[me] = idle(world, true);
        if (!all_idle(world, true)) continue;
        if (!reported.exchange(true)) waiting.report_deadlock();
        throw LaunchStopped{};
      }
    } catch (const LaunchStopped&) {
      stop.store(true);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(counts_mutex);
      if (!failure) failure = std::current_exception();
      stop.store(true);
    }
    verdicts[me] = kGone;
  };
  if (workers == 1) {
    work(0);
  } else {
    std::vector<std::thread> pool;
    for (unsigned i = 0; i < workers; ++i) pool.emplace_back(work, i);
    for (std::thread& t : pool) t.join();
  }
  if (failure) std::rethrow_exception(failure);

  Report report = report_of(counts);
  if (request != nullptr && !stop.load()) {
    std::uint64_t events = 0;
    std::vector<std::unique_ptr<timing::ClusterTrace>> chosen;
    for (auto& [place, trace] : traces) {
      if (events > kTracedEvents) break;
      events += trace->events();
      chosen.push_back(std::move(trace));
    }
    timing::LaunchShapeOf shape{clusters_of_grid, cluster_size,         threads,
                                shared_bytes,     registers_per_thread, {}};
    for (const auto& buffer : memory.buffers())
      shape.buffer_bytes.push_back(buffer->end - buffer->begin);
    request->result = std::make_shared<timing::Prediction>(
        timing::predict(*timing::find_gpu(request->gpu), *program, shape, chosen));
  }
  report.seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  return report;
}

Report Grid::report_of(const std::vector<std::uint64_t>& counts) {
  if (checks && !stop.load()) note_kept_blocks();
  Report report;
  report.findings_truncated = sink.full();
  report.findings = sink.take();
  for (std::size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] == 0) continue;
    report.instructions[program->opcodes[program->code[i].opcode]] += counts[i];
    report.warp_instructions += counts[i];
  }
  report.output = std::move(output_);
  if (checks && !stop.load()) {
    for (const auto& b : memory.buffers()) {
      if (b->shadow == nullptr || b->device != device) continue;
      std::uint64_t first = 0;
      const std::uint64_t bytes = b->shadow->count_invalid(&first);
      if (bytes != 0) report.unwritten.push_back({b->name, bytes, first});
    }
  }
  return report;
}

Report launch(const Module& module, const std::string& kernel, const LaunchOptions& options,
              const std::vector<ParamBytes>& params, const std::vector<Buffer>& buffers) {
  module.kernel(kernel);
  World world;
  for (const Buffer& b : buffers) {
    if (b.bytes != 0) world.buffers.push_back(Memory::make(b, options.checks, false));
  }
  Grid grid(world, module, module.program(kernel), options, params);
  return grid.run();
}

}  // namespace torchext::sim
