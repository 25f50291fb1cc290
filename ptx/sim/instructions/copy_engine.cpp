// Bulk copies: runs of bytes, reductions, completion.
#include "copy_engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../check/strong.h"
#include "../frontend/decode.h"
#include "../numerics/number_formats.h"
#include "../timing/trace.h"
#include "mbarrier.h"

namespace torchext::sim {

namespace {

template <class T>
T combine(ReduceOp op, T a, T b) {
  switch (op) {
    case ReduceOp::add:
      if constexpr (std::is_integral_v<T>) {
        using U = std::make_unsigned_t<T>;
        return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
      } else {
        return a + b;
      }
    case ReduceOp::min:
    case ReduceOp::max:
      if constexpr (std::is_floating_point_v<T>) {
        if (a != a || b != b) return a != a ? b : a;
        if (a == b) return std::signbit(a) == (op == ReduceOp::max) ? b : a;  // -0 < +0
      }
      return op == ReduceOp::min ? std::min(a, b) : std::max(a, b);
    default:
      break;
  }
  if constexpr (std::is_integral_v<T>) {
    switch (op) {
      case ReduceOp::inc:
        return a >= b ? T{0} : static_cast<T>(a + 1);
      case ReduceOp::dec:
        return a == 0 || a > b ? b : static_cast<T>(a - 1);
      case ReduceOp::bit_and:
        return static_cast<T>(a & b);
      case ReduceOp::bit_or:
        return static_cast<T>(a | b);
      case ReduceOp::bit_xor:
        return static_cast<T>(a ^ b);
      default:
        break;
    }
  }
  return b;
}

template <class T>
void reduce_as(ReduceOp op, std::uint8_t* to, const std::uint8_t* from, std::size_t bytes) {
  for (std::size_t at = 0; at + sizeof(T) <= bytes; at += sizeof(T)) {
    T a, b;
    std::memcpy(&a, to + at, sizeof(T));
    std::memcpy(&b, from + at, sizeof(T));
    a = combine(op, a, b);
    std::memcpy(to + at, &a, sizeof(T));
  }
}

}  // namespace

Reduction take_reduction(Decoder& d, bool with_type) {
  Reduction r;
  const std::string op = d.need_one_of({"add", "min", "max", "inc", "dec", "and", "or", "xor"});
  r.op = op == "add"   ? ReduceOp::add
         : op == "min" ? ReduceOp::min
         : op == "max" ? ReduceOp::max
         : op == "inc" ? ReduceOp::inc
         : op == "dec" ? ReduceOp::dec
         : op == "and" ? ReduceOp::bit_and
         : op == "or"  ? ReduceOp::bit_or
                       : ReduceOp::bit_xor;
  if (with_type) {
    d.take("noftz");
    r.type = d.take_type();
  }
  return r;
}

void reduce_bytes(const Reduction& r, std::uint8_t* to, const std::uint8_t* from,
                  std::size_t bytes) {
  switch (r.type) {
    case Type::f16:
    case Type::bf16:
      for (std::size_t at = 0; at + 2 <= bytes; at += 2) {
        std::uint16_t a, b;
        std::memcpy(&a, to + at, 2);
        std::memcpy(&b, from + at, 2);
        const bool half = r.type == Type::f16;
        const float x = half ? f16_to_float(a) : bf16_to_float(a);
        const float y = half ? f16_to_float(b) : bf16_to_float(b);
        const double v = combine<double>(r.op, x, y);
        a = half ? encode_f16(v) : encode_bf16(v);
        std::memcpy(to + at, &a, 2);
      }
      return;
    case Type::f32:
      return reduce_as<float>(r.op, to, from, bytes);
    case Type::f64:
      return reduce_as<double>(r.op, to, from, bytes);
    case Type::s32:
      return reduce_as<std::int32_t>(r.op, to, from, bytes);
    case Type::s64:
      return reduce_as<std::int64_t>(r.op, to, from, bytes);
    case Type::u64:
    case Type::b64:
      return reduce_as<std::uint64_t>(r.op, to, from, bytes);
    case Type::u8:
    case Type::b8:
      return reduce_as<std::uint8_t>(r.op, to, from, bytes);
    case Type::u16:
    case Type::b16:
      return reduce_as<std::uint16_t>(r.op, to, from, bytes);
    default:
      return reduce_as<std::uint32_t>(r.op, to, from, bytes);
  }
}

Actor copy_actor(Warp& w, int lane, std::uint32_t agent, std::uint32_t clock) {
  Actor a = w.actor(lane);
  a.agent = agent;
  a.clock = clock;
  a.proxy = Proxy::async;
  return a;
}

Signal make_signal(Cta& cta, std::uint32_t offset, const MBarrier& m) {
  return {&cta, offset, m.agent, static_cast<std::uint32_t>(m.phase) + 1};
}

namespace {

// Each element is reduced in one step, as by red.
void reduce_global(const CopyJob& job, std::uint8_t* to, const std::uint8_t* from,
                   std::uint32_t bytes) {
  for (std::uint32_t at = 0; at < bytes;) {
    const auto address = reinterpret_cast<std::uint64_t>(to + at);
    const auto n = std::min<std::uint32_t>(bytes - at, kStrongBytes - address % kStrongBytes);
    const std::lock_guard<std::mutex> step(strong_lock(address));
    const auto guard = job.global->guard();
    reduce_bytes(job.reduction, to + at, from + at, n);
    at += n;
  }
}

void run_job(const CopyJob& job) {
  const bool reduces = job.reduction.op != ReduceOp::none;
  for (const CopyRun& r : job.runs) {
    const std::uint8_t* from = r.from != nullptr ? r.from : job.fills[r.fill].data();
    if (reduces && job.global != nullptr) {
      reduce_global(job, r.to, from, r.bytes);
    } else if (reduces) {
      reduce_bytes(job.reduction, r.to, from, r.bytes);
    } else {
      const auto guard = job.global != nullptr ? job.global->guard() : std::unique_lock<SpinLock>();
      std::memcpy(r.to, from, r.bytes);
    }
  }
}

}  // namespace

namespace {

// Tells the clock of a copy. A multicast reads memory once for all its receivers.
void note_copy(Warp& w, const CopyJob& job, timing::Action action, std::uint32_t receivers) {
  timing::Recorder& recorder = *timing::recorder();
  const bool loads = action.kind == timing::Action::load;
  for (const CopyRun& r : job.runs) {
    const std::uint8_t* global = loads ? r.from : r.to;
    if (job.global == nullptr || global == nullptr) continue;
    action.global_bytes += r.bytes;
    const bool first = !loads || receivers == 1 || w.cta().rank == action.rank;
    recorder.touch(job.global, reinterpret_cast<std::uint64_t>(global), r.bytes, !loads, first);
  }
  if (loads) action.flag = job.runs.size() > 1;
  if (job.global != nullptr) action.buffer = recorder.index_of(job.global);
  action.receivers = static_cast<std::uint8_t>(receivers);
  recorder.note(action);
}

}  // namespace

void start_signaled(Warp& w, CopyJob job, const Signal& signal, std::uint32_t bytes,
                    std::string what, std::uint32_t receivers) {
  if (timing::recorder() != nullptr) {
    timing::Action action;
    action.kind = timing::Action::load;
    action.rank = static_cast<std::uint8_t>(signal.cta->rank);
    action.id = signal.offset;
    action.bytes = bytes;
    note_copy(w, job, action, receivers);
  }
  auto work = std::make_shared<AsyncWork>();
  work->what = std::move(what);
  auto shared_job = std::make_shared<CopyJob>(std::move(job));
  work->finish = [shared_job, signal, bytes] {
    run_job(*shared_job);
    complete_transactions(*signal.cta, signal.offset, bytes);
  };
  const auto m = signal.cta->mbarriers.find(signal.offset);
  if (m != signal.cta->mbarriers.end()) {
    m->second.work.push_back(work);
    m->second.signaled = m->second.phase + 1;
    m->second.signaled_pc = w.pc();
  }
  w.cluster().start(work);
}

CopyGroups& bulk_group(Warp& w, int lane) {
  CopyGroups& g = w.bulk_groups[lane];
  if (g.read_agent == 0) {
    g.read_agent = w.cluster().new_agent();
    g.write_agent = w.cluster().new_agent();
    const std::string who = w.cluster().describe_agent(w.agent(lane));
    w.cluster().agent_names[g.read_agent] = "a bulk store of " + who;
    w.cluster().agent_names[g.write_agent] = "a bulk store of " + who;
  }
  return g;
}

// Reading the source and writing the result are separate steps, as wait_group.read allows.
void start_grouped(Warp& w, int lane, CopyJob job, std::string what) {
  CopyGroups& g = bulk_group(w, lane);
  g.open = true;
  g.last_pc = w.pc();
  if (job.global != nullptr && job.global->device >= 0 && job.global->device != w.grid().device) {
    g.remote = g.current;
    g.remote_pc = w.pc();
    g.remote_device = job.global->device;
  }
  if (timing::recorder() != nullptr) {
    timing::Action action;
    action.kind = timing::Action::store;
    for (const CopyRun& r : job.runs) action.bytes += r.bytes;
    note_copy(w, job, action, 1);
  }
  auto work = std::make_shared<AsyncWork>();
  work->what = std::move(what);
  auto shared_job = std::make_shared<CopyJob>(std::move(job));
  work->read = [shared_job] {
    CopyJob& j = *shared_job;
    for (CopyRun& r : j.runs) {
      r.fill = static_cast<std::uint32_t>(j.fills.size());
      j.fills.emplace_back(r.from, r.from + r.bytes);
      r.from = nullptr;
    }
  };
  work->finish = [shared_job] { run_job(*shared_job); };
  g.work[g.current].push_back(work);
  w.cluster().start(work);
}

void join_group(Warp& w, int lane, int leader) {
  const CopyGroups& from = bulk_group(w, leader);
  CopyGroups& g = bulk_group(w, lane);
  g.open = true;
  g.last_pc = w.pc();
  g.work[g.current].push_back(from.work.at(from.current).back());
}

bool resolve_global(Warp& w, int lane, std::uint64_t address, std::uint64_t bytes, bool write,
                    Place* place) {
  if (bytes == 0) return false;
  if (!w.resolve(lane, Space::global, address, 1, write, place)) return false;
  if (address + bytes > place->buffer->end) {
    w.finding(FindingKind::out_of_bounds,
              "a bulk copy of " + std::to_string(bytes) + " bytes from " +
                  w.grid().memory.describe(address) + " runs past its end",
              1u << lane, address);
    return false;
  }
  return true;
}

bool resolve_shared(Warp& w, int lane, std::uint64_t address, std::uint64_t bytes,
                    std::uint32_t align, bool cluster, Place* place) {
  if (address % align) {
    w.finding(
        FindingKind::misaligned_access,
        "the shared-memory address of a bulk copy must be a multiple of " + std::to_string(align),
        1u << lane, address);
    return false;
  }
  if (!w.resolve(lane, cluster ? Space::shared_cluster : Space::shared, address, 1, true, place))
    return false;
  if (place->cta == nullptr) {
    w.finding(FindingKind::out_of_bounds, "the address is not in shared memory", 1u << lane,
              address);
    return false;
  }
  const std::uint64_t offset = static_cast<std::uint64_t>(place->host - place->cta->shared.data());
  if (offset + bytes > place->cta->shared.size()) {
    w.finding(
        FindingKind::out_of_bounds,
        "a bulk copy of " + std::to_string(bytes) + " bytes runs past the end of shared memory",
        1u << lane, address);
    return false;
  }
  return true;
}

}  // namespace torchext::sim
