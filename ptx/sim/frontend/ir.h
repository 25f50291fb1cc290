// The simulator's two forms of a PTX instruction: as parsed (names resolved to registers, operands
// as written) and as executed (register offsets, immediates in a constant bank, one function).
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "integers.h"
#include "traits.h"

namespace torchext::sim {

class PtxError : public std::runtime_error {
 public:
  PtxError(const std::string& module, std::uint32_t line, const std::string& what)
      : std::runtime_error(module + ":" + std::to_string(line) + ": " + what) {}
};

enum class Type : std::uint8_t {
  none,
  pred,
  b8,
  b16,
  b32,
  b64,
  b128,
  u8,
  u16,
  u32,
  u64,
  s8,
  s16,
  s32,
  s64,
  f16,
  f16x2,
  bf16,
  bf16x2,
  f32,
  f64,
  tf32,
  e4m3,
  e5m2,
  e4m3x2,
  e5m2x2,
  ue8m0x2,
  u16x2,
  s16x2,
};

Type type_named(const std::string& name);  // Type::none if it is not a type
const char* name_of(Type type);            // "f32"
int size_of(Type type);                    // bytes; pred: 0

inline bool is_signed(Type t) {
  return t == Type::s8 || t == Type::s16 || t == Type::s32 || t == Type::s64;
}

// ---- As parsed ----------------------------------------------------------------------------------

struct Arg {
  enum Kind : std::uint8_t { reg, integer, real, name, special, vector, memory, list, sink, pair };
  Kind kind = sink;
  bool negate = false;          // !p
  bool minus = false;           // reg: -r, for vmad
  std::uint32_t reg_index = 0;  // reg
  std::uint64_t bits = 0;       // integer; real: the bits of a double
  std::int64_t offset = 0;      // memory, name: + offset
  // name, special; the kind of number (constant_expression.cpp); reg: the part that a video
  // instruction selects.
  std::string text;
  std::vector<Arg> args;  // vector, list, pair; memory: base, then what follows commas
};

// Adds the names of variables and functions in an operand to `names`.
void collect_names(const Arg& arg, std::set<std::string>* names);

// The bits of a real literal as a value of `type`, as ptxas converts it.
std::uint64_t real_bits(const Arg& arg, Type type);

struct RawInstruction {
  std::vector<std::string> parts;  // opcode split at dots; "a::b" stays whole
  std::string opcode;              // whole, for messages and counts
  std::vector<Arg> args;
  int guard = -1;  // register index
  bool guard_negated = false;
  std::uint32_t line = 0, file = 0, source_line = 0, scope = 0;
};

struct RegisterDecl {
  std::string name;
  Type type;
};

// Which other modules may define the name, and which definition wins (linker.cpp).
enum class Linkage : std::uint8_t { internal, visible, weak, common, external };

struct Variable {  // .shared, .global, .const, .local, .param
  std::string name;
  Space space = Space::global;
  Type type = Type::none;                 // of an element
  int lanes = 1;                          // 2: .v2, 4: .v4
  std::vector<std::uint64_t> dimensions;  // of an array; the first is 0 where PTX has []
  bool pointer = false;                   // .ptr: a parameter that points to memory
  std::uint32_t align = 1;
  std::uint64_t bytes = 0;
  Linkage linkage = Linkage::internal;
  bool is_external() const { return linkage == Linkage::external; }
  std::uint32_t line = 0, source = 0;  // source: index into ParsedModule::sources
  std::int32_t reg = -1;               // .reg parameter of a function: its register
  std::vector<std::uint8_t> initial;   // may be shorter than bytes
  struct Reference {
    std::uint64_t at;
    std::string symbol;
    std::int64_t addend;
    int bytes;
    int shift;
    std::uint32_t line;
  };
  std::vector<Reference> references;  // addresses within the initializer
};

// True if two lists of parameters have the same number of members, of the same sizes.
bool same_sizes(const std::vector<Variable>& a, const std::vector<Variable>& b);

struct Function {
  std::string name;
  bool is_kernel = false;
  bool has_body = false;
  Linkage linkage = Linkage::internal;
  std::uint32_t line = 0, source = 0;
  std::vector<Variable> params, results;
  std::vector<RegisterDecl> registers;
  std::vector<Variable> variables;  // declared in the body, names made unique by scope
  std::vector<RawInstruction> code;
  struct Label {
    std::string name;
    std::uint32_t scope;
    std::uint32_t at;
  };
  std::vector<Label> labels;
  struct Table {  // .branchtargets, .calltargets
    std::string name;
    std::uint32_t scope;
    std::vector<std::string> targets;
  };
  std::vector<Table> branch_tables, call_tables;
  struct Prototype {  // .callprototype
    std::string name;
    std::uint32_t scope;
    std::vector<Variable> params, results;
  };
  std::vector<Prototype> prototypes;
  std::vector<int> scope_parent;
  std::uint32_t max_threads[3] = {0, 0, 0};       // .maxntid
  std::uint32_t required_threads[3] = {0, 0, 0};  // .reqntid
  std::uint32_t cluster[3] = {0, 0, 0};           // .reqnctapercluster
  bool explicit_cluster = false;
  std::uint32_t min_ctas = 0, max_registers = 0;
};

struct ParsedModule {
  struct Source {  // a text: one, or several after linking
    std::string name, target;
    int target_number = 0;           // 90 for sm_90a
    std::uint32_t lines = 0;         // of the text
    std::uint32_t lines_before = 0;  // of the texts before it: line numbers count on
  };
  std::string name, target;
  int target_number = 0;
  std::vector<Source> sources;
  std::vector<Function> functions;
  std::vector<Variable> variables;
  std::map<std::string, std::string> aliases;  // .alias: name to the function it stands for
  std::vector<std::string> files;              // by .file number

  const Function* function(const std::string& name) const;  // its definition, if there is one
  std::uint64_t address_of(const Function& f) const;        // what a pointer to it holds
  PtxError error(std::uint32_t source, std::uint32_t line, const std::string& what) const {
    return PtxError(sources[source].name, line - sources[source].lines_before, what);
  }
};

// ---- As executed --------------------------------------------------------------------------------

struct Instruction;

enum class Step : std::uint8_t {
  next,   // continue with the following instruction
  jump,   // the group's pc has been set, or its lanes have exited
  block,  // nothing was done; try again after something has changed
};
using Execute = Step (*)(Warp&, const Instruction&, std::uint32_t mask);

// The place of one operand's 32 lane values: in the warp's registers (bank 0) or among the launch's
// constants (bank 1). An element has 4 bytes, or 8 in a 64-bit register. A predicate is one 32-bit
// mask.
struct Slot {
  std::uint32_t offset = 0;
  std::uint32_t reg = 0;  // index of its validity mask; 0 is always valid
  std::uint8_t bank = 0;
  std::uint8_t bytes = 4;
  bool negate = false;
  bool sink = false;
};

struct Instruction {
  Execute execute = nullptr;
  std::int32_t guard = -1;  // register offset of the predicate
  std::uint32_t guard_reg = 0;
  bool guard_negated = false;
  bool aligned = false;            // all lanes of the warp must be here
  std::uint32_t reconverge = ~0u;  // immediate post-dominator of a branch
  // What Decoder::keep kept for `execute`: the struct if it fits, else its address, in memory that
  // the program owns.
  alignas(8) std::uint8_t kept[16] = {};
  template <class T>
  static constexpr bool fits = sizeof(T) <= sizeof kept && std::is_trivially_copyable_v<T>;
  template <class T>
  decltype(auto) as() const {
    if constexpr (fits<T>) {
      T value;
      std::memcpy(&value, kept, sizeof value);
      return value;
    } else {
      const T* value;
      std::memcpy(&value, kept, sizeof value);
      return *value;
    }
  }
  Slot d, d2, s[4];
  std::vector<Slot> list;              // vectors: destinations first
  std::int64_t offset = 0;             // of an address
  std::vector<std::uint32_t> tracked;  // wgmma fragment registers it touches (index, write flag)
  std::uint32_t opcode = 0;            // index into Program::opcodes
  std::uint32_t line = 0, file = 0, source_line = 0;
  std::vector<std::uint32_t> targets;  // of a branch: what a lane may go on with
  Traits traits;
};

// Special registers: a read-only value per lane, set when a warp starts.
enum class Special : std::uint8_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  nwarpid,
  smid,
  nsmid,
  gridid,
  lanemask_eq,
  lanemask_le,
  lanemask_lt,
  lanemask_ge,
  lanemask_gt,
  clusterid_x,
  clusterid_y,
  clusterid_z,
  nclusterid_x,
  nclusterid_y,
  nclusterid_z,
  cluster_ctaid_x,
  cluster_ctaid_y,
  cluster_ctaid_z,
  cluster_nctaid_x,
  cluster_nctaid_y,
  cluster_nctaid_z,
  cluster_ctarank,
  cluster_nctarank,
  is_explicit_cluster,
  dynamic_smem_size,
  total_smem_size,
  aggr_smem_size,
  clock,
  clock_hi,
  clock64,
  globaltimer,
  globaltimer_lo,
  globaltimer_hi,
  workspace_low,  // address of the grid's workspace, which grid.sync() uses
  workspace_high,
  reserved_shared_end,
  reserved_shared_slot,
  zero,
  count,
};

// A kernel and all functions that it calls, ready to run.
struct Program {
  std::string kernel, module;
  int target_number = 0;
  std::vector<Instruction> code;
  std::vector<std::string> opcodes;
  std::uint32_t register_bytes = 0, register_count = 0;
  std::vector<std::uint8_t> constants;
  struct ParamAddress {
    std::uint32_t offset;
    std::int64_t addend;
  };
  std::vector<ParamAddress> param_addresses;  // constants that become addresses at launch
  struct SpecialRegister {
    Special which;
    Slot slot;
    bool predicate;  // one mask instead of a value per lane
  };
  std::vector<SpecialRegister> specials;
  std::uint32_t shared_static_end = 0, shared_dynamic_begin = 0;
  std::uint32_t local_bytes = 0;  // per lane, call parameters included
  std::uint32_t param_bytes = 0;
  std::vector<Variable> params;  // offsets in align order
  std::vector<std::uint32_t> param_offsets;
  bool uses_wgmma = false, uses_stack = false, uses_heap = false;
  // The largest count that it asks of setmaxnreg, and whether it ever asks for more than it has.
  std::uint32_t most_registers = 0;
  bool asks_for_registers = false;
  std::vector<std::shared_ptr<void>> owned;
  std::vector<ParsedModule::Source> sources;
  std::string place(std::uint32_t line) const;  // "line 12", "line 12 of b.ptx" if linked
  std::vector<std::string> register_names;      // by register index
  Function attributes;                          // launch attributes of the kernel (no code)
};

}  // namespace torchext::sim
