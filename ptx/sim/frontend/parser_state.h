// The recursive-descent parser of parse_ptx, in three files: parser.cpp (modules and functions),
// parse_declarations.cpp (variables, registers, initializers), parse_instructions.cpp (bodies,
// operands).
#pragma once

#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "token_reader.h"

namespace torchext::sim {

class Parser : TokenReader {
 public:
  Parser(const std::string& text, const std::string& name);
  ParsedModule run();

 private:
  // ---- parser.cpp ----
  void top_level();
  void target_directive();
  void file_directive();
  void section();
  void pragma();
  void alias();
  Linkage linkage();
  void function(Linkage linkage);
  void function_directive(Function& f);
  void numbers_up_to_three(std::uint32_t (&out)[3]);

  // ---- parse_declarations.cpp ----
  // Reads ".space attributes .type name, name ...;", each with its array size and initializer.
  std::vector<Variable> variables(Linkage linkage);
  Variable variable_head(Linkage linkage);
  void declarator(Variable& v, bool parameter);
  std::uint64_t initializer(Variable& v, const std::vector<std::uint64_t>& counts,
                            std::size_t level);
  void element(Variable& v);
  void address_element(Variable& v, int shift, int bytes);
  // "(.param .u32 a, .reg .u64 b)". The registers of a prototype are not declared.
  std::vector<Variable> parameters(bool declare = true);
  void skip_attribute();
  void registers();
  void add_registers(const std::string& name, Type type, int lanes);
  std::uint32_t add_register(const std::string& name, Type type);
  void declare_variable(Variable v);

  // ---- parse_instructions.cpp ----
  void body(Function& f);
  void directive();
  void location();
  void label();
  void instruction();
  Arg operand();
  Arg sequence(Arg::Kind kind, char close);
  Arg simple_operand();
  Arg name_operand(const std::string& word, bool negate);
  std::int64_t displacement();

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

  ParsedModule module_;
  Function* function_ = nullptr;
  // For each scope: registers, registers of a vector, and the unique names of variables.
  std::vector<std::unordered_map<std::string, std::uint32_t>> registers_;
  std::vector<std::unordered_map<std::string, std::vector<std::uint32_t>>> vectors_;
  std::vector<std::unordered_map<std::string, std::string>> variables_;
  std::set<std::string> declared_;  // variables and functions, so far
  int scope_ = 0;
  bool in_call_ = false;  // '(' opens a list of arguments, not an expression
  std::uint32_t file_ = 0, source_line_ = 0;
};

}  // namespace torchext::sim
