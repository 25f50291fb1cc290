// Turns parsed instructions into executable ones. Each instruction family registers a decoder for
// its opcodes. A decoder takes the modifiers that it knows; any other modifier is an error.
#pragma once

#include <cstring>
#include <initializer_list>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../check/clock.h"
#include "ir.h"

namespace torchext::sim {

struct Callee;
struct DeviceVariables;
class ProgramBuilder;

class Decoder {
 public:
  Decoder(ProgramBuilder& builder, const Function& function, const RawInstruction& raw,
          Instruction& out);

  const RawInstruction& raw;
  Instruction& out;

  const std::string& opcode() const { return raw.parts[0]; }

  // Traits.
  void is(OpClass op_class) { out.traits.op_class = op_class; }
  void reads(Space space, std::uint32_t bytes, Proxy proxy = Proxy::generic);
  void writes(Space space, std::uint32_t bytes, Proxy proxy = Proxy::generic);
  int target() const;  // 90 for sm_90a

  // Modifiers. take returns true if it was there. Types are taken in order of appearance.
  bool take(const char* modifier);
  std::string take_one_of(std::initializer_list<const char*> modifiers);  // "" if none
  // The modifier that comes first in the opcode; "" if none is present.
  std::string take_first_of(std::initializer_list<const char*> modifiers);
  // Like take and take_one_of, for modifiers that must be there.
  void need(std::initializer_list<const char*> all);
  std::string need_one_of(std::initializer_list<const char*> modifiers);
  bool take_prefix(const char* prefix, std::string* rest);  // "m64n" -> "m64n128k32"
  Type take_type();                                         // fails if there is none
  Type take_type_if_any();
  void need_type(Type type);
  // Takes modifiers that change speed and not results.
  void take_cache_hints();
  Scope take_scope();  // Scope::none if there is none
  Scope need_scope();
  bool has_cache_policy = false;       // .L2::cache_hint: one more operand
  void finish(std::size_t arguments);  // no modifier left, this many operands
  void finish(std::size_t least, std::size_t most);
  // Errors, which begin with "FILE:LINE: OPCODE: ". `what` says "ARGUMENT must be EXPECTED (got
  // ACTUAL); REMEDY". The opcode shows its modifiers, so an error about them needs no ACTUAL.
  [[noreturn]] void fail(const std::string& what) const;
  [[noreturn]] void fail_type(Type type) const;  // that this form does not take
  [[noreturn]] void fail_modifier(const std::string& name) const;
  [[noreturn]] void fail_operand(const Arg& arg, const std::string& expected,
                                 const std::string& remedy = "") const;
  [[noreturn]] void fail_unknown(const std::string& name) const;

  // Operands.
  std::size_t count() const { return raw.args.size(); }
  const Arg& arg(std::size_t i) const;
  Slot destination(const Arg& arg, int bytes);
  Slot destination(std::size_t i, int bytes) { return destination(arg(i), bytes); }
  Slot destination_at_least(const Arg& arg, int bytes);  // ld, cvt: a wider register is allowed
  Slot source(const Arg& arg, Type type);
  Slot source(std::size_t i, Type type) { return source(arg(i), type); }
  Slot source_at_least(const Arg& arg, Type type);  // st, cvt
  Slot predicate(const Arg& arg);
  Slot predicate(std::size_t i) { return predicate(arg(i)); }
  Slot predicate_destination(const Arg& arg);
  Slot constant(std::uint64_t value, int bytes);
  std::uint64_t immediate(std::size_t i) const;  // fails unless it is an integer literal
  void need_immediate(std::size_t i, std::uint64_t value) const;
  // The elements of a vector, which must have `count`.
  const std::vector<Arg>& vector(const Arg& arg, std::size_t count) const;
  std::vector<Arg> vector_or_one(const Arg& arg, std::size_t count) const;  // {r} or r
  // [base + offset]. The caller handles any further elements of arg.args.
  Slot address(const Arg& arg, std::int64_t* offset, Space* space);
  bool is_register(const Arg& a) const { return a.kind == Arg::reg; }
  Type register_type(const Arg& a) const;
  std::uint32_t label(const Arg& arg) const;
  const Function::Table& branch_table(const Arg& arg) const;
  // The innermost declaration of that name in scope at this instruction; null if there is none.
  template <class T>
  const T* in_scope(const std::vector<T>& all, const std::string& name) const {
    for (int scope = static_cast<int>(raw.scope); scope >= 0;
         scope = function_.scope_parent[static_cast<std::size_t>(scope)]) {
      for (const T& one : all) {
        if (static_cast<int>(one.scope) == scope && one.name == name) return &one;
      }
    }
    return nullptr;
  }
  Special special_named(const std::string& name) const;

  // Space of .global, .shared, .shared::cta, .shared::cluster, .local, .param, .const, or none.
  Space take_space();

  // Keeps `value` for `execute`, which reads it with Instruction::as<T>() and the same T.
  template <class T>
  void keep(T value) {
    if constexpr (Instruction::fits<T>) {
      std::memcpy(out.kept, &value, sizeof value);
    } else {
      auto owner = std::make_shared<T>(std::move(value));
      const T* address = owner.get();
      own_pointer(std::move(owner));
      std::memcpy(out.kept, &address, sizeof address);
    }
  }
  ProgramBuilder& builder() { return builder_; }
  const Function& function() const { return function_; }

 private:
  void own_pointer(std::shared_ptr<void> p);
  Slot register_slot(const Arg& arg) const;
  std::string describe(const Arg& arg) const;
  ProgramBuilder& builder_;
  const Function& function_;
  std::vector<std::string> modifiers_;
};

// Executes an instruction that changes nothing that the simulator models.
inline Step no_operation(Warp&, const Instruction&, std::uint32_t) {
  return Step::next;
}

// A row of the opcode table. What is left to know of an opcode is its minimum target (targets.cpp).
struct Opcode {
  Opcode() = default;
  Opcode(void (*decoder)(Decoder&), std::vector<OpClass> all, const char* path = __builtin_FILE());
  void (*decode)(Decoder&) = nullptr;
  std::vector<OpClass> classes;  // the first, unless the decoder chooses another of them
  std::string file;              // of its family: "integer.cpp"
};
using OpcodeTable = std::unordered_map<std::string, Opcode>;
const OpcodeTable& opcode_table();  // program.cpp

// The error message for an opcode, whose first part is `name`, that the table lacks.
std::string why_unknown(const std::string& opcode, const std::string& name);  // absent.cpp

// Each is defined in the file of its name.
void add_control(OpcodeTable&);
void add_calls(OpcodeTable&);
void add_stack(OpcodeTable&);
void add_integer(OpcodeTable&);
void add_moves(OpcodeTable&);
void add_logic(OpcodeTable&);
void add_bits(OpcodeTable&);
void add_compare(OpcodeTable&);
void add_floating(OpcodeTable&);
void add_video(OpcodeTable&);
void add_convert(OpcodeTable&);
void add_load_store(OpcodeTable&);
void add_atomics(OpcodeTable&);
void add_collectives(OpcodeTable&);
void add_barriers(OpcodeTable&);
void add_mbarrier(OpcodeTable&);
void add_copies(OpcodeTable&);
void add_matrix(OpcodeTable&);
void add_mma(OpcodeTable&);
void add_wmma(OpcodeTable&);
void add_wgmma(OpcodeTable&);
void add_tensormap(OpcodeTable&);
void add_system(OpcodeTable&);

struct Symbol {
  Space space = Space::global;
  std::uint64_t address = 0;
  std::uint64_t bytes = 0;
  bool kernel_param = false;
  bool framed = false;  // address is an offset in the frame; `slot` holds the sum
  Slot slot{};
};

class ProgramBuilder {
 public:
  ProgramBuilder(const ParsedModule& module, DeviceVariables& variables, const std::string& kernel);
  std::shared_ptr<Program> build();

  struct FunctionPlan {
    const Function* function;
    std::uint32_t first_register = 0;
    std::vector<std::uint32_t> register_offsets;
    std::uint32_t entry = 0;  // pc
    bool framed = false;      // calls.h
    Callee* callee = nullptr;
    std::map<std::string, Symbol> symbols;
  };
  const FunctionPlan* plan(const Function& f) const;  // null if the kernel cannot reach it
  const Callee* callee(const Function& f) const { return plan(f)->callee; }
  std::vector<const Function*> indirect_callees(const Function& f, const RawInstruction& call);
  const ParsedModule& module() const { return module_; }
  Program& program() { return *program_; }
  Slot constant(std::uint64_t value, int bytes);
  Slot param_address(std::int64_t addend);
  Slot special(Special which, int bytes, bool predicate);
  const Symbol* symbol(const Function& f, const std::string& name) const;

 private:
  void collect(const Function& kernel);
  std::vector<const Function*> callees_of(const Function& f);
  const std::vector<const Function*>& address_taken();
  Slot add_register(const std::string& name, Type type);
  void lay_out();
  void lay_out_function(FunctionPlan& plan, std::uint64_t* local);
  void find_post_dominators(std::uint32_t begin, std::uint32_t end);
  void track_wgmma_registers();

  const ParsedModule& module_;
  DeviceVariables& variables_;
  std::string kernel_;
  std::shared_ptr<Program> program_;
  std::vector<FunctionPlan> plans_;
  std::unordered_map<const Function*, std::size_t> plan_of_;
  std::vector<const Function*> address_taken_;
  bool knows_address_taken_ = false;
  std::map<std::string, Symbol> globals_;
  std::map<std::pair<std::uint64_t, int>, Slot> constants_;
  std::map<std::int64_t, Slot> param_constants_;
  std::map<std::tuple<Special, int, bool>, Slot> specials_;
  std::map<std::string, std::uint32_t> opcode_index_;
};

// Storage of .global and .const variables, which keep their values between launches.
struct DeviceVariables {
  struct Entry {
    std::string name;
    const Variable* variable = nullptr;
    std::vector<std::uint64_t> storage;
    std::uint8_t* data = nullptr;
    std::uint64_t bytes = 0;
    bool constant = false;
  };
  explicit DeviceVariables(const ParsedModule& module);
  const Entry* find(const std::string& name) const;
  void reset();  // to their initial values
  std::vector<std::unique_ptr<Entry>> entries;
  std::map<std::string, Entry*> by_name;

 private:
  const ParsedModule& module_;
};

}  // namespace torchext::sim
