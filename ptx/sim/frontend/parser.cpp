// PTX text to ParsedModule: the module's directives and the heads of functions.
#include "parser.h"

#include "parser_state.h"

namespace torchext::sim {

Parser::Parser(const std::string& text, const std::string& name) : TokenReader(text, name) {
  module_.name = name;
  module_.sources.push_back({name, "", 0, last_line(), 0});
}

ParsedModule Parser::run() {
  while (peek().kind != Token::end) top_level();
  module_.sources[0].target = module_.target;
  module_.sources[0].target_number = module_.target_number;
  return std::move(module_);
}

void Parser::top_level() {
  const Token token = peek();
  if (accept(".version")) {
    if (peek().kind != Token::number) fail_token("a version such as 8.8");
    take();
  } else if (token.is(".target")) {
    target_directive();
  } else if (accept(".address_size")) {
    if (take_integer() != 64) fail_at(token.line, ".address_size must be 64");
  } else if (token.is(".file")) {
    file_directive();
  } else if (token.is(".section")) {
    section();
  } else if (token.is(".pragma")) {
    pragma();
  } else if (token.is(".alias")) {
    alias();
  } else if (accept(';')) {
  } else if (token.kind == Token::word && token.text[0] == '.') {
    const Linkage how = linkage();
    const Token& next = peek();
    if (next.is(".entry") || next.is(".func")) {
      function(how);
    } else if (next.is(".global") || next.is(".const") || next.is(".shared")) {
      for (Variable& v : variables(how)) module_.variables.push_back(std::move(v));
    } else if (next.is(".tex") || next.is(".texref") || next.is(".surfref")) {
      fail("textures and surfaces are not supported");
    } else {
      fail("unknown directive '" + next.text + "'");
    }
  } else {
    fail_token("a directive, outside a function");
  }
}

// .target sm_90a, debug. The last of several directives counts.
void Parser::target_directive() {
  take();
  module_.target = take_word();
  module_.target_number = 0;
  for (char c : module_.target) {
    if (c >= '0' && c <= '9' && module_.target_number < 10000)
      module_.target_number = module_.target_number * 10 + (c - '0');
  }
  while (accept(',')) {
    const std::uint32_t line = peek().line;
    const std::string option = take_word();
    if (option == "map_f64_to_f32") fail_at(line, "map_f64_to_f32 is not supported");
    if (option != "debug" && option.compare(0, 8, "texmode_") != 0)
      fail_at(line, "unknown target option '" + option + "'");
  }
}

// .file number "name" [, timestamp, size]
void Parser::file_directive() {
  const std::uint32_t line = take().line;
  const std::uint32_t number = take_integer();
  if (number > 100000)
    fail_at(line,
            "the number of a file must be at most 100000 (got " + std::to_string(number) + ")");
  if (module_.files.size() <= number) module_.files.resize(number + 1);
  if (peek().kind != Token::string) fail_token("a file name in quotes");
  module_.files[number] = take().text;
  while (accept(',')) constant_integer();
}

// Skips DWARF sections. The source lines come from .loc.
void Parser::section() {
  take();
  while (!peek().is('{')) {
    if (peek().kind == Token::end) fail_token("'{'");
    take();
  }
  int depth = 0;
  do {
    if (peek().kind == Token::end) fail_token("'}', the end of the section");
    if (peek().is('{')) ++depth;
    if (peek().is('}')) --depth;
    take();
  } while (depth > 0);
}

// .pragma "nounroll"; is advice to ptxas and changes no results.
void Parser::pragma() {
  take();
  do {
    if (peek().kind != Token::string) fail_token("a string");
    take();
  } while (accept(','));
  expect(';');
}

void Parser::alias() {
  const std::uint32_t line = take().line;
  const std::string name = take_word();
  expect(',');
  if (!module_.aliases.emplace(name, take_word()).second)
    fail_at(line, "'" + name + "' is an alias already");
  declared_.insert(name);
  expect(';');
}

Linkage Parser::linkage() {
  Linkage how = Linkage::internal;
  for (;;) {
    if (accept(".visible"))
      how = Linkage::visible;
    else if (accept(".weak"))
      how = Linkage::weak;
    else if (accept(".common"))
      how = Linkage::common;
    else if (accept(".extern"))
      how = Linkage::external;
    else
      return how;
  }
}

void Parser::function(Linkage how) {
  Function f;
  f.linkage = how;
  f.line = peek().line;
  f.is_kernel = take_word() == ".entry";
  function_ = &f;
  scope_ = 0;
  f.scope_parent.assign(1, -1);
  registers_.assign(1, {});
  vectors_.assign(1, {});
  variables_.assign(1, {});
  while (accept(".attribute")) skip_attribute();
  if (peek().is('(')) f.results = parameters();
  f.name = take_word();
  declared_.insert(f.name);
  if (peek().is('(')) f.params = parameters();
  while (peek().kind == Token::word) function_directive(f);
  if (!accept(';')) {
    f.has_body = true;
    body(f);
    for (const Function& other : module_.functions) {
      if (other.has_body && other.name == f.name)
        fail_at(f.line, "'" + f.name + "' is defined twice");
    }
  }
  module_.functions.push_back(std::move(f));
}

void Parser::function_directive(Function& f) {
  if (peek().is(".pragma")) return pragma();
  const Token token = take();
  if (token.is(".maxntid"))
    numbers_up_to_three(f.max_threads);
  else if (token.is(".reqntid"))
    numbers_up_to_three(f.required_threads);
  else if (token.is(".reqnctapercluster"))
    numbers_up_to_three(f.cluster);
  else if (token.is(".explicitcluster"))
    f.explicit_cluster = true;
  else if (token.is(".minnctapersm"))
    f.min_ctas = take_integer();
  else if (token.is(".maxnreg"))
    f.max_registers = take_integer();
  else if (token.is(".maxnctapersm") || token.is(".maxclusterrank") || token.is(".abi_preserve") ||
           token.is(".abi_preserve_control"))
    take_integer();  // a limit for ptxas and the launcher, without effect on execution
  else if (token.is(".attribute"))
    skip_attribute();
  else if (token.is(".blocksareclusters"))
    fail_at(token.line, ".blocksareclusters is not supported: the grid would count clusters");
  else if (!token.is(".noreturn"))
    fail_at(token.line, "unknown function directive '" + token.text + "'");
}

void Parser::numbers_up_to_three(std::uint32_t (&out)[3]) {
  out[0] = take_integer();
  out[1] = accept(',') ? take_integer() : 1;
  out[2] = accept(',') ? take_integer() : 1;
}

ParsedModule parse_ptx(const std::string& text, const std::string& name) {
  return Parser(text, name).run();
}

}  // namespace torchext::sim
