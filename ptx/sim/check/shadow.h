// Shadow memory. For every granule of four bytes it keeps the last write, the reads since then, and
// which bytes have ever been written. A granule that is accessed in part is split into bytes.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "../frontend/traits.h"
#include "clock.h"

namespace torchext::sim {

// One access, by a thread or by an async agent on a thread's behalf.
struct Actor {
  std::uint32_t cluster = 0;
  std::uint32_t agent = 0;   // recorded in the shadow
  std::uint32_t clock = 0;   // recorded in the shadow
  std::uint32_t issuer = 0;  // thread whose earlier accesses come before this one
  std::uint32_t issuer_clock = 0;
  const VectorClock* known = nullptr;
  const Views* views = nullptr;
  std::uint32_t pc = 0;
  std::uint32_t cta_threads = 1;  // number of threads of a CTA
  Proxy proxy = Proxy::generic;
  Scope scope = Scope::none;  // none: a weak access
};

struct Conflict {
  // Kinds up to and including `overwritten` are notes.
  enum Kind : std::uint8_t {
    none,
    same_value,   // unordered writes that store the same bytes
    overwritten,  // a write after a non-coherent load that is known to be done
    race,
    proxy,        // a generic write that no fence has made visible to the async proxy
    noncoherent,  // a non-coherent load of bytes that the launch writes
    uninitialized,
  };
  Kind kind = none;
  std::uint64_t offset = 0;  // of the byte or granule
  bool other_is_write = false;
  Proxy other_proxy = Proxy::generic;
  Scope other_scope = Scope::none;
  std::uint32_t other_cluster = 0, other_agent = 0, other_clock = 0, other_pc = 0;
};

// The CTA that owns a shared memory. Before the async proxy may read a generic write, a thread of
// the CTA itself must have run fence.proxy.async.shared::cta, and a thread of another CTA
// fence.proxy.async.shared::cluster.
struct SharedOwner {
  std::uint32_t first_thread = 0, threads = 0;  // of its CTA; 0 threads: global memory
  std::uint32_t cluster_threads = 0;
};

// The write that some bytes hold the value of.
struct LastWrite {
  std::uint32_t cluster, agent, clock, pc;
  Scope scope;
};

// The bytes in memory before and after a store that takes effect at once.
struct Stored {
  const std::uint8_t* before;
  const std::uint8_t* after;
};

class Shadow {
 public:
  // `valid`: the initial content counts as written.
  Shadow(std::uint64_t bytes, bool valid, SharedOwner owner = {});

  // Checks and records an access to [offset, offset + bytes). Returns the first conflict.
  Conflict read(const Actor& actor, std::uint64_t offset, std::uint64_t bytes);
  // `stored`: for a write whose bytes are in memory before the next access is checked.
  Conflict write(const Actor& actor, std::uint64_t offset, std::uint64_t bytes,
                 const Stored* stored = nullptr);
  void set_valid(std::uint64_t offset, std::uint64_t bytes);
  // Forgets all accesses, because the memory now belongs to another object. Nothing is written yet.
  void restart(std::uint64_t offset, std::uint64_t bytes);
  bool is_valid(std::uint64_t offset, std::uint64_t bytes) const;
  // True if this is the last write to the granule at `offset`.
  bool last_write_is(std::uint64_t offset, std::uint32_t agent, std::uint32_t clock,
                     std::uint32_t pc) const;
  // The space of the fence.proxy.async that a generic write by this agent needs.
  AsyncSpace async_space(std::uint32_t writer) const;
  // The distinct writes of this launch whose values the bytes hold.
  std::vector<LastWrite> last_writes(std::uint64_t offset, std::uint64_t bytes) const;
  // Calls visit(offset, write) for the last write to each granule, or byte of a split granule.
  void for_each_last_write(
      const std::function<void(std::uint64_t offset, const LastWrite& write)>& visit) const;
  // The number of bytes that nobody has written. *first becomes the offset of the first.
  std::uint64_t count_invalid(std::uint64_t* first) const;

 private:
  struct Reader {
    std::uint32_t cluster, warp_agent, clock, mask, pc;
    Scope scope;
    Proxy proxy;
  };
  struct Writers {  // lanes of a warp
    std::uint32_t cluster, warp_agent, clock, mask;
  };
  struct Cell {
    std::uint32_t w_cluster, w_agent, w_clock, w_pc;          // w_clock 0: no write
    std::uint32_t r_cluster, r_agent, r_clock, r_mask, r_pc;  // r_mask 0: no read
    std::uint16_t flags;
    std::uint8_t valid;  // a bit per byte
    std::uint8_t unused;
  };
  static constexpr std::uint64_t kPageBytes = 4096;
  using Page = std::array<Cell, kPageBytes / 4>;

  static LastWrite last_write(const Cell& c);
  Cell& cell(std::uint64_t granule);
  Page& page(std::uint64_t index);
  static bool ordered(const Actor& a, std::uint32_t cluster, std::uint32_t agent,
                      std::uint32_t clock);
  template <class Accesses>  // Reader or Writers
  static bool ordered_lanes(const Actor& a, const Accesses& r);
  void read_cell(Cell& c, const Actor& actor, std::uint64_t offset, Conflict& conflict);
  void write_cell(Cell& c, const Actor& actor, std::uint64_t offset, const Stored* stored,
                  std::size_t bytes, Conflict& conflict);
  void record_agreeing(Cell& c, const Actor& actor, std::uint64_t offset);
  bool ordered_after_any(const Actor& a, const Cell& c, std::uint64_t offset) const;
  bool ordered_after_all(const Actor& a, const Cell& c, std::uint64_t offset) const;
  static bool morally_strong(const Actor& a, std::uint32_t cluster, std::uint32_t agent,
                             Scope scope);
  static Reader reader_of(const Cell& c);
  bool visible_to_async(const Actor& a, const Cell& c) const;
  void record_reader(Cell& c, const Actor& actor);
  std::uint32_t split(Cell& c, std::uint64_t granule);
  template <class Visit>
  void for_each_cell(std::uint64_t offset, std::uint64_t bytes, bool merge, Visit&& visit);

  std::uint64_t bytes_;
  bool valid_;
  SharedOwner owner_;
  std::vector<std::unique_ptr<Page>> pages_;
  std::vector<std::vector<Reader>> reader_sets_;
  std::vector<std::uint32_t> free_sets_;
  std::vector<std::array<Cell, 4>> splits_;
  std::vector<std::uint32_t> free_splits_;
  // For cells with the flag kAgreeing, by offset: the other, unordered writes of the same value.
  // The cell itself keeps the first write.
  std::unordered_map<std::uint64_t, std::vector<Writers>> agreeing_;
};

}  // namespace torchext::sim
