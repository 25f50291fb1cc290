// Bodies of functions: directives, labels, instructions and their operands.
#include <utility>

#include "parser_state.h"

namespace torchext::sim {

namespace {

// Special registers of four elements, which an instruction may read as a vector.
bool is_special_vector(const std::string& name) {
  for (const char* vector : {"%tid", "%ntid", "%ctaid", "%nctaid", "%clusterid", "%nclusterid",
                             "%cluster_ctaid", "%cluster_nctaid"}) {
    if (name == vector) return true;
  }
  return false;
}

}  // namespace

void Parser::body(Function& f) {
  file_ = source_line_ = 0;
  expect('{');
  for (int depth = 1; depth > 0;) {
    const Token token = peek();
    if (token.kind == Token::end) fail_at(f.line, "function '" + f.name + "' without an end");
    if (accept('{')) {
      f.scope_parent.push_back(scope_);
      registers_.emplace_back();
      vectors_.emplace_back();
      variables_.emplace_back();
      scope_ = static_cast<int>(f.scope_parent.size()) - 1;
      ++depth;
    } else if (accept('}')) {
      scope_ = f.scope_parent[static_cast<std::size_t>(scope_)];
      --depth;
    } else if (accept(';')) {
    } else if (token.kind == Token::word && token.text[0] == '.') {
      directive();
    } else if (token.kind == Token::word && peek(1).is(':')) {
      label();
    } else {
      instruction();
    }
  }
}

void Parser::directive() {
  const std::string& word = peek().text;
  if (word == ".reg") {
    registers();
  } else if (word == ".local" || word == ".shared" || word == ".param" || word == ".global" ||
             word == ".const" || word == ".extern") {
    for (Variable& v : variables(linkage())) declare_variable(std::move(v));
  } else if (word == ".loc") {
    location();
  } else if (word == ".pragma") {
    pragma();
  } else if (word == ".file") {
    file_directive();
  } else if (word == ".section") {
    section();
  } else {
    fail("unknown directive '" + word + "'");
  }
}

// .loc file line column [, function_name label [+ n]] [, inlined_at file line column]
void Parser::location() {
  take();
  file_ = take_integer();
  source_line_ = take_integer();
  take_integer();
  while (accept(',')) {
    if (accept("function_name")) {
      take_word();
      displacement();
    } else if (accept("inlined_at")) {
      for (int i = 0; i < 3; ++i) take_integer();
    } else {
      fail_token("function_name or inlined_at");
    }
  }
}

void Parser::label() {
  Function& f = *function_;
  const Token token = take();
  take();
  const auto scope = static_cast<std::uint32_t>(scope_);
  if (accept(".branchtargets") || peek().is(".calltargets")) {
    auto& tables = peek().is(".calltargets") ? f.call_tables : f.branch_tables;
    accept(".calltargets");
    Function::Table table{token.text, scope, {}};
    do {
      table.targets.push_back(take_word());
    } while (accept(','));
    expect(';');
    tables.push_back(std::move(table));
  } else if (accept(".callprototype")) {
    Function::Prototype prototype{token.text, scope, {}, {}};
    if (peek().is('(')) prototype.results = parameters(false);
    take_word();
    if (peek().is('(')) prototype.params = parameters(false);
    while (peek().kind == Token::word) {
      if (accept(".abi_preserve") || accept(".abi_preserve_control"))
        take_integer();
      else if (!accept(".noreturn"))
        fail("unknown function directive '" + peek().text + "'");
    }
    expect(';');
    f.prototypes.push_back(std::move(prototype));
  } else {
    for (const Function::Label& other : f.labels) {
      if (other.name == token.text && other.scope == scope)
        fail_at(token.line, "label '" + token.text + "' is defined twice in one scope");
    }
    f.labels.push_back({token.text, scope, static_cast<std::uint32_t>(f.code.size())});
  }
}

void Parser::instruction() {
  Function& f = *function_;
  RawInstruction ins;
  ins.line = peek().line;
  ins.file = file_;
  ins.source_line = source_line_;
  ins.scope = static_cast<std::uint32_t>(scope_);
  if (accept('@')) {
    ins.guard_negated = accept('!');
    const std::string name = take_word();
    const std::uint32_t* reg = find(registers_, name);
    if (reg == nullptr) fail("unknown predicate '" + name + "'");
    if (f.registers[*reg].type != Type::pred)
      fail("a guard must be a predicate (got '" + name + "')");
    ins.guard = static_cast<int>(*reg);
  }
  ins.opcode = take_word();
  ins.parts = split(ins.opcode, '.');
  in_call_ = ins.parts[0] == "call";
  while (!accept(';')) {
    if (peek().kind == Token::end || peek().is('}')) fail_token("';'");
    ins.args.push_back(operand());
    if (!peek().is(';') && !accept(',')) fail_token("',' or ';'");
  }
  f.code.push_back(std::move(ins));
}

Arg Parser::operand() {
  Arg arg = simple_operand();
  if (accept('|')) {
    Arg both;
    both.kind = Arg::pair;
    both.args.push_back(std::move(arg));
    both.args.push_back(simple_operand());
    return both;
  }
  return arg;
}

Arg Parser::sequence(Arg::Kind kind, char close) {
  Arg arg;
  arg.kind = kind;
  while (!accept(close)) {
    if (peek().kind == Token::end) fail_token(std::string("'") + close + "'");
    arg.args.push_back(operand());
    if (!peek().is(close) && !accept(',')) fail_token(std::string("',' or '") + close + "'");
  }
  return arg;
}

Arg Parser::simple_operand() {
  const Nested nested(*this);
  if (accept('{')) return sequence(Arg::vector, '}');
  if (in_call_ && peek().is('(')) {
    take();
    in_call_ = false;  // inside the list, parentheses belong to expressions
    Arg list = sequence(Arg::list, ')');
    in_call_ = true;
    return list;
  }
  if (accept('[')) {
    Arg arg;
    arg.kind = Arg::memory;
    arg.args.push_back(simple_operand());
    std::swap(arg.offset, arg.args[0].offset);  // the offset may follow a name
    arg.offset += displacement();
    while (accept(',')) arg.args.push_back(operand());
    expect(']');
    return arg;
  }
  if (peek().is('!') && peek(1).kind == Token::word && !peek(1).is("WARP_SZ")) {
    take();
    return name_operand(take_word(), true);
  }
  if (peek().is('-') && peek(1).kind == Token::word && !peek(1).is("WARP_SZ")) {
    take();
    Arg arg = name_operand(take_word(), false);
    if (arg.kind != Arg::reg) fail("the operand after '-' must be a register or a number");
    arg.minus = true;
    return arg;
  }
  if (at_constant()) return constant_expression();
  return name_operand(take_word(), false);
}

Arg Parser::name_operand(const std::string& word, bool negate) {
  Arg arg;
  const std::uint32_t* reg = find(registers_, word);
  if (const std::size_t dot = word.rfind('.'); reg == nullptr && dot != std::string::npos) {
    reg = find(registers_, word.substr(0, dot));
    if (reg != nullptr) arg.text = word.substr(dot + 1);
  }
  if (reg != nullptr) {
    arg.kind = Arg::reg;
    arg.reg_index = *reg;
    arg.negate = negate;
    return arg;
  }
  if (negate) fail("unknown register '" + word + "'");
  if (word == "_") return arg;
  if (const auto* vector = find(vectors_, word)) {
    arg.kind = Arg::vector;
    for (const std::uint32_t reg : *vector) {
      Arg element;
      element.kind = Arg::reg;
      element.reg_index = reg;
      arg.args.push_back(std::move(element));
    }
    return arg;
  }
  if (word[0] == '%') {
    arg.kind = Arg::special;
    arg.text = word;
    if (!is_special_vector(word)) return arg;
    Arg vector;
    vector.kind = Arg::vector;
    vector.text = word;
    for (const char* element : {".x", ".y", ".z", ".w"}) {
      arg.text = word + element;
      vector.args.push_back(arg);
    }
    return vector;
  }
  arg.kind = Arg::name;
  const std::string* unique = find(variables_, word);
  arg.text = unique != nullptr ? *unique : word;
  if (peek().is('['))
    fail("an element of an array must be named by its address; write [" + word + "+n], n in bytes");
  arg.offset = displacement();
  return arg;
}

// Any number of "+ n" and "- n".
std::int64_t Parser::displacement() {
  std::uint64_t total = 0;
  while (peek().is('+') || peek().is('-')) {
    const Token sign = take();
    const Arg value = constant_term();
    if (value.kind != Arg::integer) fail_at(sign.line, "an offset must be an integer");
    total += sign.is('-') ? ~value.bits + 1 : value.bits;
  }
  return static_cast<std::int64_t>(total);
}

}  // namespace torchext::sim
