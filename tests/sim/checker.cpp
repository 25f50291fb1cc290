// Unit tests of the checker's core, without the simulated machine: vector clocks, scopes, shadow
// memory, the spread of invalid bits. Prints every expectation that fails and returns their number.
#include <cstdio>

#include "../../ptx/sim/check/scopes.h"
#include "../../ptx/sim/check/shadow.h"
#include "../../ptx/sim/check/validity.h"

using namespace torchext::sim;

namespace {

int failures = 0;

#define EXPECT(condition)                                               \
  do {                                                                  \
    if (!(condition)) {                                                 \
      ++failures;                                                       \
      std::printf("line %d: %s does not hold\n", __LINE__, #condition); \
    }                                                                   \
  } while (false)

VectorClock clock_of(std::initializer_list<std::uint32_t> agents) {
  VectorClock clock;
  clock.agents = agents;
  return clock;
}

// ---- Vector clocks ----

void test_clocks_join() {
  VectorClock a = clock_of({3, 1}), b = clock_of({2, 5, 7});
  EXPECT(!a.includes(b) && !b.includes(a));
  a.join(b);
  EXPECT((a.agents == AgentClocks{3, 5, 7}));
  EXPECT(a.includes(b) && !b.includes(a));
  EXPECT(a.get(99) == 0);
  a.raise(4, 2);
  a.raise(4, 1);  // a lower value changes nothing
  EXPECT((a.agents == AgentClocks{3, 5, 7, 0, 2}));
}

void test_clocks_of_other_clusters() {
  constexpr std::uint32_t own = 0, other = 1, third = 2;
  VectorClock a = clock_of({1});
  ForeignClocks of_other{{other, std::make_shared<AgentClocks>(AgentClocks{4, 0, 9})}};
  a.join_foreign(of_other);
  EXPECT(a.knows(own, own, 0, 1) && !a.knows(own, own, 0, 2));
  EXPECT(a.knows(own, other, 2, 9) && !a.knows(own, other, 2, 10));
  EXPECT(!a.knows(own, other, 3, 1));  // an agent that the clock does not know
  EXPECT(!a.knows(own, third, 0, 1));  // a cluster that it does not know
  ForeignClocks more{{other, std::make_shared<AgentClocks>(AgentClocks{2, 6})},
                     {third, std::make_shared<AgentClocks>(AgentClocks{1})}};
  VectorClock before = a;
  a.join_foreign(more);
  EXPECT(a.knows(own, other, 0, 4) && a.knows(own, other, 1, 6) && a.knows(own, other, 2, 9));
  EXPECT(a.knows(own, third, 0, 1));
  EXPECT(!before.knows(own, other, 1, 6));  // the copy made before the join has not changed
}

void test_refs_share() {
  const ClockRef small = ClockRef::make(clock_of({1})), large = ClockRef::make(clock_of({2, 1}));
  EXPECT(large.covers(small) && !small.covers(large) && small.covers(ClockRef()));
  EXPECT(ClockRef::join(small, large) == large && ClockRef::join(large, small) == large);
  EXPECT(ClockRef::join(ClockRef(), small) == small);
  const ClockRef apart = ClockRef::make(clock_of({0, 0, 5}));
  const ClockRef both = ClockRef::join(large, apart);
  EXPECT((both->agents == AgentClocks{2, 1, 5}));
  EXPECT((large->agents == AgentClocks{2, 1}));
}

// ---- Scopes ----

Knowledge knowledge_of(std::initializer_list<std::uint32_t> agents) {
  return {ClockRef::make(clock_of(agents)), {}};
}

void test_scopes_within_a_cluster() {
  SyncCell cell;
  const Knowledge k = knowledge_of({7});
  cell.publish(0, {k, k, k}, Scope::cta);
  EXPECT(cell.observe(0, Scope::cta).known->get(0) == 7);
  EXPECT(cell.observe(1, Scope::gpu).known->get(0) == 0);  // the release reaches CTA 0 only
  EXPECT(cell.observe(1, Scope::gpu).views->refused->get(0) == 7);
  EXPECT(cell.observe(1, Scope::gpu).views->released_at == Scope::cta);

  SyncCell wide;
  wide.publish(0, {k, k, k}, Scope::cluster);
  EXPECT(wide.observe(1, Scope::cluster).known->get(0) == 7);
  EXPECT(wide.observe(1, Scope::cta).known->get(0) == 0);  // the acquire reaches CTA 1 only
  EXPECT(wide.observe(1, Scope::cta).views->acquired_at == Scope::cta);
}

void test_scopes_between_clusters() {
  constexpr std::uint64_t address = 0x100;
  for (const Scope released : {Scope::cluster, Scope::gpu, Scope::sys}) {
    for (const Scope acquired : {Scope::cluster, Scope::gpu}) {
      GridSync sync;
      const Knowledge k = knowledge_of({7});
      sync.publish(address, 0, {k, k, k}, released);
      Knowledge seen;
      sync.observe(address, 1, acquired, &seen);
      const bool reaches = released >= Scope::gpu && acquired >= Scope::gpu;
      EXPECT(seen.known->knows(1, 0, 0, 7) == reaches);
      EXPECT(seen.views->refused->knows(1, 0, 0, 7) == !reaches);
      Knowledge elsewhere;
      sync.observe(address + 4, 1, acquired, &elsewhere);
      EXPECT(!elsewhere.known);
    }
  }
}

void test_scopes_between_gpus() {
  constexpr std::uint64_t address = 0x100;
  constexpr std::uint32_t other = 1u << kGpuShift;  // cluster 0 of the second GPU
  for (const Scope released : {Scope::cluster, Scope::gpu, Scope::sys}) {
    for (const Scope acquired : {Scope::cluster, Scope::gpu, Scope::sys}) {
      GridSync sync(2);
      const Knowledge k = knowledge_of({7});
      sync.publish(address, 0, {k, k, k, k}, released);
      Knowledge seen;
      sync.observe(address, other, acquired, &seen);
      const bool reaches = released == Scope::sys && acquired == Scope::sys;
      EXPECT(seen.known->knows(other, 0, 0, 7) == reaches);
      EXPECT(seen.views->refused->knows(other, 0, 0, 7) == !reaches);
      EXPECT(sync.released_to_all().size() == (released == Scope::sys));
    }
  }
  GridSync sync(2);  // a fence at .gpu, then a flag at .sys
  const Knowledge k = knowledge_of({7});
  sync.publish(address, other, {k, k, k, {}}, Scope::sys);
  Knowledge here, there;
  sync.observe(address, other + 1, Scope::sys, &there);
  EXPECT(there.known->knows(other + 1, other, 0, 7));
  sync.observe(address, 0, Scope::sys, &here);
  EXPECT(!here.known->knows(0, other, 0, 7) && here.views->released_at == Scope::gpu);
}

// ---- Shadow memory ----

// A thread; CTAs have 64 threads, and there is one cluster.
struct Thread {
  explicit Thread(std::uint32_t number) : agent(number) {}
  std::uint32_t agent, clock = 1;
  VectorClock known;
  Views views;
  Actor actor(Scope scope = Scope::none, Proxy proxy = Proxy::generic) {
    Actor a;
    a.agent = a.issuer = agent;
    a.clock = a.issuer_clock = clock;
    a.known = &known;
    a.views = &views;
    a.pc = 100 + agent;
    a.cta_threads = 64;
    a.scope = scope;
    a.proxy = proxy;
    return a;
  }
  void learn(const Thread& other) {
    known.join(other.known);
    known.raise(other.agent, other.clock);
    ++clock;
  }
};

void test_epochs() {
  Shadow shadow(64, false);
  Thread writer{0}, reader{40};
  EXPECT(shadow.read(reader.actor(), 0, 4).kind == Conflict::uninitialized);
  EXPECT(shadow.write(writer.actor(), 16, 4).kind == Conflict::none);
  EXPECT(shadow.read(writer.actor(), 16, 4).kind == Conflict::none);  // its own write
  const Conflict race = shadow.read(reader.actor(), 16, 4);
  EXPECT(race.kind == Conflict::race && race.other_is_write && race.offset == 16);
  EXPECT(race.other_agent == 0 && race.other_pc == 100);
  reader.learn(writer);
  EXPECT(shadow.read(reader.actor(), 16, 4).kind == Conflict::none);
  ++writer.clock;  // the reader does not know a later write by the same thread
  shadow.write(writer.actor(), 16, 4);
  EXPECT(shadow.read(reader.actor(), 16, 4).kind == Conflict::race);
}

void test_a_write_after_reads_by_several_warps() {
  Shadow shadow(64, true);
  Thread writer{0}, first{32}, second{65};
  EXPECT(shadow.read(first.actor(), 0, 4).kind == Conflict::none);
  EXPECT(shadow.read(second.actor(), 0, 4).kind == Conflict::none);
  writer.learn(first);  // but not from the second
  const Conflict race = shadow.write(writer.actor(), 0, 4);
  EXPECT(race.kind == Conflict::race && !race.other_is_write && race.other_agent == 65);
  Shadow again(64, true);
  again.read(first.actor(), 0, 4);
  again.read(second.actor(), 0, 4);
  writer.learn(second);
  EXPECT(again.write(writer.actor(), 0, 4).kind == Conflict::none);
}

void test_words_split_to_bytes() {
  Shadow shadow(8, false);
  Thread a{0}, b{40};
  EXPECT(shadow.write(a.actor(), 0, 1).kind == Conflict::none);
  EXPECT(shadow.write(b.actor(), 1, 1).kind == Conflict::none);  // another byte of the word
  EXPECT(shadow.is_valid(0, 2) && !shadow.is_valid(0, 3));
  EXPECT(shadow.last_writes(0, 4).size() == 2);
  std::uint64_t first = 0;
  EXPECT(shadow.count_invalid(&first) == 6 && first == 2);
  EXPECT(shadow.read(a.actor(), 0, 1).kind == Conflict::none);
  const Conflict race = shadow.read(a.actor(), 0, 2);
  EXPECT(race.kind == Conflict::race && race.offset == 1 && race.other_agent == 40);
  a.learn(b);
  EXPECT(shadow.write(a.actor(), 0, 4).kind == Conflict::none);  // a whole word again
  EXPECT(shadow.is_valid(0, 4) && shadow.last_writes(0, 4).size() == 1);
  EXPECT(shadow.last_write_is(0, 0, a.clock, 100));
}

void test_strong_accesses_do_not_race_within_both_scopes() {
  const auto second = [](Scope first, Scope then, std::uint32_t agent) {
    Shadow shadow(4, true);
    Thread a{0}, b{agent};
    shadow.write(a.actor(first), 0, 4);
    return shadow.write(b.actor(then), 0, 4).kind;
  };
  EXPECT(second(Scope::gpu, Scope::gpu, 64) == Conflict::none);
  EXPECT(second(Scope::gpu, Scope::none, 64) == Conflict::race);  // one of them is weak
  EXPECT(second(Scope::cta, Scope::cta, 63) == Conflict::none);   // the same CTA
  EXPECT(second(Scope::cta, Scope::cta, 64) == Conflict::race);   // another CTA
  EXPECT(second(Scope::cta, Scope::gpu, 64) == Conflict::race);   // one scope is too narrow
  EXPECT(second(Scope::cluster, Scope::gpu, 64) == Conflict::none);
}

void test_strong_accesses_of_two_gpus_race_below_sys() {
  for (const Scope scope : {Scope::gpu, Scope::sys}) {
    Shadow shadow(4, true);
    Thread a{0}, b{0};
    shadow.write(a.actor(scope), 0, 4);
    Actor other = b.actor(scope);
    other.cluster = 1u << kGpuShift;
    const Conflict::Kind kind = shadow.write(other, 0, 4).kind;
    EXPECT(kind == (scope == Scope::sys ? Conflict::none : Conflict::race));
    std::uint64_t visited = 0;
    shadow.for_each_last_write([&](std::uint64_t offset, const LastWrite& write) {
      ++visited;
      EXPECT(offset == 0 && write.cluster == other.cluster && write.scope == scope);
    });
    EXPECT(visited == 1);
  }
}

void test_stores_of_one_value() {
  const std::uint8_t zero[4] = {}, one[4] = {1};
  Shadow shadow(4, true);
  Thread a{0}, b{40};
  const Stored first{zero, one}, same{one, one}, other{one, zero};
  EXPECT(shadow.write(a.actor(), 0, 4, &first).kind == Conflict::none);
  EXPECT(shadow.write(b.actor(), 0, 4, &same).kind == Conflict::same_value);
  Thread reader{50};
  reader.learn(b);  // knowing one of the two equal writes is enough
  EXPECT(shadow.read(reader.actor(), 0, 4).kind == Conflict::none);
  EXPECT(shadow.write(b.actor(), 0, 4, &other).kind == Conflict::race);
}

void test_the_async_proxy_needs_a_fence() {
  Shadow shadow(16, false, SharedOwner{0, 64, 128});
  Thread writer{0}, remote{64}, reader{1};
  shadow.write(writer.actor(), 0, 4);
  shadow.write(remote.actor(), 4, 4);
  reader.learn(writer);
  reader.learn(remote);
  EXPECT(shadow.read(reader.actor(), 0, 4).kind == Conflict::none);
  EXPECT(shadow.read(reader.actor(Scope::none, Proxy::async), 0, 4).kind == Conflict::proxy);
  EXPECT(shadow.async_space(0) == kOwnShared && shadow.async_space(64) == kClusterShared);
  reader.views.async[kOwnShared] = ClockRef::make(reader.known);
  EXPECT(shadow.read(reader.actor(Scope::none, Proxy::async), 0, 4).kind == Conflict::none);
  EXPECT(shadow.read(reader.actor(Scope::none, Proxy::async), 4, 4).kind == Conflict::proxy);
}

void test_restart_forgets() {
  Shadow shadow(16, false);
  Thread a{0}, b{40};
  shadow.write(a.actor(), 0, 8);
  shadow.restart(0, 4);
  EXPECT(!shadow.is_valid(0, 4) && shadow.is_valid(4, 4));
  EXPECT(shadow.write(b.actor(), 0, 4).kind == Conflict::none);
  EXPECT(shadow.write(b.actor(), 4, 4).kind == Conflict::race);
}

// ---- Validity ----

void test_invalid_bits_spread() {
  const std::uint64_t invalid[2] = {0x100, 0};
  EXPECT(spread_invalid(Spread::all, invalid, 2) == 0);
  EXPECT(spread_invalid(Spread::carry, invalid, 2) == 0xff);
  EXPECT(spread_invalid(Spread::halves, invalid, 2) == ~std::uint64_t{0xffff});
  const std::uint64_t none[2] = {};
  for (const Spread spread : {Spread::all, Spread::carry, Spread::halves})
    EXPECT(spread_invalid(spread, none, 2) == ~std::uint64_t{0});
}

void test_settled_bits() {
  const auto both = [](const std::uint64_t* x) { return x[0] & x[1]; };
  const auto shifted = [](const std::uint64_t* x) { return x[0] << x[1]; };
  const std::uint64_t masked[2] = {0, 0x0f}, unknown[2] = {0xff, 0};
  // x & 0x0f with x unknown: bits 4 to 7 are 0 whatever x is.
  EXPECT((settled_bits(masked, unknown, 2, 2, both) & 0xff) == 0xf0);
  const std::uint64_t by_four[2] = {0, 4};
  EXPECT((settled_bits(by_four, unknown, 2, 1, shifted) & 0xfff) == 0x00f);
  const std::uint64_t unknown_count[2] = {0, 1};
  EXPECT(settled_bits(by_four, unknown_count, 2, 1, shifted) == 0);
}

}  // namespace

int main() {
  test_clocks_join();
  test_clocks_of_other_clusters();
  test_refs_share();
  test_scopes_within_a_cluster();
  test_scopes_between_clusters();
  test_scopes_between_gpus();
  test_epochs();
  test_a_write_after_reads_by_several_warps();
  test_words_split_to_bytes();
  test_strong_accesses_do_not_race_within_both_scopes();
  test_strong_accesses_of_two_gpus_race_below_sys();
  test_stores_of_one_value();
  test_the_async_proxy_needs_a_fence();
  test_restart_forgets();
  test_invalid_bits_spread();
  test_settled_bits();
  return failures;
}
