// Shadow memory: for every four bytes, who wrote them last and who has read them since, and which
// bytes have been written at all. A granule that is accessed in part is split into single bytes.
#pragma once

#include <array>
#include <cstdint>
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
  std::uint32_t issuer = 0;  // the thread whose earlier accesses are ordered before this one
  std::uint32_t issuer_clock = 0;
  const VectorClock* known = nullptr;
  const Views* views = nullptr;
  std::uint32_t pc = 0;
  std::uint32_t cta_threads = 1;  // agents of one CTA
  Proxy proxy = Proxy::generic;
  Scope scope = Scope::none;  // of a strong access: relaxed, acquire, release, volatile or atomic
};

struct Conflict {
  // Those up to `overwritten` are notes.
  enum Kind : std::uint8_t {
    none,
    same_value,   // writes that nothing orders, and that store the same bytes
    overwritten,  // a write after a non-coherent load that is known to be done
    race,
    proxy,        // a generic write that no fence has made visible to the async proxy
    noncoherent,  // a non-coherent load of bytes that the launch has written, or writes unordered
    uninitialized,
  };
  Kind kind = none;
  std::uint64_t offset = 0;  // of the byte or granule
  bool other_is_write = false;
  Proxy other_proxy = Proxy::generic;
  Scope other_scope = Scope::none;
  std::uint32_t other_cluster = 0, other_agent = 0, other_clock = 0, other_pc = 0;
};

// The CTA whose shared memory it is. Its threads' generic writes need
// fence.proxy.async.shared::cta, other CTAs' need fence.proxy.async.shared::cluster, before the
// async proxy may read them.
struct SharedOwner {
  std::uint32_t first_thread = 0, threads = 0;  // agents of its CTA; none: global memory
  std::uint32_t cluster_threads = 0;
};

// A write that some bytes hold.
struct LastWrite {
  std::uint32_t cluster, agent, clock, pc;
};

// What a store that takes effect at once replaces, and by what.
struct Stored {
  const std::uint8_t* before;
  const std::uint8_t* after;
};

class Shadow {
 public:
  // `valid`: the memory's content counts as written.
  Shadow(std::uint64_t bytes, bool valid, SharedOwner owner = {});

  // Checks and records an access to [offset, offset + bytes). The first conflict is returned.
  Conflict read(const Actor& actor, std::uint64_t offset, std::uint64_t bytes);
  // `stored`: for a write whose bytes are known, and in place before the next access is checked.
  Conflict write(const Actor& actor, std::uint64_t offset, std::uint64_t bytes,
                 const Stored* stored = nullptr);
  void set_valid(std::uint64_t offset, std::uint64_t bytes);
  // Forgets all accesses: the memory is another object's from now on, and not yet written.
  void restart(std::uint64_t offset, std::uint64_t bytes);
  bool is_valid(std::uint64_t offset, std::uint64_t bytes) const;
  // Whether the last write to the granule at `offset` is this one.
  bool last_write_is(std::uint64_t offset, std::uint32_t agent, std::uint32_t clock,
                     std::uint32_t pc) const;
  // Which fence.proxy.async a generic write by this agent needs, before the async proxy reads it.
  AsyncSpace async_space(std::uint32_t writer) const;
  // The distinct writes of this launch that the bytes hold.
  std::vector<LastWrite> last_writes(std::uint64_t offset, std::uint64_t bytes) const;
  // Bytes that nobody has written; the first one's offset in *first.
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
  // By offset, of cells with the flag kAgreeing: who else stored the value that is there, without
  // an order. The cell keeps the first.
  std::unordered_map<std::uint64_t, std::vector<Writers>> agreeing_;
};

}  // namespace torchext::sim
