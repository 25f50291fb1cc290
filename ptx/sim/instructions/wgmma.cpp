// wgmma: fence, mma_async, commit_group, wait_group. Each warp computes its own 16 rows after all
// four warps have issued the wgmma, and reads what any of them had written by then. A group is
// complete when the rows of all four are, so a warp that has waited may release the operands.
#include <algorithm>
#include <cstring>

#include "../frontend/decode.h"
#include "../numerics/number_formats.h"
#include "../numerics/tensor_core.h"
#include "../timing/trace.h"
#include "lanes.h"
#include "wgmma_stream.h"

namespace torchext::sim {

// The operands of a wgmma.mma_async.
struct WgmmaShape {
  int n = 0, k = 0;
  NumberFormat a_format = NumberFormat::e4m3, b_format = NumberFormat::e4m3;
  bool f16_accumulator = false;
  bool a_in_registers = false;
  bool negate_a = false, negate_b = false, transpose_a = false, transpose_b = false;
  std::size_t accumulators = 0;  // registers in list, before A's
  Slot a_descriptor, b_descriptor, scale_d;
  MmaModel model{};
  int k_bytes() const { return k * size_in_bytes(a_format); }
};

namespace {

// See PTX ISA, "Matrix Descriptor Format" and "Strides". Offsets are in bytes. The canonical
// layouts are those that CUTLASS describes, in 16-byte units.
struct Descriptor {
  U32 start, leading, stride, base_offset, span;  // span: bytes of a swizzled row, 0 for none
  explicit Descriptor(U64 bits)
      : start(static_cast<U32>(bits & 0x3fff) << 4),
        leading(static_cast<U32>((bits >> 16) & 0x3fff) << 4),
        stride(static_cast<U32>((bits >> 32) & 0x3fff) << 4),
        base_offset(static_cast<U32>((bits >> 49) & 7)) {
    const U32 mode = static_cast<U32>(bits >> 62);
    span = mode == 0 ? 0 : 256u >> mode;  // 1: 128 bytes, 2: 64, 3: 32
  }
  U32 swizzle(U32 linear) const {
    const U32 mask = span / 16 - 1;
    return linear ^ ((((linear >> 7) - base_offset) & mask) << 4);
  }
  // 16 bytes at row `mn`, k-chunk `chunk` of a K-major operand.
  U32 k_major(U32 mn, U32 chunk) const {
    if (span == 0) return start + mn / 8 * stride + chunk * leading + mn % 8 * 16;
    return swizzle(start + mn / 8 * stride + mn % 8 * span + chunk * 16);
  }
  // 16 bytes (8 elements along M or N) at k-row `k` of an MN-major operand of 16-bit elements.
  U32 mn_major(U32 chunk, U32 k) const {
    if (span == 0) return start + chunk * stride + k / 8 * leading + k % 8 * 16;
    const U32 per_atom = span / 16;
    return swizzle(start + chunk / per_atom * leading + k / 8 * stride + k % 8 * span +
                   chunk % per_atom * 16);
  }
};

// Calls visit(chunk's address, its index in a dense image of `rows` rows).
template <class Visit>
void for_each_chunk(U64 bits, bool transposed, U32 first_row, U32 rows, const WgmmaShape& shape,
                    Visit&& visit) {
  const Descriptor d(bits);
  if (!transposed) {
    const auto chunks = static_cast<U32>(shape.k_bytes() / 16);
    for (U32 r = 0; r < rows; ++r) {
      for (U32 c = 0; c < chunks; ++c) visit(d.k_major(first_row + r, c), r * chunks + c);
    }
  } else {
    const U32 chunks = rows / 8;
    for (U32 k = 0; k < static_cast<U32>(shape.k); ++k) {
      for (U32 c = 0; c < chunks; ++c) visit(d.mn_major(first_row / 8 + c, k), k * chunks + c);
    }
  }
}

bool in_shared(const Cta& cta, U32 address) {
  return address >= kSharedBase && address + 16 <= cta.shared.size();
}

void decode_shared(Warp& w, MmaOperand& out, U64 descriptor, bool transposed, U32 first_row,
                   U32 rows, const WgmmaShape& shape, NumberFormat format, bool negate) {
  thread_local std::vector<std::uint8_t> image;
  image.resize(static_cast<std::size_t>(rows) * static_cast<std::size_t>(shape.k_bytes()));
  const std::uint8_t* shared = w.cta().shared.data();
  for_each_chunk(descriptor, transposed, first_row, rows, shape, [&](U32 address, U32 index) {
    if (in_shared(w.cta(), address))
      std::memcpy(image.data() + std::size_t{index} * 16, shared + address, 16);
    else
      std::memset(image.data() + std::size_t{index} * 16, 0, 16);
  });
  const int element = size_in_bytes(format);
  if (!transposed) {
    decode_operand(out, format, image.data(), static_cast<int>(rows), shape.k, shape.k_bytes(),
                   element, negate);
  } else {
    decode_operand(out, format, image.data(), static_cast<int>(rows), shape.k, element,
                   static_cast<std::ptrdiff_t>(rows) * element, negate);
  }
}

void decode_fragments(Warp& w, MmaOperand& out, const Instruction& i, const WgmmaShape& shape) {
  std::uint8_t image[16 * 32];
  const int element = size_in_bytes(shape.a_format), per_register = 4 / element;
  for (int lane = 0; lane < 32; ++lane) {
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + (r & 1) * 8,
                k = (lane % 4) * per_register + (r >> 1) * 4 * per_register;
      const auto value = static_cast<U32>(
          w.integer(i.list[shape.accumulators + static_cast<std::size_t>(r)], lane));
      std::memcpy(image + row * 32 + k * element, &value, 4);
    }
  }
  decode_operand(out, shape.a_format, image, 16, shape.k, 32, element, shape.negate_a);
}

// ---- fence, commit, wait ------------------------------------------------------------------------

Step fence(Warp& w, const Instruction&, U32 mask) {
  ++w.fence_count;
  w.order_if_converged(mask);
  return Step::next;
}

Step commit(Warp& w, const Instruction&, U32 mask) {
  ++w.wgmma_group;
  if (auto* const recorder = timing::recorder()) recorder->note_group(timing::Action::wgmma_commit);
  ++w.cluster().progress;  // another warp of the warpgroup may wait for this warp
  w.order_if_converged(mask);
  return Step::next;
}

struct GroupWait {
  U32 allowed;  // groups that may go on
};

Step wait(Warp& w, const Instruction& i, U32 mask) {
  const U32 allowed = i.as<GroupWait>().allowed;
  const U32 committed = w.wgmma_group - 1, upto = committed > allowed ? committed - allowed : 0;
  const std::size_t first = w.index() / 4 * 4;
  const auto& warps = w.cta().warps;
  const std::size_t last = std::min(first + 4, warps.size());
  for (std::size_t k = first; k < last; ++k) {
    if (warps[k]->wgmma_group <= upto) return Step::block;  // this warp has not issued its part yet
  }
  if (auto* const recorder = timing::recorder())
    recorder->note_group(timing::Action::wgmma_wait, allowed);
  for (std::size_t k = first; k < last; ++k) {
    for (auto& p : warps[k]->wgmma_pending) {
      if (p->group <= upto && !p->done) compute(*warps[k], *p);
    }
    if (upto != 0 && warps[k]->wgmma_agent != 0) w.learn(mask, warps[k]->wgmma_agent, upto);
  }
  if (upto != 0) w.acquire(mask, w.cta().warpgroups[w.index() / 4].waited(w.index() % 4, upto));
  auto& pending = w.wgmma_pending;
  std::size_t done = 0;
  for (; done < pending.size() && pending[done]->group <= upto; ++done) {
    for (const Slot& s : pending[done]->instruction->list) {
      if (w.in_flight[s.reg] > 0) --w.in_flight[s.reg];
    }
  }
  pending.erase(pending.begin(), pending.begin() + static_cast<std::ptrdiff_t>(done));
  w.order_if_converged(mask);
  return Step::next;
}

// ---- mma_async ----------------------------------------------------------------------------------

// Checks the bytes that a wgmma reads, with the knowledge of `reader`.
void check_operands(Warp& w, const PendingWgmma& p, const Actor& reader) {
  const auto& shape = p.instruction->as<WgmmaShape>();
  Place place;
  place.cta = &w.cta();
  place.shadow = w.grid().checks ? &w.cta().shadow : nullptr;
  bool outside = false;
  const auto check = [&](U32 address, U32) {
    if (!in_shared(w.cta(), address)) {
      if (!outside)
        w.finding_at(p.pc, FindingKind::out_of_bounds,
                     "a wgmma descriptor reaches outside shared memory", p.lanes, address);
      outside = true;
      return;
    }
    if (place.shadow == nullptr) return;
    place.offset = address;
    w.check_read(place, reader, 16, p.lanes, address);
  };
  if (!shape.a_in_registers)
    for_each_chunk(p.a_descriptor, shape.transpose_a, w.index() % 4 * 16, 16, shape, check);
  for_each_chunk(p.b_descriptor, shape.transpose_b, 0, static_cast<U32>(shape.n), shape, check);
}

// Called when all four warps have issued the wgmma, which may read its operands from now on.
void start(Warp& last, const WgmmaRecord& record) {
  const LaunchOptions& options = last.grid().options;
  Knowledge met;
  for (const auto& [w, p] : record.parts) met.join(p->knowledge);
  for (const auto& [w, p] : record.parts) {
    // PTX does not promise that the warps wait for each other.
    const Knowledge& known = options.lane_order == LaunchOptions::strict ? p->knowledge : met;
    Actor reader = w->actor(static_cast<int>(lane_of(p->lanes)));
    reader.agent = w->wgmma_agent;
    reader.clock = p->group;
    reader.issuer_clock = p->clock;
    reader.known = &*known.known;
    reader.views = &*known.views;
    reader.pc = p->pc;
    reader.proxy = Proxy::async;
    check_operands(*w, *p, reader);
    const bool now =
        options.completion == LaunchOptions::Eager ||
        (options.completion == LaunchOptions::Random && w->cluster().random.below(4) == 0);
    if (!now) continue;
    for (auto& earlier : w->wgmma_pending) {  // in order, because accumulators chain
      if (!earlier->done) compute(*w, *earlier);
      if (earlier == p) break;
    }
  }
  if (options.lane_order == LaunchOptions::converged)
    last.cta().warpgroups[last.index() / 4].knowledge[record.parts.front().second->group] = met;
}

// The four warps of a warpgroup must issue the same sequence.
void meet(Warp& w, std::shared_ptr<PendingWgmma> issued, bool a_in_registers) {
  const PendingWgmma& p = *issued;
  auto& open = w.cta().warpgroups[w.index() / 4].open;
  const auto it = open.try_emplace(w.wgmma_issued++).first;
  WgmmaRecord& r = it->second;
  if (r.parts.empty()) {
    r.pc = p.pc;
    r.a = p.a_descriptor;
    r.b = p.b_descriptor;
    r.accumulate = p.accumulate;
  } else if (w.grid().checks &&
             (r.pc != p.pc || r.b != p.b_descriptor || r.accumulate != p.accumulate ||
              (!a_in_registers && r.a != p.a_descriptor))) {
    const U32 line = w.program().code[r.pc].line;
    w.finding(FindingKind::wgmma_disagreement,
              r.pc != p.pc ? "the warps of the warpgroup execute different wgmmas"
                           : "the warps of the warpgroup pass different descriptors or scale-d",
              p.lanes, 0, "wgmma, line " + std::to_string(line), line);
  }
  r.parts.emplace_back(&w, std::move(issued));
  if (r.parts.size() < 4) return;
  start(w, r);
  open.erase(it);
}

Step issue(Warp& w, const Instruction& i, U32 mask) {
  const auto& shape = i.as<WgmmaShape>();
  const bool checks = w.grid().checks;
  const auto first = static_cast<int>(lane_of(mask));
  w.need(shape.b_descriptor, mask, "as a descriptor");
  if (!shape.a_in_registers) w.need(shape.a_descriptor, mask, "as a descriptor");
  w.need(shape.scale_d, mask, "as scale-d");
  const U64 a = shape.a_in_registers ? 0 : w.integer(shape.a_descriptor, first);
  const U64 b = w.integer(shape.b_descriptor, first);
  const U32 scale = w.predicate(shape.scale_d) & mask;
  const bool accumulate = scale != 0;
  bool uniform = scale == 0 || scale == mask;
  for_lanes(mask, [&](int l) {
    uniform &= w.integer(shape.b_descriptor, l) == b &&
               (shape.a_in_registers || w.integer(shape.a_descriptor, l) == a);
  });
  if (!uniform)
    w.finding(FindingKind::wgmma_disagreement, "the lanes pass different descriptors or scale-d",
              mask);
  w.order_if_converged(mask);
  if (w.wgmma_agent == 0) {
    w.wgmma_agent = w.cluster().new_agent();
    w.cluster().agent_names[w.wgmma_agent] =
        "a wgmma of warp " + std::to_string(w.index()) +
        (w.grid().cluster_size > 1 ? " of CTA rank " + std::to_string(w.cta().rank) : "");
  }
  if (checks) {
    bool unfenced = w.fence_count == 1;
    for (std::size_t r = 0; r < i.list.size(); ++r) {
      const Slot& s = i.list[r];
      if (r >= shape.accumulators || accumulate) w.need(s, mask, "by wgmma");
      unfenced |= w.register_fence[s.reg] == w.fence_count;
      if (r >= shape.accumulators && s.bank == 1)
        w.finding(FindingKind::invalid_operand, "a constant as fragment", mask);
    }
    if (unfenced) {
      w.finding(FindingKind::missing_wgmma_fence,
                w.fence_count == 1
                    ? "the warp issues its first wgmma without a wgmma.fence"
                    : "registers of this wgmma were touched after the last wgmma.fence",
                mask);
    }
  }
  for (const Slot& s : i.list) ++w.in_flight[s.reg];

  auto pending = std::make_shared<PendingWgmma>();
  pending->instruction = &i;
  pending->pc = w.pc();
  pending->group = w.wgmma_group;
  pending->a_descriptor = a;
  pending->b_descriptor = b;
  pending->accumulate = accumulate;
  pending->lanes = mask;
  pending->clock = w.clock(first);
  pending->knowledge = w.grid().options.lane_order == LaunchOptions::strict
                           ? Knowledge{w.known(first), w.views(first)}
                           : w.release(mask);
  if (auto* const recorder = timing::recorder()) {
    timing::Action action;
    action.kind = timing::Action::wgmma;
    action.count = static_cast<U32>(shape.n);
    action.flag = shape.a_in_registers;
    recorder->note(action);
  }
  w.wgmma_pending.push_back(pending);
  meet(w, std::move(pending), shape.a_in_registers);
  for (std::size_t r = 0; r < shape.accumulators; ++r) w.set_valid(i.list[r], mask, mask);
  return Step::next;
}

NumberFormat format_named(Decoder& d, Type t) {
  switch (t) {
    case Type::e4m3:
      return NumberFormat::e4m3;
    case Type::e5m2:
      return NumberFormat::e5m2;
    case Type::f16:
      return NumberFormat::f16;
    case Type::bf16:
      return NumberFormat::bf16;
    case Type::tf32:
      return NumberFormat::tf32;
    default:
      d.fail_type(t);
  }
}

bool sign(Decoder& d, std::size_t n) {
  const U64 v = d.immediate(n);
  if (v != 1 && v != ~U64{0}) {
    d.fail("operand " + std::to_string(n + 1) + " must be 1 or -1 (got " +
           std::to_string(static_cast<std::int64_t>(v)) + ")");
  }
  return v != 1;
}

void decode_mma_async(Decoder& d) {
  if (d.take("sp")) d.fail("sparse wgmma is not supported");
  WgmmaShape s;
  std::string text;
  const auto fail_shape = [&] {
    d.fail("the shape must be .m64nNkK, N a multiple of 8 to 256, K elements of 32 bytes");
  };
  if (!d.take_prefix("m64n", &text)) fail_shape();
  if (std::sscanf(text.c_str(), "m64n%dk%d", &s.n, &s.k) != 2 || s.n < 8 || s.n > 256 ||
      s.n % 8 != 0)
    fail_shape();
  const Type accumulator = d.take_type();
  s.a_format = format_named(d, d.take_type());
  s.b_format = format_named(d, d.take_type());
  if (s.k_bytes() != 32 || size_in_bytes(s.a_format) != size_in_bytes(s.b_format)) fail_shape();
  s.f16_accumulator = accumulator == Type::f16;
  if (!s.f16_accumulator && accumulator != Type::f32) d.fail_type(accumulator);
  try {
    s.model = wgmma_model(s.a_format, s.f16_accumulator ? NumberFormat::f16 : NumberFormat::f32);
  } catch (const std::invalid_argument& e) {
    d.fail(e.what());
  }
  const bool may_transpose = size_in_bytes(s.a_format) == 2 && s.a_format != NumberFormat::tf32;
  s.a_in_registers = d.arg(1).kind == Arg::vector;
  d.finish(6 + (may_transpose ? (s.a_in_registers ? 1 : 2) : 0));
  s.accumulators = static_cast<std::size_t>(s.f16_accumulator ? s.n / 4 : s.n / 2);
  for (const Arg& a : d.vector(d.arg(0), s.accumulators)) d.out.list.push_back(d.destination(a, 4));
  if (s.a_in_registers) {
    for (const Arg& a : d.vector(d.arg(1), 4)) d.out.list.push_back(d.source(a, Type::b32));
  } else {
    s.a_descriptor = d.source(1, Type::b64);
  }
  s.b_descriptor = d.source(2, Type::b64);
  s.scale_d = d.predicate(3);
  s.negate_a = sign(d, 4);
  s.negate_b = sign(d, 5);
  if (may_transpose) {
    std::size_t at = 6;
    if (!s.a_in_registers) s.transpose_a = d.immediate(at++) != 0;
    s.transpose_b = d.immediate(at) != 0;
  }
  d.reads(Space::shared, 0, Proxy::async);
  d.out.traits.completion = Completion::wgmma_group;
  d.keep(s);
  d.out.execute = issue;
}

void decode_wgmma(Decoder& d) {
  const bool is_fence = d.take("fence"), is_commit = d.take("commit_group"),
             is_wait = d.take("wait_group");
  const bool is_mma = d.take("mma_async");
  d.need({"sync", "aligned"});
  d.out.aligned = true;
  if (is_mma) return decode_mma_async(d);
  if (is_wait) {
    d.finish(1);
    d.keep(GroupWait{static_cast<U32>(d.immediate(0))});
    d.is(OpClass::async_group);
    d.out.traits.wait = Wait::wgmma_group;
    d.out.execute = wait;
    return;
  }
  if (!is_fence && !is_commit) d.need_one_of({"fence", "mma_async", "commit_group", "wait_group"});
  d.finish(0);
  d.is(is_fence ? OpClass::fence : OpClass::async_group);
  d.out.execute = is_fence ? fence : commit;
}

}  // namespace

void compute(Warp& w, PendingWgmma& p) {
  if (timing::without_products()) {  // the clock needs no products
    p.done = true;
    return;
  }
  const Instruction& i = *p.instruction;
  const auto& s = i.as<WgmmaShape>();
  thread_local MmaOperand a, b;
  thread_local std::vector<float> product;
  if (s.a_in_registers)
    decode_fragments(w, a, i, s);
  else
    decode_shared(w, a, p.a_descriptor, s.transpose_a, w.index() % 4 * 16, 16, s, s.a_format,
                  s.negate_a);
  decode_shared(w, b, p.b_descriptor, s.transpose_b, 0, static_cast<U32>(s.n), s, s.b_format,
                s.negate_b);
  const auto n = static_cast<std::size_t>(s.n);
  product.assign(16 * n, 0.0f);
  const auto place = [&](int lane, std::size_t j, std::size_t h) {
    return (static_cast<std::size_t>(lane) / 4 + 8 * h) * n + 8 * j +
           2 * (static_cast<std::size_t>(lane) % 4);
  };
  if (p.accumulate) {
    for (std::size_t j = 0; j < n / 8; ++j) {
      for (std::size_t h = 0; h < 2; ++h) {
        for (int lane = 0; lane < 32; ++lane) {
          float* c = product.data() + place(lane, j, h);
          if (s.f16_accumulator) {
            const auto bits = w.at<U32>(i.list[2 * j + h])[lane];
            c[0] = f16_to_float(static_cast<U16>(bits));
            c[1] = f16_to_float(static_cast<U16>(bits >> 16));
          } else {
            c[0] = w.at<float>(i.list[4 * j + 2 * h])[lane];
            c[1] = w.at<float>(i.list[4 * j + 2 * h + 1])[lane];
          }
        }
      }
    }
  }
  multiply_accumulate(s.model, a, b, product.data(), s.n);
  for (std::size_t j = 0; j < n / 8; ++j) {
    for (std::size_t h = 0; h < 2; ++h) {
      for (int lane = 0; lane < 32; ++lane) {
        const float* c = product.data() + place(lane, j, h);
        if (s.f16_accumulator) {
          w.at<U32>(i.list[2 * j + h])[lane] =
              static_cast<U32>(encode_f16(c[1])) << 16 | encode_f16(c[0]);
        } else {
          w.at<float>(i.list[4 * j + 2 * h])[lane] = c[0];
          w.at<float>(i.list[4 * j + 2 * h + 1])[lane] = c[1];
        }
      }
    }
  }
  p.done = true;
}

void add_wgmma(OpcodeTable& t) {
  t["wgmma"] = {decode_wgmma, {OpClass::wgmma, OpClass::async_group, OpClass::fence}};
}

}  // namespace torchext::sim
