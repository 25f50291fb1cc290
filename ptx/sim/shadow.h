// Shadow memory: for every four bytes, who wrote them last and who has read them since, and which
// bytes have been written at all. A granule that is accessed in part is split into single bytes.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

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
  const VectorClock* proxied = nullptr;
  std::uint32_t pc = 0;
  bool async = false;   // async proxy
  bool strong = false;  // relaxed, acquire, release, volatile or atomic
};

struct Conflict {
  enum Kind : std::uint8_t { none, race, proxy, uninitialized };
  Kind kind = none;
  std::uint64_t offset = 0;  // of the byte or granule
  bool other_is_write = false;
  bool other_is_async = false;
  std::uint32_t other_cluster = 0, other_agent = 0, other_pc = 0;
};

class Shadow {
 public:
  // `valid`: the memory's content counts as written.
  Shadow(std::uint64_t bytes, bool valid);

  // Checks and records an access to [offset, offset + bytes). The first conflict is returned.
  Conflict read(const Actor& actor, std::uint64_t offset, std::uint64_t bytes);
  Conflict write(const Actor& actor, std::uint64_t offset, std::uint64_t bytes);
  void set_valid(std::uint64_t offset, std::uint64_t bytes);
  bool is_valid(std::uint64_t offset, std::uint64_t bytes) const;
  // Whether the last write to the granule at `offset` is this one.
  bool last_write_is(std::uint64_t offset, std::uint32_t agent, std::uint32_t clock,
                     std::uint32_t pc) const;
  // Bytes that nobody has written; the first one's offset in *first.
  std::uint64_t count_invalid(std::uint64_t* first) const;

 private:
  struct Reader {
    std::uint32_t cluster, warp_agent, clock, mask, pc;
    bool strong, async;
  };
  struct Cell {
    std::uint32_t w_cluster, w_agent, w_clock, w_pc;          // w_clock 0: no write
    std::uint32_t r_cluster, r_agent, r_clock, r_mask, r_pc;  // r_mask 0: no read
    std::uint8_t flags;
    std::uint8_t valid;  // a bit per byte
    std::uint16_t unused;
  };
  static constexpr std::uint64_t kPageBytes = 4096;
  using Page = std::array<Cell, kPageBytes / 4>;

  Cell& cell(std::uint64_t granule);
  Page& page(std::uint64_t index);
  static bool ordered(const Actor& a, std::uint32_t cluster, std::uint32_t agent,
                      std::uint32_t clock);
  static bool ordered_readers(const Actor& a, const Reader& r);
  void read_cell(Cell& c, const Actor& actor, std::uint64_t offset, std::uint8_t bytes,
                 Conflict& conflict);
  void write_cell(Cell& c, const Actor& actor, std::uint64_t offset, std::uint8_t bytes,
                  Conflict& conflict);
  void record_reader(Cell& c, const Actor& actor);
  std::uint32_t split(Cell& c);
  template <class Visit>
  void for_each_cell(std::uint64_t offset, std::uint64_t bytes, bool merge, Visit&& visit);

  std::uint64_t bytes_;
  bool valid_;
  std::vector<std::unique_ptr<Page>> pages_;
  std::vector<std::vector<Reader>> reader_sets_;
  std::vector<std::uint32_t> free_sets_;
  std::vector<std::array<Cell, 4>> splits_;
  std::vector<std::uint32_t> free_splits_;
};

}  // namespace torchext::sim
