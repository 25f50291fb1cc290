// PTX text to ParsedModule: one recursive descent, kept in one piece (550 lines) with its state.
#include "parser.h"

#include <cstring>
#include <map>
#include <unordered_map>

#include "token_reader.h"

namespace torchext::sim {

namespace {

class Parser : TokenReader {
 public:
  Parser(const std::string& text, const std::string& name) : TokenReader(text, name) {
    module_.name = name;
  }

  ParsedModule run() {
    while (peek().kind != Token::end) top_level();
    return std::move(module_);
  }

 private:
  // ---- Top level ----

  void top_level() {
    const Token token = peek();
    const std::string word = token.kind == Token::word ? token.text : "";
    if (word == ".version") {
      skip_line();
    } else if (word == ".target") {
      take();
      module_.target = take_word();
      for (char c : module_.target) {
        if (c >= '0' && c <= '9') module_.target_number = module_.target_number * 10 + (c - '0');
      }
      while (accept(',')) take_word();
    } else if (word == ".address_size") {
      take();
      if (take_integer() != 64) fail_at(token.line, "only 64-bit PTX is supported");
    } else if (word == ".file") {
      file_directive();
    } else if (word == ".section") {
      section();
    } else if (word == ".pragma" || word == ".alias") {
      skip_to_semicolon();
    } else if (!word.empty() && word[0] == '.') {
      declaration();
    } else if (token.is(';')) {
      take();
    } else {
      fail("unexpected '" + token.text + "' outside a function");
    }
  }

  void file_directive() {
    const std::uint32_t line = take().line;
    const std::uint32_t number = take_integer();
    if (number > 100000) fail_at(line, "file number out of range");
    if (module_.files.size() <= number) module_.files.resize(number + 1);
    if (peek().kind != Token::string) fail("expected a file name");
    module_.files[number] = take().text;
    while (peek().line == line && peek().kind != Token::end) take();
  }

  void section() {
    take();
    while (!peek().is('{')) {
      if (peek().kind == Token::end) fail("expected '{' after .section");
      take();
    }
    int depth = 0;
    do {
      if (peek().kind == Token::end) fail("section without an end");
      if (peek().is('{')) ++depth;
      if (peek().is('}')) --depth;
      take();
    } while (depth > 0);
  }

  void declaration() {
    bool external = false;
    for (;;) {
      const std::string& word = peek().text;
      if (word == ".visible" || word == ".weak" || word == ".common" || word == ".extern") {
        external |= word == ".extern";
        take();
      } else {
        break;
      }
    }
    const std::string word = peek().kind == Token::word ? peek().text : "";
    if (word == ".entry" || word == ".func") {
      function();
    } else if (word == ".global" || word == ".const" || word == ".shared") {
      module_.variables.push_back(variable(external));
      while (accept(',')) {
        Variable next = module_.variables.back();
        next.initial.clear();
        next.references.clear();
        declarator(next, last_element_);
        module_.variables.push_back(next);
      }
      expect(';');
    } else {
      fail("unknown directive '" + peek().text + "'");
    }
  }

  static Space space_named(const std::string& word) {
    if (word == ".shared") return Space::shared;
    if (word == ".const") return Space::constant;
    if (word == ".local") return Space::local;
    if (word == ".param") return Space::param;
    return Space::global;
  }

  // .space [.align n] [.v2|.v4] .type name[n][m] [= initialiser]
  Variable variable(bool external) {
    Variable v;
    v.space = space_named(take_word());
    v.external = external;
    int vector = 1;
    Type type = Type::none;
    bool aligned = false, pointee = false;
    while (peek().kind == Token::word && peek().text[0] == '.') {
      const std::string word = take_word();
      if (word == ".align") {
        const auto align = take_integer();
        if (align == 0 || align > 4096 || (align & (align - 1)) != 0) fail("bad alignment");
        if (pointee) continue;  // after .ptr: of what the parameter points to
        v.align = align;
        aligned = true;
      } else if (word == ".v2") {
        vector = 2;
      } else if (word == ".v4") {
        vector = 4;
      } else if (word == ".ptr") {
        pointee = true;
      } else if (word == ".global" || word == ".shared" || word == ".const" || word == ".local") {
        continue;  // what a kernel parameter points to
      } else if (word == ".attribute") {
        expect('(');
        while (!accept(')')) {
          if (peek().kind == Token::end) fail("expected ')'");
          take();
        }
      } else {
        type = type_named(word.substr(1));
        if (type == Type::none) fail("unknown type '" + word + "'");
      }
    }
    if (type == Type::none) fail("declaration without a type");
    const int element = (size_of(type) ? size_of(type) : 1) * vector;
    if (!aligned) v.align = static_cast<std::uint32_t>(element);
    last_element_ = element;
    declarator(v, element);
    return v;
  }

  void declarator(Variable& v, int element) {
    v.name = take_word();
    std::uint64_t count = 1;
    bool unsized = false;
    while (accept('[')) {
      if (accept(']')) {
        unsized = true;
        continue;
      }
      count *= take_integer();
      if (count > (1ull << 40)) fail("array too large");
      expect(']');
    }
    v.bytes = unsized ? 0 : count * static_cast<std::uint64_t>(element);
    if (accept('=')) {
      initialiser(v, element);
      if (unsized) v.bytes = v.initial.size();
      if (v.initial.size() > v.bytes) fail("initialiser longer than '" + v.name + "'");
    }
  }

  void initialiser(Variable& v, int element) {
    if (accept('{')) {
      while (!accept('}')) {
        initialiser(v, element);
        accept(',');
        if (peek().kind == Token::end) fail("initialiser without an end");
      }
      return;
    }
    const bool minus = accept('-');
    const std::string word = take_word();
    std::uint64_t bits = 0;
    if (starts_with_digit(word) && peek().is('(')) {  // 0xFF00(symbol): one byte of an address
      const std::uint64_t mask = parse_integer(word);
      take();
      int shift = 0;
      while (shift < 64 && mask != 0 && !((mask >> shift) & 1)) shift += 8;
      reference(v, element, shift, take_word());
      expect(')');
    } else if (starts_with_digit(word)) {
      const Arg arg = number(word, minus);
      bits = arg.bits;
      if (arg.kind == Arg::real && element == 4) {
        double value;
        std::memcpy(&value, &arg.bits, 8);
        const auto single = static_cast<float>(value);
        std::uint32_t low;
        std::memcpy(&low, &single, 4);
        bits = low;
      }
    } else if (word == "generic") {
      expect('(');
      reference(v, element, 0, take_word());
      expect(')');
    } else {
      reference(v, element, 0, word);
    }
    for (int i = 0; i < element; ++i)
      v.initial.push_back(i < 8 ? static_cast<std::uint8_t>(bits >> (8 * i)) : 0);
  }

  void reference(Variable& v, int element, int shift, const std::string& symbol) {
    std::int64_t addend = 0;
    if (accept('+')) addend = take_integer();
    v.references.push_back({v.initial.size(), symbol, addend, element < 8 ? element : 8, shift});
  }

  std::vector<Variable> parameters() {
    std::vector<Variable> result;
    expect('(');
    while (!accept(')')) {
      if (!peek().is(".param") && !peek().is(".reg")) fail("expected a parameter");
      result.push_back(variable(false));
      if (!peek().is(')')) expect(',');
    }
    return result;
  }

  // ---- Functions ----

  void function() {
    Function f;
    f.line = peek().line;
    f.is_kernel = take_word() == ".entry";
    if (peek().is('(')) f.results = parameters();
    f.name = take_word();
    if (peek().is('(')) f.params = parameters();
    for (; peek().kind == Token::word; take()) {
      const std::string word = peek().text;
      if (word == ".maxntid")
        triple(f.max_threads);
      else if (word == ".reqntid")
        triple(f.required_threads);
      else if (word == ".reqnctapercluster")
        triple(f.cluster);
      else if (word == ".explicitcluster")
        f.explicit_cluster = true;
      else if (word == ".minnctapersm")
        take(), f.min_ctas = parse_count();
      else if (word == ".maxnreg")
        take(), f.max_registers = parse_count();
      else if (word == ".maxnctapersm" || word == ".maxclusterrank")
        take();
      else if (word == ".noreturn" || word == ".blocksareclusters")
        continue;
      else if (word == ".pragma")
        while (!peek(1).is(';')) take();
      else
        fail("unknown function directive '" + word + "'");
    }
    if (accept(';')) {
      module_.functions.push_back(std::move(f));
      return;
    }
    f.has_body = true;
    body(f);
    for (const Function& other : module_.functions) {
      if (other.has_body && other.name == f.name)
        fail_at(f.line, "'" + f.name + "' is defined twice");
    }
    module_.functions.push_back(std::move(f));
  }
  std::uint32_t parse_count() {
    if (!starts_with_digit(peek().text)) fail("expected a number");
    return static_cast<std::uint32_t>(parse_integer(peek().text));
  }
  void triple(std::uint32_t (&out)[3]) {  // leaves the last token for the caller's loop to take
    take();
    for (int i = 0; i < 3; ++i) {
      out[i] = parse_count();
      if (!peek(1).is(',')) {
        for (++i; i < 3; ++i) out[i] = 1;
        return;
      }
      if (i < 2) take(), take();
    }
  }

  void body(Function& f) {
    function_ = &f;
    registers_.assign(1, {});
    variables_.assign(1, {});
    f.scope_parent.assign(1, -1);
    scope_ = 0;
    file_ = source_line_ = 0;
    expect('{');
    for (int depth = 1; depth > 0;) {
      const Token token = peek();
      if (token.kind == Token::end) fail_at(f.line, "function '" + f.name + "' without an end");
      if (accept('{')) {
        f.scope_parent.push_back(scope_);
        registers_.emplace_back();
        variables_.emplace_back();
        scope_ = static_cast<int>(f.scope_parent.size()) - 1;
        ++depth;
      } else if (accept('}')) {
        scope_ = f.scope_parent[static_cast<std::size_t>(scope_)];
        --depth;
      } else if (accept(';')) {
      } else if (token.kind == Token::word && token.text[0] == '.') {
        directive(f);
      } else if (token.kind == Token::word && peek(1).is(':')) {
        label(f);
      } else {
        instruction(f);
      }
    }
  }

  void label(Function& f) {
    const Token token = take();
    take();
    for (const Function::Label& other : f.labels) {
      if (other.name == token.text && other.scope == static_cast<std::uint32_t>(scope_))
        fail_at(token.line, "label '" + token.text + "' is defined twice in one scope");
    }
    if (peek().is(".branchtargets")) {
      take();
      Function::BranchTable table{token.text, static_cast<std::uint32_t>(scope_), {}};
      do {
        table.targets.push_back(take_word());
      } while (accept(','));
      expect(';');
      f.tables.push_back(std::move(table));
    } else if (peek().is(".callprototype")) {
      skip_to_semicolon();
    } else {
      f.labels.push_back({token.text, static_cast<std::uint32_t>(scope_),
                          static_cast<std::uint32_t>(f.code.size())});
    }
  }

  void directive(Function& f) {
    const std::string& word = peek().text;
    if (word == ".reg") {
      registers(f);
    } else if (word == ".local" || word == ".shared" || word == ".param" || word == ".global" ||
               word == ".const") {
      Variable v = variable(false);
      while (true) {
        declare_variable(f, v);
        if (!accept(',')) break;
        v.initial.clear();
        v.references.clear();
        declarator(v, last_element_);
      }
      expect(';');
    } else if (word == ".loc") {
      const std::uint32_t line = take().line;
      file_ = take_integer();
      source_line_ = take_integer();
      while (peek().line == line && peek().kind != Token::end) take();
    } else if (word == ".pragma") {
      skip_to_semicolon();
    } else if (word == ".file") {
      file_directive();
    } else if (word == ".section") {
      section();
    } else {
      fail("unknown directive '" + word + "'");
    }
  }

  void declare_variable(Function& f, Variable v) {
    const std::string unique =
        "{" + f.name + ":" + std::to_string(f.variables.size()) + "}" + v.name;
    variables_[static_cast<std::size_t>(scope_)][v.name] = unique;
    v.name = unique;
    f.variables.push_back(std::move(v));
  }

  void registers(Function& f) {
    take();
    if (peek().is(".v2") || peek().is(".v4")) fail("vector registers are not supported");
    const std::string type_word = take_word();
    const Type type = type_named(type_word.substr(1));
    if (type == Type::none) fail("unknown register type '" + type_word + "'");
    do {
      const std::string name = take_word();
      if (accept('<')) {
        const std::uint32_t count = take_integer();
        expect('>');
        if (count > 1000000) fail("too many registers");
        for (std::uint32_t i = 0; i < count; ++i) add_register(f, name + std::to_string(i), type);
      } else {
        add_register(f, name, type);
      }
    } while (accept(','));
    expect(';');
  }
  void add_register(Function& f, const std::string& name, Type type) {
    registers_[static_cast<std::size_t>(scope_)][name] =
        static_cast<std::uint32_t>(f.registers.size());
    f.registers.push_back({name, type});
  }

  template <class Map>
  auto find(const std::vector<Map>& maps, const std::string& name) const -> const
      typename Map::mapped_type* {
    for (int s = scope_; s >= 0; s = function_->scope_parent[static_cast<std::size_t>(s)]) {
      const auto& map = maps[static_cast<std::size_t>(s)];
      const auto it = map.find(name);
      if (it != map.end()) return &it->second;
    }
    return nullptr;
  }

  // ---- Instructions ----

  void instruction(Function& f) {
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
      if (f.registers[*reg].type != Type::pred) fail("'" + name + "' is not a predicate");
      ins.guard = static_cast<int>(*reg);
    }
    ins.opcode = take_word();
    split(ins.opcode, ins.parts);
    while (!accept(';')) {
      if (peek().kind == Token::end || peek().is('}')) fail("expected ';'");
      ins.args.push_back(operand());
      if (!peek().is(';') && !accept(',')) fail("expected ',' or ';', got '" + peek().text + "'");
    }
    f.code.push_back(std::move(ins));
  }

  static void split(const std::string& opcode, std::vector<std::string>& parts) {
    std::size_t start = 0;
    for (;;) {
      const std::size_t dot = opcode.find('.', start);
      parts.push_back(opcode.substr(start, dot - start));
      if (dot == std::string::npos) return;
      start = dot + 1;
    }
  }

  Arg operand() {
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

  Arg sequence(Arg::Kind kind, char close) {
    Arg arg;
    arg.kind = kind;
    while (!accept(close)) {
      if (peek().kind == Token::end) fail(std::string("expected '") + close + "'");
      arg.args.push_back(operand());
      if (!peek().is(close) && !accept(',')) fail("expected ',', got '" + peek().text + "'");
    }
    return arg;
  }

  Arg simple_operand() {
    if (++nesting_ > 16) fail("operands nested too deeply");
    Arg arg = unnested_operand();
    --nesting_;
    return arg;
  }

  Arg unnested_operand() {
    if (accept('{')) return sequence(Arg::vector, '}');
    if (accept('(')) return sequence(Arg::list, ')');
    if (accept('[')) {
      Arg arg;
      arg.kind = Arg::memory;
      arg.args.push_back(simple_operand());
      arg.offset = displacement();
      while (accept(',')) arg.args.push_back(operand());
      expect(']');
      return arg;
    }
    const bool negate = accept('!');
    const bool minus = !negate && accept('-');
    const std::string word = take_word();
    if (starts_with_digit(word)) return number(word, minus);
    Arg arg;
    if (const std::uint32_t* reg = find(registers_, word)) {
      if (minus) fail("a register cannot be negated");
      arg.kind = Arg::reg;
      arg.reg_index = *reg;
      arg.negate = negate;
      return arg;
    }
    if (negate || minus) fail("unknown register '" + word + "'");
    if (word == "_") return arg;
    if (word[0] == '%') {
      arg.kind = Arg::special;
      arg.text = word;
      return arg;
    }
    arg.kind = Arg::name;
    const std::string* unique = find(variables_, word);
    arg.text = unique != nullptr ? *unique : word;
    if (nesting_ == 1) arg.offset = displacement();
    return arg;
  }

  std::int64_t displacement() {
    std::int64_t total = 0;
    while (peek().is('+') || peek().is('-')) {
      bool minus = take().is('-');
      if (accept('-')) minus = !minus;
      const std::string word = take_word();
      if (!starts_with_digit(word)) fail("expected an offset, got '" + word + "'");
      const auto value = static_cast<std::int64_t>(parse_integer(word));
      total += minus ? -value : value;
    }
    return total;
  }

  ParsedModule module_;
  Function* function_ = nullptr;
  std::vector<std::unordered_map<std::string, std::uint32_t>> registers_;  // by scope
  std::vector<std::unordered_map<std::string, std::string>> variables_;
  int scope_ = 0, last_element_ = 1, nesting_ = 0;
  std::uint32_t file_ = 0, source_line_ = 0;
};

}  // namespace

ParsedModule parse_ptx(const std::string& text, const std::string& name) {
  return Parser(text, name).run();
}

}  // namespace torchext::sim
