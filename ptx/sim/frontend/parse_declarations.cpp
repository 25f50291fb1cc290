// Declarations of variables, parameters and registers; initializers.
#include "parser_state.h"

namespace torchext::sim {

namespace {

Space space_named(const std::string& word) {
  if (word == ".shared" || word == ".shared::cta") return Space::shared;
  if (word == ".const") return Space::constant;
  if (word == ".local") return Space::local;
  if (word == ".param" || word == ".reg") return Space::param;
  return Space::global;
}

int element_bytes(const Variable& v) {
  return size_of(v.type) != 0 ? size_of(v.type) : 1;
}

}  // namespace

std::vector<Variable> Parser::variables(Linkage how) {
  const Variable head = variable_head(how);
  std::vector<Variable> all;
  do {
    Variable v = head;
    declarator(v, false);
    all.push_back(std::move(v));
  } while (accept(','));
  expect(';');
  return all;
}

// .space [.align n] [.attribute(...)] [.v2|.v4] .type
Variable Parser::variable_head(Linkage how) {
  Variable v;
  v.line = peek().line;
  v.linkage = how;
  const bool parameter = peek().is(".param") || peek().is(".reg");
  v.space = space_named(take_word());
  if (how == Linkage::common && v.space != Space::global)
    fail_at(v.line, "a .common variable must be .global");
  bool aligned = false, pointee = false;
  while (peek().kind == Token::word && peek().text[0] == '.') {
    const std::string word = take_word();
    if (word == ".align") {
      const auto align = take_integer();
      if (align == 0 || align > 4096 || (align & (align - 1)) != 0)
        fail("an alignment must be a power of two up to 4096 (got " + std::to_string(align) + ")");
      if (pointee) continue;  // after .ptr: of what the parameter points to
      v.align = align;
      aligned = true;
    } else if (word == ".v2" || word == ".v4") {
      v.lanes = word == ".v2" ? 2 : 4;
    } else if (word == ".ptr" && parameter) {
      pointee = v.pointer = true;
    } else if (pointee && (word == ".global" || word == ".shared" || word == ".const" ||
                           word == ".local" || word == ".generic")) {
      continue;
    } else if (word == ".attribute") {
      skip_attribute();
    } else {
      if (v.type != Type::none)
        fail("a declaration must have one type (got a second, '" + word + "')");
      v.type = type_named(word.substr(1));
      if (v.type == Type::none) fail("unknown type '" + word + "'");
    }
  }
  if (v.type == Type::none) fail("a declaration must have a type");
  if (v.type == Type::pred) fail("a predicate must be a register");
  if (!aligned) v.align = static_cast<std::uint32_t>(element_bytes(v) * v.lanes);
  return v;
}

// .attribute(.managed), .attribute(.unified(1, 2)) place memory, which makes no difference here.
void Parser::skip_attribute() {
  expect('(');
  for (int depth = 1; depth > 0; take()) {
    if (peek().kind == Token::end) fail_token("')'");
    if (peek().is('(')) ++depth;
    if (peek().is(')')) --depth;
  }
}

// name[n][m] [= initializer]
void Parser::declarator(Variable& v, bool parameter) {
  v.name = take_word();
  std::uint64_t count = 1;
  while (accept('[')) {
    if (accept(']')) {
      if (!v.dimensions.empty())
        fail("the sizes of '" + v.name + "' must be given, except for the first");
      v.dimensions.push_back(0);
      continue;
    }
    v.dimensions.push_back(take_integer());
    if (v.dimensions.back() == 0 && v.dimensions.size() > 1)
      fail("a size of '" + v.name + "' must be positive, except for the first");
    if (v.dimensions.back() != 0) count *= v.dimensions.back();
    if (count > (1ull << 40)) fail("'" + v.name + "' must have at most 2^40 elements");
    expect(']');
  }
  const bool unsized = !v.dimensions.empty() && v.dimensions[0] == 0;
  const auto each = static_cast<std::uint64_t>(element_bytes(v) * v.lanes);
  v.bytes = unsized ? 0 : count * each;
  if (peek().is('=')) {
    if (v.space != Space::global && v.space != Space::constant)
      fail("'" + v.name + "' must be .global or .const to have an initial value");
    if (v.is_external()) fail("'" + v.name + "' must have no initial value, as it is .extern");
    take();
    std::vector<std::uint64_t> counts = v.dimensions;
    if (v.lanes > 1) counts.push_back(static_cast<std::uint64_t>(v.lanes));
    const std::uint64_t rows = initializer(v, counts, 0);
    if (unsized) {
      v.bytes = rows * count * each;
      v.dimensions[0] = rows;
      if (v.bytes > 1u << 28)
        fail("the initializer of '" + v.name + "' must have at most 2^28 bytes");
    }
  }
  if (!parameter) declared_.insert(v.name);
  if (v.bytes == 0 && !parameter && !v.is_external())
    fail_at(v.line, "'" + v.name + "' must have a size, or be .extern");
}

// Braces nest like the array's dimensions; returns the number of elements within. As with ptxas,
// the values fill the array from its beginning, and zeros follow the last: {{1}, {2, 3}} in [3][2]
// is 1, 2, 3, 0, 0, 0 (the PTX manual, as C, has 1, 0, 2, 3, 0, 0).
std::uint64_t Parser::initializer(Variable& v, const std::vector<std::uint64_t>& counts,
                                  std::size_t level) {
  if (level == counts.size()) {
    element(v);
    return 1;
  }
  const Nested nested(*this);
  expect('{');
  std::uint64_t count = 0;
  if (!peek().is('}')) {
    do {
      if (counts[level] != 0 && count == counts[level])
        fail("the initializer of '" + v.name + "' must have at most " + std::to_string(count) +
             " elements here");
      initializer(v, counts, level + 1);
      ++count;
    } while (accept(','));
  }
  expect('}');
  return count;
}

void Parser::element(Variable& v) {
  const int bytes = element_bytes(v);
  // 0xFF00(symbol): one byte of an address.
  if (peek().kind == Token::number && peek(1).is('(')) {
    const std::uint32_t line = peek().line;
    const std::string text = peek().text;
    const Arg mask = constant_term();
    int shift = 0;
    while (shift < 64 && mask.bits != 0xffull << shift) shift += 8;
    if (mask.kind != Arg::integer || shift == 64)
      fail_at(line,
              "the mask of an address must be 0xFF, shifted by whole bytes (got " + text + ")");
    expect('(');
    address_element(v, shift, 1);
    expect(')');
  } else if (at_constant()) {
    const std::uint32_t line = peek().line;
    const Arg arg = constant_expression();
    const bool floating = v.type == Type::f32 || v.type == Type::f64;
    const bool untyped = v.type == Type::b32 || v.type == Type::b64;
    std::uint64_t bits = arg.bits;
    if (arg.kind == Arg::real) {
      if (!floating && !untyped)
        fail_at(line, "the initial values of '" + v.name + "' must be integers");
      bits = real_bits(arg, bytes == 8 ? Type::f64 : Type::f32);
    } else if (floating || v.type == Type::f16 || v.type == Type::bf16) {
      fail_at(line, "the initial values of '" + v.name + "' must be floating-point numbers");
    }
    for (int i = 0; i < bytes; ++i)
      v.initial.push_back(i < 8 ? static_cast<std::uint8_t>(bits >> (8 * i)) : 0);
  } else {
    if (peek().kind != Token::word) fail_token("a value");
    if (bytes < 8)
      fail("an element of '" + v.name +
           "' must have 8 bytes to hold an address; 0xFF(...) takes a byte");
    address_element(v, 0, 8);
  }
}

// symbol, symbol + 8, generic(symbol), generic(symbol) + 8: `bytes` of the address from `shift` on.
void Parser::address_element(Variable& v, int shift, int bytes) {
  const std::uint32_t line = peek().line;
  std::string symbol = take_word();
  std::int64_t addend = 0;
  if (symbol == "generic" && accept('(')) {
    symbol = take_word();
    addend = displacement();
    expect(')');
  }
  addend += displacement();
  if (declared_.count(symbol) == 0)
    fail_at(line, "the initial value of '" + v.name + "' refers to '" + symbol +
                      "', which is not declared before it");
  v.references.push_back({v.initial.size(), symbol, addend, bytes, shift, line});
  v.initial.resize(v.initial.size() + static_cast<std::size_t>(element_bytes(v)));
}

std::vector<Variable> Parser::parameters(bool declare) {
  std::vector<Variable> result;
  expect('(');
  while (!accept(')')) {
    const bool reg = peek().is(".reg");
    if (!peek().is(".param") && !reg) fail_token(".param or .reg");
    Variable v = variable_head(Linkage::internal);
    declarator(v, true);
    if (reg) {
      if (v.lanes > 1 || v.type == Type::b128)
        fail("vector registers as parameters are not supported");
      v.reg = declare ? static_cast<std::int32_t>(add_register(v.name, v.type)) : 0;
    }
    result.push_back(std::move(v));
    if (!peek().is(')')) expect(',');
  }
  return result;
}

// A unique name for a variable in a function's body, where scopes may reuse names.
void Parser::declare_variable(Variable v) {
  const std::string unique =
      "{" + function_->name + ":" + std::to_string(function_->variables.size()) + "}" + v.name;
  variables_[static_cast<std::size_t>(scope_)][v.name] = unique;
  v.name = unique;
  function_->variables.push_back(std::move(v));
}

// .reg [.v2|.v4] .type name, name<count>, ...;
void Parser::registers() {
  take();
  int lanes = accept(".v2") ? 2 : accept(".v4") ? 4 : 1;
  const std::string type_word = take_word();
  Type type = type_named(type_word.substr(1));
  if (type == Type::none) fail("unknown register type '" + type_word + "'");
  if (type == Type::b128) {  // two 64-bit halves, which every instruction moves alike
    if (lanes != 1) fail("vectors of .b128 registers are not supported");
    type = Type::b64;
    lanes = 2;
  }
  do {
    const std::string name = take_word();
    if (accept('<')) {
      const std::uint32_t count = take_integer();
      expect('>');
      if (count > 1000000)
        fail("the number of registers must be at most 1000000 (got " + std::to_string(count) + ")");
      for (std::uint32_t i = 0; i < count; ++i)
        add_registers(name + std::to_string(i), type, lanes);
    } else {
      add_registers(name, type, lanes);
    }
  } while (accept(','));
  expect(';');
}

// A vector is the registers v.x, v.y, ..., also called v.r, v.g, ...; `v` alone means all of them.
void Parser::add_registers(const std::string& name, Type type, int lanes) {
  if (lanes == 1) {
    add_register(name, type);
    return;
  }
  auto& here = registers_[static_cast<std::size_t>(scope_)];
  std::vector<std::uint32_t> all;
  for (int i = 0; i < lanes; ++i) {
    all.push_back(add_register(name + "." + "xyzw"[i], type));
    here[name + "." + "rgba"[i]] = all.back();
  }
  vectors_[static_cast<std::size_t>(scope_)][name] = std::move(all);
}

std::uint32_t Parser::add_register(const std::string& name, Type type) {
  const auto index = static_cast<std::uint32_t>(function_->registers.size());
  registers_[static_cast<std::size_t>(scope_)][name] = index;
  function_->registers.push_back({name, type});
  return index;
}

}  // namespace torchext::sim
