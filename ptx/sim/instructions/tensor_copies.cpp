// cp.async.bulk.tensor: loads (with multicast), stores, reductions and prefetches of boxes.
#include <algorithm>

#include "../check/map_fences.h"
#include "../frontend/decode.h"
#include "../numerics/tensor_map.h"
#include "bulk_copies.h"
#include "copy_engine.h"
#include "mbarrier.h"

namespace torchext::sim {

namespace {

struct TensorCopy {
  U32 rank = 0;
  bool store = false, multicast = false, own_cta_only = false;
  Reduction reduction;
  Slot map, shared, barrier, mask;
  std::int64_t map_offset = 0, shared_offset = 0, barrier_offset = 0;
  Slot coordinates[kMaxTensorMapRank];
};

// The agent and clock that read the map for the lane.
using MapReader = std::pair<U32, U32>;

// Calls `reader` if the map can change and must be checked.
template <class Reader>
bool fetch_map(Warp& w, const TensorCopy& c, int lane, TensorMapFields* fields, Reader&& reader) {
  const U64 address = w.address(c.map, c.map_offset, lane);
  Place place;
  if (!resolve_tensor_map(w, lane, address, &place)) return false;
  if (is_checked_map(place)) {
    const MapReader by = reader();
    read_tensor_map(w, lane, place, address, by.first, by.second);
  }
  try {
    const auto guard = place.guard();
    *fields = decode_tensor_map(place.host);
  } catch (const TensorMapError& e) {
    w.finding(FindingKind::tensor_map, e.what(), 1u << lane, address);
    return false;
  }
  if (fields->rank != c.rank) {
    w.finding(FindingKind::tensor_map,
              "the instruction is " + std::to_string(c.rank) + "-D, the map is " +
                  std::to_string(fields->rank) + "-D",
              1u << lane, address);
    return false;
  }
  return true;
}

Type reduce_type(TensorMapDataType t) {
  switch (t) {
    case TensorMapDataType::uint8:
      return Type::u8;
    case TensorMapDataType::uint16:
      return Type::u16;
    case TensorMapDataType::int32:
      return Type::s32;
    case TensorMapDataType::uint64:
      return Type::u64;
    case TensorMapDataType::int64:
      return Type::s64;
    case TensorMapDataType::float16:
      return Type::f16;
    case TensorMapDataType::bfloat16:
      return Type::bf16;
    case TensorMapDataType::float64:
      return Type::f64;
    case TensorMapDataType::uint32:
      return Type::u32;
    default:
      return Type::f32;
  }
}

// Every in-bounds run of the box must lie in one buffer. Runs that are adjacent in global memory
// are checked together.
struct GlobalRange {
  U64 begin = 0, end = 0;
};

template <class Check>
void merged(GlobalRange& range, U64 address, U32 bytes, Check&& check) {
  if (range.end == address) {
    range.end += bytes;
    return;
  }
  if (range.begin != range.end) check(range);
  range = {address, address + bytes};
}

MapReader next_map_read(Warp& w, int lane) {
  CopyGroups& g = bulk_group(w, lane);
  if (g.map_agent == 0) {
    g.map_agent = w.cluster().new_agent();
    w.cluster().agent_names[g.map_agent] =
        "a tensor copy of " + w.cluster().describe_agent(w.agent(lane));
  }
  return {g.map_agent, ++g.map_clock};
}

// The box's coordinates. Reports a box that begins at an address that is no multiple of 16 bytes:
// PTX does not mention it, but a GPU stops with "illegal instruction" (seen on an H200).
bool read_coordinates(Warp& w, const TensorCopy& c, int lane, const TensorMapFields& f,
                      std::int32_t (&at)[kMaxTensorMapRank]) {
  for (U32 k = 0; k < c.rank; ++k)
    at[k] = static_cast<std::int32_t>(w.integer(c.coordinates[k], lane));
  const std::int64_t bytes = std::int64_t{at[0]} * size_in_bytes(f.data_type);
  if (bytes % 16 == 0) return true;
  w.finding(FindingKind::misaligned_access,
            "the innermost coordinate is " + std::to_string(at[0]) + ", at " +
                std::to_string(bytes) + " bytes; a tensor copy begins at a multiple of 16 bytes",
            1u << lane);
  return false;
}

void load_box(Warp& w, const TensorCopy& c, int lane) {
  TensorMapFields f;
  MapReader map_reader{0, 0};
  if (!fetch_map(w, c, lane, &f, [&] { return map_reader = next_map_read(w, lane); })) return;
  std::int32_t at[kMaxTensorMapRank] = {};
  if (!read_coordinates(w, c, lane, f, at)) return;
  const U32 bytes = box_bytes(f), span = box_span_bytes(f);
  Place place;
  const U64 shared = w.address(c.shared, c.shared_offset, lane);
  if (!resolve_shared(w, lane, shared, span, 128, !c.own_cta_only, &place)) return;
  Cta* barrier_cta;
  U32 barrier_offset;
  MBarrier* m = find_mbarrier_for_async(w, lane, Space::shared_cluster,
                                        w.address(c.barrier, c.barrier_offset, lane), &barrier_cta,
                                        &barrier_offset);
  if (m == nullptr) return;
  const auto offset = static_cast<U32>(place.host - place.cta->shared.data());

  struct Target {
    Cta* cta;
    Signal signal;
  };
  std::vector<Target> targets;
  if (c.multicast) {
    const auto mask = static_cast<U32>(w.integer(c.mask, lane)) & 0xffff;
    for_lanes(mask, [&](int rank) {
      if (static_cast<U32>(rank) >= w.grid().cluster_size) {
        w.finding(FindingKind::invalid_operand,
                  "the multicast mask names CTA rank " + std::to_string(rank) +
                      " of a cluster of " + std::to_string(w.grid().cluster_size),
                  1u << lane);
        return;
      }
      Cta& cta = *w.cluster().ctas[static_cast<std::size_t>(rank)];
      if (cta.exited()) {
        w.finding(FindingKind::exited_cta,
                  "multicast to CTA rank " + std::to_string(rank) + ", which has exited",
                  1u << lane);
        return;
      }
      const auto it = cta.mbarriers.find(barrier_offset);
      if (it == cta.mbarriers.end()) {
        w.finding(
            FindingKind::mbarrier_misuse,
            "multicast to CTA rank " + std::to_string(rank) + ", whose mbarrier is not initialized",
            1u << lane, barrier_offset);
        return;
      }
      targets.push_back({&cta, make_signal(cta, barrier_offset, it->second)});
    });
  } else {
    if (barrier_cta != place.cta) {
      w.finding(FindingKind::invalid_operand, "destination and mbarrier are in different CTAs",
                1u << lane);
      return;
    }
    targets.push_back({place.cta, make_signal(*barrier_cta, barrier_offset, *m)});
  }
  const auto fill_size = static_cast<U32>(std::max<std::uint64_t>(span, 16));
  for (const Target& t : targets) {
    CopyJob job;
    Actor actor = copy_actor(w, lane, t.signal.agent, t.signal.clock);
    std::uint8_t* base = t.cta->shared.data();
    GlobalRange range;
    bool good = true;
    const auto check = [&](const GlobalRange& r) {
      Place source;
      good = resolve_global(w, lane, r.begin, r.end - r.begin, false, &source) && good;
      if (!good) return;
      job.global = source.buffer;
      w.check_read(source, actor, static_cast<U32>(r.end - r.begin), 1u << lane, r.begin);
    };
    const bool dense = span == bytes;
    for_each_run(f, at, offset, [&](const BoxRun& r) {
      CopyRun run;
      run.to = base + r.shared_address;
      run.bytes = r.bytes;
      if (r.in_bounds) {
        merged(range, r.global_address, r.bytes, check);
        run.from = reinterpret_cast<const std::uint8_t*>(r.global_address);
      } else if (job.fills.empty()) {
        job.fills.emplace_back(fill_size);
        oob_fill_bytes(f, job.fills[0].data(), fill_size / 16 * 16);
      }
      job.runs.push_back(run);
      if (!dense && w.grid().checks) {
        Place part = place;
        part.shadow = &t.cta->shadow;
        part.offset = r.shared_address;
        w.check_write(part, actor, r.bytes, 1u << lane, r.shared_address);
      }
    });
    if (range.begin != range.end) check(range);
    if (!good) return;
    if (dense && w.grid().checks) {
      Place whole = place;
      whole.shadow = &t.cta->shadow;
      whole.offset = offset;
      w.check_write(whole, actor, span, 1u << lane, offset);
    }
    const auto m = t.cta->mbarriers.find(barrier_offset);
    if (map_reader.first != 0 && m != t.cta->mbarriers.end())
      m->second.map_reads.push_back(map_reader);
    start_signaled(w, std::move(job), t.signal, bytes, "a tensor copy",
                   static_cast<U32>(targets.size()));
  }
}

// Returns true if it has started a copy.
bool store_box(Warp& w, const TensorCopy& c, int lane) {
  TensorMapFields f;
  CopyGroups& group = bulk_group(w, lane);
  if (!fetch_map(w, c, lane, &f, [&] { return MapReader{group.read_agent, group.current}; }))
    return false;
  std::int32_t at[kMaxTensorMapRank] = {};
  if (!read_coordinates(w, c, lane, f, at)) return false;
  Place place;
  const U64 shared = w.address(c.shared, c.shared_offset, lane);
  if (!resolve_shared(w, lane, shared, box_span_bytes(f), 128, false, &place)) return false;
  const auto offset = static_cast<U32>(place.host - place.cta->shared.data());
  const Actor reader = copy_actor(w, lane, group.read_agent, group.current);
  Actor writer = copy_actor(w, lane, group.write_agent, group.current);
  CopyJob job;
  job.reduction = c.reduction;
  if (c.reduction.op != ReduceOp::none) {
    job.reduction.type = reduce_type(f.data_type);
    writer.scope = Scope::gpu;
  }
  std::uint8_t* base = place.cta->shared.data();
  GlobalRange range;
  bool good = true;
  const auto check = [&](const GlobalRange& r) {
    Place to;
    good = resolve_global(w, lane, r.begin, r.end - r.begin, true, &to) && good;
    if (!good) return;
    job.global = to.buffer;
    if (c.reduction.op != ReduceOp::none)
      w.check_read(to, writer, static_cast<U32>(r.end - r.begin), 1u << lane, r.begin);
    w.check_write(to, writer, static_cast<U32>(r.end - r.begin), 1u << lane, r.begin);
  };
  for_each_run(f, at, offset, [&](const BoxRun& r) {
    if (!r.in_bounds) return;
    // A GPU stores whole units of 16 bytes: where a row of the tensor ends within one, the bytes
    // behind it are overwritten from the box (seen on an H200).
    const U32 bytes = c.reduction.op == ReduceOp::none ? (r.bytes + 15) / 16 * 16 : r.bytes;
    merged(range, r.global_address, bytes, check);
    CopyRun run;
    run.from = base + r.shared_address;
    run.to = reinterpret_cast<std::uint8_t*>(r.global_address);
    run.bytes = bytes;
    job.runs.push_back(run);
    if (w.grid().checks) {
      Place part = place;
      part.offset = r.shared_address;
      w.check_read(part, reader, bytes, 1u << lane, r.shared_address);
    }
  });
  if (range.begin != range.end) check(range);
  if (good) start_grouped(w, lane, std::move(job), "a tensor store");
  return good;
}

bool same_operands(Warp& w, const TensorCopy& c, int a, int b) {
  bool same = w.address(c.map, c.map_offset, a) == w.address(c.map, c.map_offset, b) &&
              w.address(c.shared, c.shared_offset, a) == w.address(c.shared, c.shared_offset, b);
  for (U32 k = 0; k < c.rank; ++k)
    same &= w.integer(c.coordinates[k], a) == w.integer(c.coordinates[k], b);
  return same;
}

// Lanes that agree on every operand make one store together: in the machine code of ptxas 13.0, a
// warp issues one UTMASTG for each distinct set of operands. CUTLASS's epilogues rely on it.
void store_boxes(Warp& w, const TensorCopy& c, U32 mask) {
  U32 leaders = 0;
  for_lanes(mask, [&](int lane) {
    int leader = -1;
    for_lanes(leaders, [&](int other) {
      if (leader < 0 && same_operands(w, c, lane, other)) leader = other;
    });
    if (leader >= 0)
      join_group(w, lane, leader);
    else if (store_box(w, c, lane))
      leaders |= 1u << lane;
  });
}

Step copy(Warp& w, const Instruction& i, U32 mask) {
  const auto& c = i.as<TensorCopy>();
  w.need(c.map, mask, "as a tensor map's address");
  w.need(c.shared, mask, "as an address");
  for (U32 k = 0; k < c.rank; ++k) w.need(c.coordinates[k], mask, "as a coordinate");
  if (c.store && c.reduction.op == ReduceOp::none) {
    store_boxes(w, c, mask);
  } else {
    for_lanes(mask, [&](int lane) {
      if (c.store)
        store_box(w, c, lane);
      else
        load_box(w, c, lane);
    });
  }
  ++w.cluster().progress;
  return Step::next;
}

// Prefetching the box is only a hint, but the instruction reads the map.
Step prefetch(Warp& w, const Instruction& i, U32 mask) {
  const auto& c = i.as<TensorCopy>();
  w.need(c.map, mask, "as a tensor map's address");
  for (U32 k = 0; k < c.rank; ++k) w.need(c.coordinates[k], mask, "as a coordinate");
  for_lanes(mask, [&](int lane) {
    TensorMapFields f;
    fetch_map(w, c, lane, &f, [&] { return MapReader{w.agent(lane), w.clock(lane)}; });
  });
  return Step::next;
}

U32 take_rank(Decoder& d) {
  return static_cast<U32>(d.need_one_of({"1d", "2d", "3d", "4d", "5d"})[0] - '0');
}

void take_map(Decoder& d, TensorCopy& c, const Arg& arg) {
  Space space = Space::generic;
  c.map = d.address(arg, &c.map_offset, &space);
  if (arg.args.size() != 2 || arg.args[1].kind != Arg::vector || arg.args[1].args.size() != c.rank)
    d.fail_operand(arg, "[map, {" + std::to_string(c.rank) + " coordinates}]");
  for (U32 k = 0; k < c.rank; ++k) c.coordinates[k] = d.source(arg.args[1].args[k], Type::s32);
}

}  // namespace

void decode_bulk_tensor(Decoder& d, bool reduce) {
  d.is(OpClass::bulk_copy);
  TensorCopy c;
  if (d.take("prefetch")) {
    c.rank = take_rank(d);
    d.take("L2");
    d.take("global");
    d.take("tile");
    d.take_cache_hints();
    d.finish(d.has_cache_policy ? 2 : 1);
    take_map(d, c, d.arg(0));
    d.reads(Space::global, 0, Proxy::async);
    d.keep(c);
    d.out.execute = prefetch;
    return;
  }
  c.rank = take_rank(d);
  c.store = reduce || d.take("bulk_group");
  if (reduce) {
    c.reduction = take_reduction(d, false);
    d.take("bulk_group");
  }
  d.need({"global"});
  if (c.store) {
    d.need({"shared::cta"});
  } else {
    c.own_cta_only = d.take("shared::cta");
    if (!c.own_cta_only) d.need_one_of({"shared::cluster", "shared::cta"});
    d.need({"mbarrier::complete_tx::bytes"});
    c.multicast = d.take("multicast::cluster");
  }
  d.take("tile");
  d.take_cache_hints();
  const std::size_t extra = (c.multicast ? 1u : 0u) + (d.has_cache_policy ? 1u : 0u);
  Space space = Space::shared;
  if (c.store) {
    d.finish(2 + extra);
    take_map(d, c, d.arg(0));
    c.shared = d.address(d.arg(1), &c.shared_offset, &space);
  } else {
    d.finish(3 + extra);
    c.shared = d.address(d.arg(0), &c.shared_offset, &space);
    take_map(d, c, d.arg(1));
    c.barrier = d.address(d.arg(2), &c.barrier_offset, &space);
    if (c.multicast) c.mask = d.source(3, Type::u16);
  }
  d.reads(c.store ? Space::shared : Space::global, 0, Proxy::async);
  d.writes(c.store          ? Space::global
           : c.own_cta_only ? Space::shared
                            : Space::shared_cluster,
           0, Proxy::async);
  d.out.traits.completion = c.store ? Completion::bulk_group : Completion::mbarrier;
  d.keep(c);
  d.out.execute = copy;
}

}  // namespace torchext::sim
