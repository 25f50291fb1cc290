// Which clusters are replayed, one after another or beside each other, and the Prediction.
#include <cmath>
#include <stdexcept>

#include "csrc/runtime/architecture.h"
#include "replayer.h"

namespace torchext::sim::timing {

namespace {

constexpr std::uint64_t kMaxEvents = 24'000'000;  // replayed; further waves are extrapolated,
constexpr std::uint64_t kMaxClusters = 1024;      // as beyond so many clusters

// Clusters that run on the GPU at once, one on its group of SMs. They lie within a GPC; GPCs have 16
// or 18 SMs: 66 of 2, 30 of 4 and 15 of 8 CTAs fit on 132 SMs (flash-vla).
std::uint64_t groups_of_sms(std::uint32_t sms, std::uint32_t cluster_size) {
  if (cluster_size <= 2) return sms / cluster_size;
  if (cluster_size <= 4) return sms / 4 - sms / 44;
  if (cluster_size <= 8) return sms / 8 - 1;
  return std::max(1u, sms / 18);
}

}  // namespace

Replay::Replay(const Gpu& gpu, const Program& program, const LaunchShapeOf& launch,
               const std::vector<std::unique_ptr<ClusterTrace>>& traces)
    : gpu_(gpu),
      program_(program),
      launch_(launch),
      traces_(traces),
      costs_(costs(program, c_)),
      journal_(program, traces),
      memory_(c_),
      l2_(gpu, launch, traces) {
  bool fp8 = false;
  for (const Instruction& i : program.code) {
    const std::string& op = program.opcodes[i.opcode];
    const bool wgmma = i.traits.op_class == OpClass::wgmma;
    uses_tensor_cores_ |= wgmma || i.traits.op_class == OpClass::mma;
    fp8 |= wgmma && (op.find("e4m3") != op.npos || op.find("e5m2") != op.npos);
  }
  out_.gpu = gpu.name;
  out_.mhz = fp8 ? gpu.fp8_mhz : uses_tensor_cores_ ? gpu.tensor_mhz : gpu.other_mhz;
  out_.sms = gpu.sms;
}

// How much the traced clusters move on average, as a share of what this one moves: in a launch that
// fits on the GPU at once, some CTAs may have less to do than others, or nothing.
double Replay::share_of_others(const ClusterTrace& trace) const {
  const auto moved = [](const ClusterTrace& t) {
    double bytes = 1;
    for (const BufferUse& use : t.buffers) bytes += double(use.loaded + use.stored);
    return bytes;
  };
  double sum = 0;
  for (const auto& each : traces_) sum += moved(*each);
  return std::min(1.0, sum / double(traces_.size()) / moved(trace));
}

void Replay::start_cluster(double time, std::uint64_t index) {
  auto run = std::make_unique<ClusterRun>();
  run->index = static_cast<std::uint32_t>(index);
  run->trace = (*samples_)[index % samples_->size()];
  // In the last, partial wave fewer SMs have a cluster.
  run->multiplicity = double(rest_ != 0 && index + 1 == count_ ? rest_ : islands_);
  if (launch_.clusters <= islands_) share_ = share_of_others(*run->trace);
  run->multiplicity *= share_;
  for (std::size_t rank = 0; rank < run->trace->ctas.size(); ++rank) {
    auto cta = std::make_unique<CtaRun>();
    cta->cluster = run.get();
    cta->sm = &sms_[rank];
    cta->rank = static_cast<std::uint32_t>(rank);
    const auto& warps = run->trace->ctas[rank];
    cta->groups.resize((warps.size() + 3) / 4);
    for (std::size_t k = 0; k < warps.size(); ++k) {
      auto w = std::make_unique<WarpRun>();
      w->cta = cta.get();
      w->events = &warps[k];
      w->index = static_cast<std::uint32_t>(k);
      w->scheduler = static_cast<std::uint32_t>(k + index) % 4;
      w->threads = std::min(32u, launch_.threads - static_cast<std::uint32_t>(k) * 32);
      w->time = w->begin = time;
      w->ready.assign(program_.register_count + 1, 0);
      if (index == 0) journal_.show(*w);
      cta->alive_threads += w->threads;
      run->alive_threads += w->threads;
      ++run->live;
      push(time, Item::run, w.get());
      cta->warps.push_back(std::move(w));
    }
    run->ctas.push_back(std::move(cta));
  }
  running_.push_back(std::move(run));
}

// Runs `count` clusters, `resident` at a time. `rest`: clusters of the last, partial wave.
double Replay::simulate(const Samples& samples, std::uint64_t count, std::uint32_t resident,
                        std::uint64_t rest, double* middle) {
  queue_ = {};
  memory_.start(dram_rate());
  l2_bytes_ = 0;
  sms_.assign(launch_.cluster_size, Sm{});
  running_.clear();
  journal_.restart();
  samples_ = &samples;
  count_ = count;
  rest_ = rest;
  next_ = 0;
  finished_ = 0;
  end_ = middle_ = 0;
  while (next_ < count && next_ < resident) start_cluster(0, next_++);
  while (!queue_.empty()) {
    const Item item = queue_.top();
    queue_.pop();
    switch (item.kind) {
      case Item::run:
        step(*static_cast<WarpRun*>(item.what));
        break;
      case Item::arrive:
        change(*static_cast<Mbarrier*>(item.what), item.time, item.count, item.bytes);
        break;
      case Item::transactions:
        change(*static_cast<Mbarrier*>(item.what), item.time, 0, item.bytes);
        break;
    }
  }
  if (finished_ != count)
    throw std::runtime_error("the timing replay stopped: a warp waits for what no traced CTA does");
  if (middle != nullptr) *middle = middle_;
  return end_;
}

std::uint32_t Replay::ctas_that_fit() const {
  const Architecture& arch = *find_architecture(gpu_.capability);
  std::uint32_t fit =
      std::min(arch.threads_per_sm / ((launch_.threads + 31) / 32 * 32), arch.ctas_per_sm);
  fit = std::min(fit, arch.shared_per_sm / std::max(1u, launch_.shared_bytes + 1024));
  double registers = launch_.registers_per_thread;  // that the launch bounds allow
  if (!uses_tensor_cores_) registers = std::min(registers, c_.plain_registers);
  fit = std::min(fit, static_cast<std::uint32_t>(limits::registers_per_sm /
                                                 std::max(1.0, registers * launch_.threads)));
  return std::max(1u, fit);
}

// One cluster on each group of SMs: the slowest of the traced ones decides.
double Replay::one_wave() {
  double longest = 0, sum = 0;
  Samples slowest;
  for (const auto& trace : traces_) {
    const double each = simulate({trace.get()}, 1, 1, 0, nullptr);
    sum += each;
    if (each > longest) {
      longest = each;
      slowest = {trace.get()};
    }
  }
  out_.tail = 1 - sum / (longest * double(traces_.size()));
  if (uses_tensor_cores_) {
    simulate(slowest, 1, 1, 0, nullptr);
    set_clock();
  }
  journal_.start_timeline();
  return simulate(slowest, 1, 1, 0, nullptr);
}

// As many clusters as one group of SMs gets, or at least some of them.
double Replay::many_waves(std::uint64_t queue, std::uint64_t rest) {
  Samples all;
  std::uint64_t events = 0;
  for (const auto& trace : traces_) {
    all.push_back(trace.get());
    events += trace->events();
  }
  const std::uint32_t fit = out_.ctas_per_sm;
  const std::uint64_t each = std::max<std::uint64_t>(1, events / all.size());
  const std::uint64_t affordable =
      std::max<std::uint64_t>(4 * fit, std::min(kMaxClusters, kMaxEvents / each));
  const std::uint64_t count = std::min(queue, affordable);
  if (count < queue) rest = 0;
  double middle = 0;
  if (uses_tensor_cores_) {
    simulate(all, count, fit, rest, &middle);
    set_clock();
  }
  journal_.start_timeline();
  double cycles = simulate(all, count, fit, rest, &middle);
  if (count < queue)
    cycles += (cycles - middle) / double(count - count / 2) * double(queue - count);
  out_.tail = 1 - double(launch_.clusters) / double(queue * islands_);
  return cycles;
}

Prediction Replay::run() {
  const std::uint64_t most = groups_of_sms(gpu_.sms, launch_.cluster_size);
  islands_ = std::min<std::uint64_t>(most, launch_.clusters);
  out_.ctas_per_sm = ctas_that_fit();
  out_.waves = double(launch_.clusters) / double(most * out_.ctas_per_sm);
  for (const auto& trace : traces_)
    out_.traced_ctas += static_cast<std::uint32_t>(trace->ctas.size());
  const std::uint64_t queue = (launch_.clusters + islands_ - 1) / islands_;
  summarize(queue == 1 ? one_wave() : many_waves(queue, launch_.clusters % islands_));
  return std::move(out_);
}

// Tensor cores at work lower the clock: in full, if they work for c_.full_load of the time.
void Replay::set_clock() {
  double busy = 0;
  for (const Sm& sm : sms_) busy += sm.busy_tensor;
  const double load = busy / std::max(1.0, end_ * double(sms_.size()));
  out_.mhz = gpu_.other_mhz - (gpu_.other_mhz - out_.mhz) * std::min(1.0, load / c_.full_load);
}

void Replay::summarize(double cycles) {
  out_.cycles = cycles;
  out_.launch_microseconds = c_.ramp + c_.drain;
  out_.microseconds = cycles / out_.mhz + out_.launch_microseconds;
  out_.error = c_.error;
  const double simulated = std::max(1.0, end_), sms = double(sms_.size());
  Sm sum;
  for (const Sm& sm : sms_) {
    sum.busy_slots += sm.busy_slots;
    for (int p = 0; p < kPipes; ++p) sum.busy_pipe[p] += sm.busy_pipe[p];
    sum.busy_shared += sm.busy_shared;
    sum.busy_tensor += sm.busy_tensor;
    sum.busy_tma += sm.busy_tma;
    sum.busy_port += sm.busy_port;
  }
  const double whole = simulated * sms;
  auto& u = out_.utilization;
  u["issue slots"] = sum.busy_slots / whole / 4;
  u["ALU"] = sum.busy_pipe[kAlu] / whole / 4;
  u["FMA"] = sum.busy_pipe[kFma] / whole / 4;
  u["special functions"] = sum.busy_pipe[kSpecial] / whole / 4;
  u["converts"] = sum.busy_pipe[kConvert] / whole / 4;
  u["shared memory"] = sum.busy_shared / whole;
  u["tensor cores"] = sum.busy_tensor / whole;
  u["TMA"] = sum.busy_tma / whole;
  u["L2 to SM"] = sum.busy_port / whole;
  const double share = share_ * double(islands_) * memory_.bytes() / simulated / memory_.rate();
  u["device memory"] = std::min(1.0, share);
  const double scale = share_ * double(islands_) * cycles / simulated;
  out_.dram_bytes = memory_.bytes() * scale;
  out_.l2_bytes = l2_bytes_ * scale;
  journal_.summarize(out_, simulated, sms);
}

Prediction predict(const Gpu& gpu, const Program& program, const LaunchShapeOf& launch,
                   const std::vector<std::unique_ptr<ClusterTrace>>& traces) {
  return Replay(gpu, program, launch, traces).run();
}

}  // namespace torchext::sim::timing
