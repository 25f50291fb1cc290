// Splits PTX into tokens. A dotted opcode, a %register and a "a::b" modifier are one word each.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace torchext::sim {

struct Token {
  enum Kind : std::uint8_t { word, string, punctuation, end };
  Kind kind = end;
  std::string text;
  std::uint32_t line = 0;
  bool is(char c) const { return kind == punctuation && text[0] == c; }
  bool is(const char* s) const { return kind == word && text == s; }
};

std::vector<Token> tokenize(const std::string& text, const std::string& module);

}  // namespace torchext::sim
