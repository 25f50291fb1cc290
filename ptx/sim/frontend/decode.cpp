// Decoder: modifiers and operands of one instruction.
#include "decode.h"

#include <cstring>

#include "../machine/memory.h"
#include "../numerics/number_formats.h"
#include "special_registers.h"

namespace torchext::sim {

namespace {

int storage_bytes(Type type) {
  return size_of(type) == 8 ? 8 : 4;
}

bool is_floating(Type t) {
  return t == Type::f16 || t == Type::bf16 || t == Type::f32 || t == Type::f64 || t == Type::tf32 ||
         t == Type::f16x2 || t == Type::bf16x2;
}

}  // namespace

Decoder::Decoder(ProgramBuilder& builder, const Function& function, const RawInstruction& r,
                 Instruction& o)
    : raw(r),
      out(o),
      builder_(builder),
      function_(function),
      modifiers_(r.parts.begin() + 1, r.parts.end()) {}

void Decoder::own_pointer(std::shared_ptr<void> p) {
  builder_.program().owned.push_back(std::move(p));
}

void Decoder::reads(Space space, std::uint32_t bytes, Proxy proxy) {
  MemoryUse& m = out.traits.memory;
  m.reads = true;
  m.from = space;
  m.bytes = bytes;
  m.proxy = proxy;
}

void Decoder::writes(Space space, std::uint32_t bytes, Proxy proxy) {
  MemoryUse& m = out.traits.memory;
  m.writes = true;
  m.to = space;
  m.bytes = bytes;
  m.proxy = proxy;
}

int Decoder::target() const {
  return builder_.module().sources[function_.source].target_number;
}

void Decoder::fail_unknown(const std::string& name) const {
  for (const Variable& v : builder_.module().variables) {
    if (v.name == name && v.is_external())
      fail("'" + name + "' is .extern: link the module that defines it, with sim.Module([...])");
  }
  fail("unknown name '" + name + "'");
}

void Decoder::fail(const std::string& what) const {
  throw builder_.module().error(function_.source, raw.line, raw.opcode + ": " + what);
}

void Decoder::fail_type(Type type) const {
  fail("the type must be one that " + opcode() + " takes here (got ." + name_of(type) + ")");
}

void Decoder::fail_modifier(const std::string& name) const {
  fail("the modifiers must be ones that " + opcode() + " takes here (got '." + name + "')");
}

void Decoder::fail_operand(const Arg& a, const std::string& expected,
                           const std::string& remedy) const {
  std::string which = "an operand";
  for (std::size_t i = 0; i < raw.args.size(); ++i) {
    if (&a == &raw.args[i]) which = "operand " + std::to_string(i + 1);
    for (const Arg& element : raw.args[i].args) {
      if (&a == &element) which = "an element of operand " + std::to_string(i + 1);
    }
  }
  fail(which + " must be " + expected + " (got " + describe(a) + ")" +
       (remedy.empty() ? "" : "; " + remedy));
}

std::string Decoder::describe(const Arg& a) const {
  switch (a.kind) {
    case Arg::reg: {
      const RegisterDecl& declared = function_.registers[a.reg_index];
      return std::string("the .") + name_of(declared.type) + " register '" +
             (a.minus    ? "-"
              : a.negate ? "!"
                         : "") +
             declared.name + (a.text.empty() ? "" : "." + a.text) + "'";
    }
    case Arg::integer:
      return "an integer";
    case Arg::real:
      return "a floating-point number";
    case Arg::vector:
      if (!a.text.empty()) return "'" + a.text + "', which has 4 elements";
      return "a vector of " + std::to_string(a.args.size()) + " elements";
    case Arg::memory:
      return "an address in brackets";
    case Arg::list:
      return "a list in parentheses";
    case Arg::sink:
      return "'_'";
    case Arg::pair:
      return "a pair with '|'";
    default:
      return "'" + a.text + "'";
  }
}

bool Decoder::take(const char* modifier) {
  for (auto it = modifiers_.begin(); it != modifiers_.end(); ++it) {
    if (*it == modifier) {
      modifiers_.erase(it);
      return true;
    }
  }
  return false;
}

std::string Decoder::take_one_of(std::initializer_list<const char*> modifiers) {
  for (const char* m : modifiers) {
    if (take(m)) return m;
  }
  return "";
}

namespace {

std::string with_dots(std::initializer_list<const char*> modifiers, const char* between,
                      const char* before_last) {
  std::string text;
  std::size_t left = modifiers.size();
  for (const char* m : modifiers) {
    text += std::string(".") + m;
    --left;
    if (left > 0) text += left > 1 ? between : before_last;
  }
  return text;
}

}  // namespace

void Decoder::need(std::initializer_list<const char*> all) {
  for (const char* m : all) {
    if (!take(m)) fail("the modifiers must include " + with_dots(all, "", ""));
  }
}

std::string Decoder::need_one_of(std::initializer_list<const char*> modifiers) {
  std::string taken = take_one_of(modifiers);
  if (taken.empty()) fail("the modifiers must include " + with_dots(modifiers, ", ", " or "));
  return taken;
}

std::string Decoder::take_first_of(std::initializer_list<const char*> modifiers) {
  for (auto it = modifiers_.begin(); it != modifiers_.end(); ++it) {
    for (const char* m : modifiers) {
      if (*it != m) continue;
      modifiers_.erase(it);
      return m;
    }
  }
  return "";
}

bool Decoder::take_prefix(const char* prefix, std::string* rest) {
  const std::size_t length = std::strlen(prefix);
  for (auto it = modifiers_.begin(); it != modifiers_.end(); ++it) {
    if (it->compare(0, length, prefix) == 0) {
      *rest = *it;
      modifiers_.erase(it);
      return true;
    }
  }
  return false;
}

Type Decoder::take_type_if_any() {
  for (auto it = modifiers_.begin(); it != modifiers_.end(); ++it) {
    const Type type = type_named(*it);
    if (type != Type::none) {
      modifiers_.erase(it);
      return type;
    }
  }
  return Type::none;
}

Type Decoder::take_type() {
  const Type type = take_type_if_any();
  if (type == Type::none)
    fail("the modifiers must include a type" +
         (modifiers_.empty() ? "" : " (got ." + modifiers_.front() + ")"));
  return type;
}

void Decoder::need_type(Type type) {
  const Type taken = take_type();
  if (taken != type)
    fail(std::string("the type must be .") + name_of(type) + " (got ." + name_of(taken) + ")");
}

void Decoder::take_cache_hints() {
  take_one_of({"L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last",
               "L1::no_allocate"});
  take_one_of({"L2::evict_normal", "L2::evict_first", "L2::evict_last"});
  take_one_of({"L2::64B", "L2::128B", "L2::256B"});
  take_one_of({"ca", "cg", "cs", "lu", "cv", "wb", "wt"});
  has_cache_policy = take("L2::cache_hint");
}

Scope Decoder::take_scope() {
  const std::string scope = take_one_of({"cta", "cluster", "gpu", "sys"});
  return scope.empty()        ? Scope::none
         : scope == "cta"     ? Scope::cta
         : scope == "cluster" ? Scope::cluster
         : scope == "gpu"     ? Scope::gpu
                              : Scope::sys;
}

Scope Decoder::need_scope() {
  const Scope scope = take_scope();
  if (scope == Scope::none) need_one_of({"cta", "cluster", "gpu", "sys"});
  return scope;
}

Space Decoder::take_space() {
  if (take("global")) return Space::global;
  if (take("shared") || take("shared::cta")) return Space::shared;
  if (take("shared::cluster")) return Space::shared_cluster;
  if (take("local")) return Space::local;
  if (take("param") || take("param::entry") || take("param::func")) return Space::param;
  if (take("const")) return Space::constant;
  return Space::generic;
}

void Decoder::finish(std::size_t least, std::size_t most) {
  if (!modifiers_.empty()) fail_modifier(modifiers_.front());
  if (count() < least || count() > most) {
    fail("the number of operands must be " + std::to_string(least) +
         (most == least ? "" : " to " + std::to_string(most)) + " (got " + std::to_string(count()) +
         ")");
  }
}

void Decoder::finish(std::size_t arguments) {
  finish(arguments, arguments);
}

const Arg& Decoder::arg(std::size_t i) const {
  if (i >= raw.args.size()) {
    fail("the number of operands must be at least " + std::to_string(i + 1) + " (got " +
         std::to_string(count()) + ")");
  }
  return raw.args[i];
}

Type Decoder::register_type(const Arg& a) const {
  return a.kind == Arg::reg ? function_.registers[a.reg_index].type : Type::none;
}

Slot Decoder::register_slot(const Arg& a) const {
  if (!a.text.empty()) fail_operand(a, "a whole register");
  if (a.minus) fail_operand(a, "a register that is not negated");
  const auto& plan = *builder_.plan(function_);
  Slot slot;
  slot.reg = plan.first_register + a.reg_index;
  slot.offset = plan.register_offsets[a.reg_index];
  const Type type = function_.registers[a.reg_index].type;
  slot.bytes = static_cast<std::uint8_t>(size_of(type) == 8 ? 8 : 4);
  slot.negate = a.negate;
  return slot;
}

Slot Decoder::destination_at_least(const Arg& a, int bytes) {
  if (a.kind == Arg::sink) {
    Slot slot;
    slot.sink = true;
    slot.reg = 1;
    slot.bytes = static_cast<std::uint8_t>(bytes == 8 ? 8 : 4);
    return slot;  // offset 0 of the register file is scratch
  }
  if (a.kind != Arg::reg || register_type(a) == Type::pred || size_of(register_type(a)) < bytes)
    fail_operand(a, "a register of at least " + std::to_string(8 * bytes) + " bits");
  return register_slot(a);
}

Slot Decoder::destination(const Arg& a, int bytes) {
  const Slot slot = destination_at_least(a, bytes);
  if (slot.bytes != (bytes == 8 ? 8 : 4)) fail_operand(a, "a register of at most 32 bits");
  return slot;
}

Slot Decoder::predicate_destination(const Arg& a) {
  if (a.kind == Arg::sink) {
    Slot slot;
    slot.sink = true;
    slot.reg = 1;
    return slot;
  }
  if (a.kind != Arg::reg || register_type(a) != Type::pred) fail_operand(a, "a predicate register");
  return register_slot(a);
}

Special Decoder::special_named(const std::string& name) const {
  if (const auto which = special_register(name)) return *which;
  if (name.compare(0, 3, "%pm") == 0 && name.size() > 3 && name[3] >= '0' && name[3] <= '7')
    fail("performance monitors ('" + name + "') are not supported");
  fail("unknown special register '" + name + "'");
}

Slot Decoder::predicate(const Arg& a) {
  if (a.kind == Arg::special) {
    if (special_named(a.text) != Special::is_explicit_cluster) fail_operand(a, "a predicate");
    return builder_.special(Special::is_explicit_cluster, 4, true);
  }
  if (a.kind == Arg::integer) {
    return constant(a.bits ? ~0ull : 0, 4);
  }
  if (a.kind != Arg::reg || register_type(a) != Type::pred) fail_operand(a, "a predicate");
  return register_slot(a);
}

Slot Decoder::constant(std::uint64_t value, int bytes) {
  return builder_.constant(value, bytes);
}

Slot Decoder::source_at_least(const Arg& a, Type type) {
  const int bytes = storage_bytes(type);
  switch (a.kind) {
    case Arg::reg: {
      const Type have = register_type(a);
      if (have == Type::pred || size_of(have) < size_of(type))
        fail_operand(a, "a register of at least " + std::to_string(8 * size_of(type)) + " bits");
      return register_slot(a);
    }
    case Arg::integer: {
      if (is_floating(type)) fail_operand(a, "a floating-point number", "write 1.0 or 0f3F800000");
      const int size = size_of(type);
      const std::uint64_t mask = size >= 8 ? ~0ull : (1ull << (8 * size)) - 1;
      return constant(a.bits & mask, bytes);
    }
    case Arg::real:
      return constant(real_bits(a, type), bytes);
    case Arg::special: {
      const Special which = special_named(a.text);
      if (which == Special::is_explicit_cluster) fail_operand(a, "a number, not a predicate");
      return builder_.special(which, bytes, false);
    }
    case Arg::name: {
      const Symbol* symbol = builder_.symbol(function_, a.text);
      if (symbol == nullptr) {
        const Function* pointee = builder_.module().function(a.text);
        if (pointee == nullptr) fail_unknown(a.text);
        return constant(builder_.module().address_of(*pointee), bytes);
      }
      if (symbol->framed) {
        if (a.offset != 0 || bytes != 8)
          fail(
              "a variable of a function that may call itself must be an operand as its 64-bit "
              "address without an offset");
        return symbol->slot;
      }
      if (symbol->kernel_param)
        return builder_.param_address(static_cast<std::int64_t>(symbol->address | kParamWindow) +
                                      a.offset);
      return constant(symbol->address + static_cast<std::uint64_t>(a.offset), bytes);
    }
    default:
      fail_operand(a, "a register, a number or a name");
  }
}

Slot Decoder::source(const Arg& a, Type type) {
  const Slot slot = source_at_least(a, type);
  if (slot.bytes != storage_bytes(type)) fail_operand(a, "a register of at most 32 bits");
  return slot;
}

std::uint64_t Decoder::immediate(std::size_t i) const {
  const Arg& a = arg(i);
  if (a.kind != Arg::integer) fail_operand(a, "an integer");
  return a.bits;
}

void Decoder::need_immediate(std::size_t i, std::uint64_t value) const {
  if (const std::uint64_t got = immediate(i); got != value) {
    fail("operand " + std::to_string(i + 1) + " must be " + std::to_string(value) + " (got " +
         std::to_string(got) + ")");
  }
}

const std::vector<Arg>& Decoder::vector(const Arg& a, std::size_t count) const {
  if (a.kind != Arg::vector || a.args.size() != count)
    fail_operand(a, "a vector of " + std::to_string(count) + " elements");
  return a.args;
}

std::vector<Arg> Decoder::vector_or_one(const Arg& a, std::size_t count) const {
  if (count == 1 && a.kind != Arg::vector) return {a};
  return vector(a, count);
}

Slot Decoder::address(const Arg& a, std::int64_t* offset, Space* space) {
  if (a.kind != Arg::memory || a.args.empty()) fail_operand(a, "an address in brackets");
  const Arg& base = a.args[0];
  *offset = a.offset;
  if (base.kind == Arg::integer) {
    return constant(base.bits, 8);
  }
  if (base.kind == Arg::name) {
    const Symbol* symbol = builder_.symbol(function_, base.text);
    if (symbol == nullptr) fail_unknown(base.text);
    // Parameters of device functions live with the lane's local memory.
    if (*space == Space::param && !symbol->kernel_param) *space = Space::local;
    if (symbol->framed) return symbol->slot;
    if (symbol->kernel_param) {
      const std::uint64_t window = *space == Space::param ? 0 : kParamWindow;
      return builder_.param_address(static_cast<std::int64_t>(symbol->address | window));
    }
    if (*space == Space::generic && symbol->space == Space::shared)
      return constant(symbol->address | kSharedWindow, 8);
    return constant(symbol->address, 8);
  }
  if (base.kind != Arg::reg || size_of(register_type(base)) < 4)
    fail_operand(base, "a register of at least 32 bits, a variable or an integer");
  return register_slot(base);
}

std::uint32_t Decoder::label(const Arg& a) const {
  // A label may be called %L: only its use tells it from a special register.
  if (a.kind != Arg::name && a.kind != Arg::special) fail_operand(a, "a label");
  if (const auto* found = in_scope(function_.labels, a.text))
    return builder_.plan(function_)->entry + found->at;
  fail("unknown label '" + a.text + "'");
}

const Function::Table& Decoder::branch_table(const Arg& a) const {
  const auto* table = a.kind == Arg::name ? in_scope(function_.branch_tables, a.text) : nullptr;
  if (table == nullptr) fail_operand(a, "the name of a branch table");
  return *table;
}

}  // namespace torchext::sim
